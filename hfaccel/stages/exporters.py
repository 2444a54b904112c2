"""The ways from a checkpoint to an ONNX graph, behind one function each: ``(job) -> onnx_ir.Model``."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfaccel.construct import construct_encoder_decoder
from hfaccel.errors import ExportError
from hfaccel.stages.mobius_corrections import correct_decoder
from hfaccel.trace import trace_decoder

if TYPE_CHECKING:
    import onnx_ir
    import torch

    from hfaccel.artifact.contract import Contract
    from hfaccel.recipe.schema import ExporterName
    from hfaccel.source.model import SourceModel

    Inputs = dict[str, torch.Tensor]
    Exporter = Callable[["ExportJob"], onnx_ir.Model]

_NOISY_LOGGERS = ("transformers", "torch", "onnxscript", "onnx_ir", "mobius")
_SAMPLE_LENGTH = 11


@dataclass(frozen=True)
class ExportJob:
    """What an exporter may look at.

    Attributes:
        source: the checkpoint on disk.
        module: the same in torch.
        contract: inputs and outputs that the graph shall have.
        opset: of ONNX.
    """

    source: SourceModel
    module: torch.nn.Module
    contract: Contract
    opset: int

    def samples(self) -> Inputs:
        """Inputs [2, 11] to trace with."""
        import torch

        text = self.contract.text
        ids = torch.full((2, min(_SAMPLE_LENGTH, text.max_length)), 1 if text.pad_token_id != 1 else 2, dtype=torch.int64)
        known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        return {spec.name: known[spec.name] for spec in self.contract.inputs}


def export_with_transformers(job: ExportJob) -> onnx_ir.Model:
    """Through ``transformers.exporters`` (experimental there; its version is pinned and the parity gate judges its graphs)."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    inputs = _samples_of_encoder(job)
    shapes = _dynamic_shapes(inputs, job.contract.text.max_length)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=job.opset)
    program: onnx_ir.Model = OnnxExporter().export(job.module, inputs, config).program
    return program


def export_with_torch(job: ExportJob) -> onnx_ir.Model:
    """Through plain ``torch.onnx.export(dynamo=True)``."""
    import torch

    inputs = _samples_of_encoder(job)
    shapes = _dynamic_shapes(inputs, job.contract.text.max_length)
    exported = torch.onnx.export(
        job.module, kwargs=inputs, dynamo=True, dynamic_shapes=shapes, opset_version=job.opset, verbose=False
    )
    assert exported is not None  # None is returned only when a file name is given
    model: onnx_ir.Model = exported.model
    return model


def construct_with_mobius(job: ExportJob) -> onnx_ir.Model:
    """A decoder's graph built from its config, with the weights attached: nothing is traced, so it takes seconds.

    One graph serves prompt and single tokens, with one ``GroupQueryAttention`` a layer.
    """
    import mobius

    if job.contract.generation is None or job.contract.generation.encoder is not None:
        raise ExportError("mobius constructs decoders only", where=f"task {job.contract.task}")
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        package = mobius.build(
            str(job.source.folder),
            task="text-generation",
            dtype="f32",
            trust_remote_code=job.source.trust_remote_code,
            execution_provider="cpu",
        )
    model: onnx_ir.Model = package["model"]
    lost = next((name for name, value in model.graph.initializers.items() if value.const_value is None), None)
    if lost is not None:
        raise ExportError(
            f"mobius takes this for an architecture that it is not: its graph needs '{lost}', which the checkpoint does not have",
            where=f"model_type {job.source.model_type}",
            hint="leave it to the exporter traced",
        )
    # mobius names it after the folder, and the same checkpoint is to give the same bytes anywhere.
    model.graph.name = "main_graph"
    correct_decoder(model, job.module)
    _use_names_of(job.contract, model)
    return model


def construct(job: ExportJob) -> onnx_ir.Model:
    """An encoder-decoder's graph built from the parameters of its torch module: see :mod:`hfaccel.construct`."""
    if job.contract.generation is None or job.contract.generation.encoder is None:
        raise ExportError("only encoder-decoders are constructed", where=f"task {job.contract.task}")
    model = construct_encoder_decoder(job.module.hf_model)
    order = [spec.name for spec in job.contract.outputs]
    model.graph.outputs[:] = sorted(model.graph.outputs, key=lambda value: order.index(str(value.name)))
    return model


def trace(job: ExportJob) -> onnx_ir.Model:
    """A decoder's graph traced from its torch module, for architectures that nobody has written down: see :mod:`hfaccel.trace`."""
    if job.contract.generation is None or job.contract.generation.encoder is not None:
        raise ExportError("only decoders are traced with their cache", where=f"task {job.contract.task}")
    model = trace_decoder(job.module.hf_model, job.contract.generation, opset=job.opset)
    _use_names_of(job.contract, model)
    return model


EXPORTERS: Mapping[ExporterName, Exporter] = {
    "transformers": export_with_transformers,
    "torch": export_with_torch,
    "mobius": construct_with_mobius,
    "constructed": construct,
    "traced": trace,
}


def _samples_of_encoder(job: ExportJob) -> Inputs:
    if job.contract.generation is not None:
        raise ExportError(
            "this exporter traces no model that generates text",
            where=f"model_type {job.source.model_type}",
            hint="use mobius or traced for decoders, constructed for encoder-decoders",
        )
    return job.samples()


def _use_names_of(contract: Contract, model: onnx_ir.Model) -> None:
    """The contract's symbols in the shapes of the graph's inputs and outputs (``sequence`` for ``sequence_len``)."""
    import onnx_ir

    specs = {spec.name: spec for spec in (*contract.inputs, *contract.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in specs:
            value.shape = onnx_ir.Shape(specs[value.name].shape)


def _dynamic_shapes(inputs: Inputs, max_length: int) -> dict[str, Any]:
    """Explicit [batch, sequence] symbols: a readable contract, and the exporter need not find them out."""
    import torch

    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    sequence = torch.export.Dim("sequence", min=1, max=max(2, max_length))
    return {name: {0: batch, 1: sequence} for name in inputs}


@contextlib.contextmanager
def quiet_exporters() -> Iterator[None]:
    """Keep the exporters' chatter (progress marks, optional packages missing) away from our own lines; errors still raise."""
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

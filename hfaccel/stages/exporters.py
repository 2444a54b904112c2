"""The ways from a torch module to an ONNX graph, behind one function each: ``(module, inputs, opset) -> onnx_ir.Model``."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir
    import torch

    from hfaccel.recipe.schema import ExporterName

    Inputs = dict[str, torch.Tensor]
    Exporter = Callable[[torch.nn.Module, Inputs, int, int], onnx_ir.Model]

_NOISY_LOGGERS = ("transformers", "torch", "onnxscript", "onnx_ir")


def export_with_transformers(module: torch.nn.Module, inputs: Inputs, opset: int, max_length: int) -> onnx_ir.Model:
    """Through ``transformers.exporters`` (experimental there; its version is pinned and the parity gate judges its graphs)."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    config = OnnxConfig(dynamic=True, dynamic_shapes=_dynamic_shapes(inputs, max_length), opset_version=opset)
    program: onnx_ir.Model = OnnxExporter().export(module, inputs, config).program
    return program


def export_with_torch(module: torch.nn.Module, inputs: Inputs, opset: int, max_length: int) -> onnx_ir.Model:
    """Through plain ``torch.onnx.export(dynamo=True)``."""
    import torch

    shapes = _dynamic_shapes(inputs, max_length)
    exported = torch.onnx.export(module, kwargs=inputs, dynamo=True, dynamic_shapes=shapes, opset_version=opset, verbose=False)
    assert exported is not None  # None is returned only when a file name is given
    model: onnx_ir.Model = exported.model
    return model


EXPORTERS: Mapping[ExporterName, Exporter] = {"transformers": export_with_transformers, "torch": export_with_torch}


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

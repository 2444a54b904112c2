"""What all peers are made from: the source in torch, a scratch folder, threads, and the float graph that some of them share."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfaccel.runtime.model import Model
from hfaccel.runtime.tokenizer import Text

if TYPE_CHECKING:
    import torch

    from hfaccel.source.model import SourceModel

# ONNX files end at 2 GiB; onnxruntime's preparation for quantization loses weights that lie in files of their own.
_LARGEST_SINGLE_FILE = 1_900_000_000
_NOISY_LOGGERS = ("torch", "transformers", "onnxscript", "onnx_ir", "root", "nncf")


@dataclass(frozen=True)
class Setup:
    """What a peer is made from.

    Attributes:
        source: the checkpoint.
        module: the checkpoint in torch: eval mode, float32; shared, so it must not be changed.
        artifact: the artifact that is compared; tokenizer and task are shared.
        threads: threads that a peer may use.
        folder: scratch folder, removed after the comparison.
        calibration: texts for peers that measure activations.
    """

    source: SourceModel
    module: torch.nn.Module
    artifact: Model
    threads: int
    folder: Path
    calibration: tuple[Text, ...]

    def float_graph(self) -> Path:
        """The ONNX graph of the source as ``torch.onnx.export`` writes it, exported at the first call."""
        path = self.folder / "float" / "model.onnx"
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            _export(self.module, self.artifact, path)
        return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of libraries off our output; errors still raise."""
    with (
        quiet_logs(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Keep what libraries log, short of errors, off our output."""
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def sample_feeds(module: torch.nn.Module, artifact: Model) -> dict[str, torch.Tensor]:
    """Two short rows without padding, int64 [batch, sequence], for what traces the module; in the order of its inputs."""
    import torch

    text = artifact.contract.text
    ids = torch.full((2, min(11, text.max_length)), 1 if text.pad_token_id != 1 else 2, dtype=torch.int64)
    samples = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    names: Any = module.input_names
    return {name: samples[name] for name in names}


def _export(module: torch.nn.Module, artifact: Model, path: Path) -> None:
    import torch

    contract = artifact.contract
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    sequence = torch.export.Dim("sequence", min=1, max=max(2, contract.text.max_length))
    feeds = sample_feeds(module, artifact)
    weight_bytes = sum(weight.nbytes for weight in module.parameters())
    with quiet():
        torch.onnx.export(
            module,
            f=str(path),
            kwargs=dict(feeds),
            output_names=[spec.name for spec in contract.outputs],
            dynamic_shapes={name: {0: batch, 1: sequence} for name in feeds},
            external_data=weight_bytes > _LARGEST_SINGLE_FILE,
            dynamo=True,
            verbose=False,
        )

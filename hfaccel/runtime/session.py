"""Runs an ONNX graph on the CPU with onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime

from hfaccel.artifact.contract import SessionSettings
from hfaccel.errors import IntegrityError

_LOG_ERRORS_ONLY = 3
_DEFAULT_SETTINGS = SessionSettings()


class Runner(Protocol):
    """Anything that turns input arrays into output arrays: a graph session, or the source model itself.

    ``run`` takes arrays by input name (it may be given more names than it reads) and gives arrays by output name.
    """

    input_names: tuple[str, ...]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for one padded batch; every array has the batch as its first axis."""


class GraphSession:
    """An open onnxruntime session of one graph; a :class:`Runner`. May be shared by threads.

    Args:
        path: the ONNX graph; external data is looked for beside it.
        settings: threads, spinning and fusions to leave out.

    Attributes:
        input_names: inputs that the graph reads.
        output_names: outputs in graph order.

    Raises:
        IntegrityError: the file is missing, or onnxruntime cannot open it.
    """

    def __init__(self, path: Path, settings: SessionSettings = _DEFAULT_SETTINGS) -> None:
        self._path = path
        if not path.is_file():
            raise IntegrityError(
                "the graph file is missing", where=str(path), hint="copy the whole folder again, or compile it again"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.intra_op_num_threads
        options.log_severity_level = _LOG_ERRORS_ONLY
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.allow_spinning else "0")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(settings.disabled_optimizers) or None,
            )
        except Exception as error:  # onnxruntime has no common base class below Exception
            raise IntegrityError(
                f"onnxruntime {onnxruntime.__version__} cannot open the graph: {_first_line(error)}",
                where=str(path),
                hint="check the folder with: hfaccel verify; or update onnxruntime to the version that the manifest names",
            ) from error
        self.input_names: tuple[str, ...] = tuple(item.name for item in self._session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(item.name for item in self._session.get_outputs())

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; feeds that the graph does not read are dropped.

        Raises:
            IntegrityError: the graph reads an input that ``feeds`` does not hold.
        """
        missing = [name for name in self.input_names if name not in feeds]
        if missing:
            raise IntegrityError(
                f"the graph reads inputs that the run time does not make: {', '.join(missing)}",
                where=str(self._path),
                hint="the graph may read input_ids, attention_mask and token_type_ids; compile the model again",
            )
        values = self._session.run(None, {name: feeds[name] for name in self.input_names})
        return dict(zip(self.output_names, values, strict=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

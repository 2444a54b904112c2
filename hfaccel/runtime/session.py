"""Runs an ONNX graph on the CPU with onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime

from hfaccel.artifact.contract import GraphOptimization, SessionSettings
from hfaccel.errors import IntegrityError
from hfaccel.runtime.cores import threads_to_open_with

_LOG_ERRORS_ONLY = 3
_OPTIMIZATION_LEVELS: Mapping[GraphOptimization, onnxruntime.GraphOptimizationLevel] = {
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "layout": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_LAYOUT,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
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
        settings: how to run; its ``engine`` is not looked at, see :func:`hfaccel.runtime.engines.open_graph`.
        content: an edited version of the graph that is run instead, with the weights that lie beside ``path``.

    Attributes:
        path: as given.
        input_names: inputs that the graph reads.
        output_names: outputs in graph order.
        optional_input_names: inputs that have a default, which :meth:`run` leaves at that where ``feeds`` does not hold them.

    Raises:
        IntegrityError: the file is missing, or onnxruntime cannot open it.
    """

    def __init__(self, path: Path, settings: SessionSettings = _DEFAULT_SETTINGS, *, content: bytes | None = None) -> None:
        self.path = path
        check_graph_file(path)
        if settings.inference_precision != "f32":
            raise IntegrityError(
                f"onnxruntime computes float graphs in float32, not in {settings.inference_precision}",
                where=str(path),
                hint="inference_precision is a setting of the engine openvino",
            )
        options = _session_options(settings)
        if content is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path) if content is None else content,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(settings.disabled_optimizers) or None,
            )
        except Exception as error:  # onnxruntime has no common base class below Exception
            raise IntegrityError(
                f"onnxruntime {onnxruntime.__version__} cannot open the graph: {first_line(error)}",
                where=str(path),
                hint="check the folder with: hfaccel verify; or update onnxruntime to the version that the manifest names",
            ) from error
        self.input_names: tuple[str, ...] = tuple(item.name for item in self._session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(item.name for item in self._session.get_outputs())
        optional = self._session.get_overridable_initializers()
        self.optional_input_names: tuple[str, ...] = tuple(item.name for item in optional)

    @property
    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession``, for those who bind inputs and outputs themselves."""
        return self._session

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; feeds that the graph does not read are dropped.

        Raises:
            IntegrityError: the graph reads an input that ``feeds`` does not hold.
        """
        known = read_feeds(self.input_names, feeds, self.path)
        chosen = {name: feeds[name] for name in self.optional_input_names if name in feeds}
        values = self._session.run(None, {**known, **chosen})
        return dict(zip(self.output_names, values, strict=True))


def check_graph_file(path: Path) -> None:
    """Say it plainly when a graph file is not there.

    Raises:
        IntegrityError: it is not.
    """
    if not path.is_file():
        raise IntegrityError(
            "the graph file is missing", where=str(path), hint="copy the whole folder again, or compile it again"
        )


def read_feeds(input_names: tuple[str, ...], feeds: Mapping[str, np.ndarray], graph: Path) -> dict[str, np.ndarray]:
    """Of ``feeds`` those that the graph reads.

    Raises:
        IntegrityError: it reads one that ``feeds`` does not hold.
    """
    missing = [name for name in input_names if name not in feeds]
    if missing:
        raise IntegrityError(
            f"the graph reads inputs that the run time does not make: {', '.join(missing)}",
            where=str(graph),
            hint="the graph may read input_ids, attention_mask and token_type_ids; compile the model again",
        )
    return {name: feeds[name] for name in input_names}


def _session_options(settings: SessionSettings) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.intra_op_num_threads or threads_to_open_with()
    options.log_severity_level = _LOG_ERRORS_ONLY
    options.enable_cpu_mem_arena = settings.enable_cpu_mem_arena
    options.graph_optimization_level = _OPTIMIZATION_LEVELS[settings.graph_optimization_level]
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.allow_spinning else "0")
    options.add_session_config_entry("session.force_spinning_stop", "0" if settings.spin_after_run else "1")
    options.add_session_config_entry("session.set_denormal_as_zero", "1" if settings.flush_denormals else "0")
    return options


def first_line(error: Exception) -> str:
    """The first line of what an engine says went wrong, or the kind of error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

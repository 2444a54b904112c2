"""Runs an ONNX graph on the CPU with OpenVINO, an optional package; nothing here imports it before a graph is opened."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hfaccel.artifact.contract import SessionSettings
from hfaccel.errors import IntegrityError, MissingExtraError
from hfaccel.runtime.cores import threads_to_open_with
from hfaccel.runtime.session import check_graph_file, first_line, read_feeds

_TELEMETRY = "openvino_telemetry"
_IMPORT_LOCK = threading.Lock()


class OpenVinoSession:
    """A graph compiled by OpenVINO; a :class:`~hfaccel.runtime.session.Runner`. May be shared by threads.

    An infer request holds the inputs and outputs of one call, so each call takes an idle request and puts it back; with no idle
    one it makes another. Threads then never see each other's buffers, and no lock is held while a graph runs.

    Args:
        path: the ONNX graph; external data is looked for beside it.
        settings: threads, and the precision of what is computed in float.

    Attributes:
        path: as given.
        input_names: inputs that the graph reads.
        output_names: outputs in graph order.

    Raises:
        MissingExtraError: openvino is not installed.
        IntegrityError: the file is missing, or openvino cannot open it.
    """

    def __init__(self, path: Path, settings: SessionSettings) -> None:
        self.path = path
        check_graph_file(path)
        openvino = import_openvino()
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": settings.inference_precision}
        if threads := settings.intra_op_num_threads or threads_to_open_with():
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            self._compiled: Any = core.compile_model(core.read_model(str(path)), "CPU", options)
        except Exception as error:  # openvino has no common base class below Exception
            raise IntegrityError(
                f"openvino {openvino.get_version()} cannot open the graph: {first_line(error)}",
                where=str(path),
                hint="check the folder with: hfaccel verify; or update openvino to the version that the manifest names",
            ) from error
        self.input_names: tuple[str, ...] = tuple(port.get_any_name() for port in self._compiled.inputs)
        self.output_names: tuple[str, ...] = tuple(port.get_any_name() for port in self._compiled.outputs)
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; feeds that the graph does not read are dropped.

        Raises:
            IntegrityError: the graph reads an input that ``feeds`` does not hold.
        """
        values = read_feeds(self.input_names, feeds, self.path)
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
        try:
            request.infer(values, share_inputs=True)
            # The request's buffers are overwritten by the next call, so the caller gets copies.
            return {name: np.array(request.get_output_tensor(index).data) for index, name in enumerate(self.output_names)}
        finally:
            self._idle.put(request)


def import_openvino() -> Any:
    """The package ``openvino``, imported so that it tells nobody.

    Importing it plainly sends a usage event to a web service, unless its package ``openvino_telemetry`` cannot be imported. That
    is hidden for the time of the import; whoever imports either package before keeps what he has.

    Raises:
        MissingExtraError: it is not installed.
    """
    with _IMPORT_LOCK:
        hidden = "openvino" not in sys.modules and _TELEMETRY not in sys.modules
        if hidden:
            sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # None makes an import fail, as Python documents
        try:
            import openvino
        except ImportError as error:
            raise MissingExtraError("openvino", extra="openvino", needed_for="this engine") from error
        finally:
            if hidden:
                del sys.modules[_TELEMETRY]
    return openvino

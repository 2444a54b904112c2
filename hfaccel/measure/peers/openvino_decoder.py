"""A decoder folder as ``optimum-cli export openvino`` writes it: OpenVINO keeps keys and values as states of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfaccel.runtime.openvino_session import import_openvino

MODEL_FILE = "openvino_model.xml"


class OpenvinoDecoder:
    """A stateful decoder in OpenVINO with its latency hint; a :class:`~hfaccel.measure.token_engines.TokenEngine`.

    Args:
        folder: holds ``openvino_model.xml`` and its weights.
        threads: that it may use.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._library = import_openvino()
        core = self._library.Core()
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        compiled = core.compile_model(core.read_model(str(folder / MODEL_FILE)), "CPU", options)
        self._inputs = frozenset(port.get_any_name() for port in compiled.inputs)
        self._request: Any = compiled.create_infer_request()
        self._length = 0

    def read(self, prompt: Sequence[int]) -> Callable[[], None]:
        """A run that reads a whole prompt into an empty cache."""
        ids = np.array([prompt], dtype=np.int64)

        def run() -> None:
            self._forget()
            self._step(ids)

        return run

    def write(self, prompt: Sequence[int], answer: Sequence[int]) -> Callable[[], None]:
        """A run that steps over the answer; before it the states of after the prompt are put back, a copy of a few megabytes."""
        self._forget()
        self._step(np.array([prompt], dtype=np.int64))
        kept = [np.array(state.state.data) for state in self._request.query_state()]
        steps = [np.array([[token]], dtype=np.int64) for token in answer]

        def run() -> None:
            for state, values in zip(self._request.query_state(), kept, strict=True):
                state.state = self._library.Tensor(values)
            self._length = len(prompt)
            for ids in steps:
                self._step(ids)

        return run

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Callable[[], None]:
        """A run that reads a prompt and appends the likeliest token each time."""
        ids = np.array([prompt], dtype=np.int64)

        def run() -> None:
            self._forget()
            logits = self._step(ids)
            for _ in range(new_tokens - 1):
                logits = self._step(np.array([[int(logits.argmax())]], dtype=np.int64))

        return run

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Logits after the prompt."""
        self._forget()
        return np.array(self._step(np.array([prompt], dtype=np.int64)), dtype=np.float32)

    def _forget(self) -> None:
        self._request.reset_state()
        self._length = 0

    def _step(self, ids: np.ndarray) -> np.ndarray:
        """Logits [vocabulary] after tokens [1, tokens] that follow what was read so far."""
        before, self._length = self._length, self._length + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, self._length), dtype=np.int64),
            "position_ids": np.arange(before, self._length, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        self._request.infer({name: value for name, value in feeds.items() if name in self._inputs}, share_inputs=True)
        logits: np.ndarray = self._request.get_tensor("logits").data[0, -1]
        return logits

"""A model folder of onnxruntime-genai, run as its own examples do: a generator per request, tokens appended to it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONFIG_FILE = "genai_config.json"


class GenaiDecoder:
    """A decoder in onnxruntime-genai; a :class:`~hfaccel.measure.token_engines.TokenEngine`.

    Args:
        folder: holds ``genai_config.json``; its own session options stay, but for the number of threads.
        threads: that it may use.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self._library: Any = importlib.import_module("onnxruntime_genai")
        config = self._library.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = self._library.Model(config)

    def read(self, prompt: Sequence[int]) -> Callable[[], None]:
        """A run that makes a generator and reads a whole prompt."""
        ids = np.array(prompt, dtype=np.int32)

        def run() -> None:
            self._generator(ids.size + 1).append_tokens(ids)

        return run

    def write(self, prompt: Sequence[int], answer: Sequence[int]) -> Callable[[], None]:
        """A run that steps over the answer, after the generator was rewound to the end of the prompt."""
        generator = self._generator(len(prompt) + len(answer) + 1)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        steps = [np.array([token], dtype=np.int32) for token in answer]

        def run() -> None:
            generator.rewind_to(len(prompt))
            for ids in steps:
                generator.append_tokens(ids)

        return run

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Callable[[], None]:
        """A run of its own greedy search; ``min_length`` keeps a token that ends a text from ending it."""
        ids, length = np.array(prompt, dtype=np.int32), len(prompt) + new_tokens

        def run() -> None:
            generator = self._generator(length, min_length=length)
            generator.append_tokens(ids)
            while not generator.is_done():
                generator.generate_next_token()

        return run

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Logits after the prompt."""
        generator = self._generator(len(prompt) + 1)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        # Shaped [batch, vocabulary] or [batch, tokens, vocabulary], as the graph gives them.
        logits = np.array(generator.get_logits(), dtype=np.float32)
        last: np.ndarray = logits.reshape(-1, logits.shape[-1])[-1]
        return last

    def _generator(self, tokens: int, *, min_length: int = 0) -> Any:
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(max_length=tokens, min_length=min_length, batch_size=1, do_sample=False)
        return self._library.Generator(self._model, parameters)

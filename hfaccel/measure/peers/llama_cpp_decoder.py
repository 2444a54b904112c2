"""A GGUF file in llama.cpp, through llama-cpp-python: one context, whose tokens behind a prompt are taken out again."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np


class LlamaCppDecoder:
    """A decoder in llama.cpp; a :class:`~hfaccel.measure.token_engines.TokenEngine`.

    Args:
        file: the GGUF file.
        threads: that it may use, for prompts and for single tokens.
        tokens: the most that a prompt and its answer have together.
    """

    def __init__(self, file: Path, threads: int, tokens: int) -> None:
        self._library: Any = importlib.import_module("llama_cpp")
        self._model = self._library.Llama(
            model_path=str(file), n_ctx=tokens, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def read(self, prompt: Sequence[int]) -> Callable[[], None]:
        """A run that reads a whole prompt into an empty cache."""
        ids = list(prompt)

        def run() -> None:
            self._model.reset()
            self._model.eval(ids)

        return run

    def write(self, prompt: Sequence[int], answer: Sequence[int]) -> Callable[[], None]:
        """A run that steps over the answer; whatever ran before, the prompt is read first, and only where it is not there any more."""
        ids, steps = list(prompt), [[token] for token in answer]

        def run() -> None:
            if self._model.n_tokens < len(ids) or self._model.input_ids[: len(ids)].tolist() != ids:
                self._model.reset()
                self._model.eval(ids)
            self._model.n_tokens = len(ids)  # what comes after is taken out of the cache by the next call
            for step in steps:
                self._model.eval(step)

        return run

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Callable[[], None]:
        """A run of its own greedy loop, which goes on behind a token that ends a text."""
        ids = list(prompt)

        def run() -> None:
            self._model.reset()
            made = self._model.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True)
            for _ in islice(made, new_tokens):
                pass

        return run

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Logits after the prompt."""
        self._model.reset()
        self._model.eval(list(prompt))
        found = self._library.llama_get_logits_ith(self._model.ctx, -1)
        return np.array(np.ctypeslib.as_array(found, shape=(self._model.n_vocab(),)), dtype=np.float32)

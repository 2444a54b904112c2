"""What is timed of an engine that generates text: reading a prompt, and stepping over an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.decoding import Decoding
from hfaccel.runtime.generation.loop import generate_tokens
from hfaccel.runtime.generation.sampling import SamplingSettings, make_generators


class TokenEngine(Protocol):
    """A decoder in some engine, for one sequence at a time. Every run computes the logits of the token that comes next."""

    def read(self, prompt: Sequence[int]) -> Callable[[], None]:
        """A run that reads a whole prompt into an empty cache."""

    def write(self, prompt: Sequence[int], answer: Sequence[int]) -> Callable[[], None]:
        """A run that steps over an answer, one token at a time, after a prompt that was read before."""

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Callable[[], None]:
        """A run that reads a prompt and goes on greedily, with all new tokens whatever the model says; nothing is kept of earlier runs."""

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Float32 [vocabulary]: of the token that follows the prompt."""


class ArtifactEngine:
    """A compiled decoder as the run time uses it; a :class:`TokenEngine`.

    Args:
        decoder: of the artifact.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def read(self, prompt: Sequence[int]) -> Callable[[], None]:
        """A run that reads a whole prompt; nothing is kept, so each run reads all of it."""
        rows = [list(prompt)]

        def run() -> None:
            self._decoder.prefill(rows)

        return run

    def write(self, prompt: Sequence[int], answer: Sequence[int]) -> Callable[[], None]:
        """A run that steps over the answer; what an earlier run wrote into the cache is overwritten."""
        cache = self._decoder.prefill([list(prompt)], room=len(answer)).cache
        tokens = [np.array([token], dtype=np.int64) for token in answer]

        def run() -> None:
            decoding = Decoding(self._decoder, cache, prompt)
            for token in tokens:
                decoding.step(token)

        return run

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Callable[[], None]:
        """A run of the loop of the run time, which guesses tokens ahead."""
        rows, settings = [list(prompt)], SamplingSettings(max_new_tokens=new_tokens)

        def run() -> None:
            self._decoder.forget()
            answer: list[int] = []

            def accept(_: int, token: int) -> bool:
                answer.append(token)
                return len(answer) == new_tokens

            for _ in generate_tokens(self._decoder, rows, settings, make_generators(0, 1), accept):
                pass

        return run

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Logits after the prompt."""
        logits: np.ndarray = self._decoder.prefill([list(prompt)]).logits[0]
        return logits


def draw_tokens(count: int, vocabulary_size: int, *, seed: int) -> list[int]:
    """Random token ids; the same seed gives the same."""
    drawn: list[int] = np.random.default_rng(seed).integers(0, vocabulary_size, count).tolist()
    return drawn

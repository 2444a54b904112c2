"""The source in torch, eager mode with SDPA attention and a growing cache: what ``generate`` of transformers does per token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache


class TorchDecoder:
    """A causal language model of transformers; a :class:`~hfaccel.measure.token_engines.TokenEngine`.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # generate asks for the logits of the last token only, where the model can give them alone.
        named = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if named else {}

    def read(self, prompt: Sequence[int]) -> Callable[[], None]:
        """A run that reads a whole prompt into a new cache."""
        ids = torch.tensor([list(prompt)])

        def run() -> None:
            self._forward(ids, DynamicCache(config=self._model.config))

        return run

    def write(self, prompt: Sequence[int], answer: Sequence[int]) -> Callable[[], None]:
        """A run that steps over the answer and takes it out of the cache again, which copies nothing."""
        cache = DynamicCache(config=self._model.config)
        self._forward(torch.tensor([list(prompt)]), cache)
        steps = [torch.tensor([[token]]) for token in answer]

        def run() -> None:
            for ids in steps:
                self._forward(ids, cache)
            cache.crop(-len(steps))

        return run

    def answer(self, prompt: Sequence[int], new_tokens: int) -> Callable[[], None]:
        """A run that reads a prompt and appends the likeliest token each time."""
        ids = torch.tensor([list(prompt)])

        def run() -> None:
            cache = DynamicCache(config=self._model.config)
            logits = self._forward(ids, cache)
            for _ in range(new_tokens - 1):
                logits = self._forward(logits.argmax().reshape(1, 1), cache)

        return run

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Logits after the prompt."""
        logits: np.ndarray = self._forward(torch.tensor([list(prompt)]), DynamicCache(config=self._model.config)).numpy()
        return logits

    def _forward(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        with torch.inference_mode():
            output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **self._options)
            logits: torch.Tensor = output.logits[0, -1]
            return logits

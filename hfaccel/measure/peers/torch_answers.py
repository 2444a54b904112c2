"""The source in torch, eager mode, float32: encoder-decoders as transformers' own examples run them, with ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import WhisperProcessor


class TorchAnswers:
    """An encoder-decoder of text in transformers; a :class:`~hfaccel.measure.answer_bench.AnswerEngine`.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def answer(self, source: Sequence[int], new: int) -> Callable[[], list[int]]:
        """A run of ``generate``, greedy, that may not end early."""
        ids = torch.tensor([list(source)])
        mask = torch.ones_like(ids)

        def run() -> list[int]:
            with torch.inference_mode():
                made = self._model.generate(
                    input_ids=ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, num_beams=1, do_sample=False
                )
            tokens: list[int] = made[0, 1:].tolist()  # behind the token that starts the decoder
            return tokens

        return run


class TorchListener:
    """Whisper in transformers, from samples to text; a :data:`~hfaccel.measure.speech_bench.Listen`.

    Args:
        model: in eval mode.
        folder: the checkpoint, with its tokenizer and its ``preprocessor_config.json``.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self._model = model
        self._processor: Any = WhisperProcessor.from_pretrained(str(folder), local_files_only=True)
        # A model of one language lets no task be chosen.
        multilingual = getattr(model.generation_config, "is_multilingual", False)
        self._options: dict[str, Any] = {"task": "transcribe"} if multilingual else {}

    def __call__(self, samples: np.ndarray) -> str:
        """Greedy; a multilingual model hears the language."""
        rate = self._processor.feature_extractor.sampling_rate
        read = self._processor(samples, sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
        with torch.inference_mode():
            ids = self._model.generate(
                read.input_features, attention_mask=read.attention_mask, num_beams=1, do_sample=False, **self._options
            )
        text: str = self._processor.batch_decode(ids, skip_special_tokens=True)[0]
        return text.strip()

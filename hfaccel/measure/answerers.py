"""A compiled encoder-decoder as the benches run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from hfaccel.artifact.generation import EncoderSettings, GenerationSettings, SpeechSettings
from hfaccel.measure.clips import Clip
from hfaccel.measure.peers.texts import packaged_texts
from hfaccel.runtime.generation.answering import answer_tokens
from hfaccel.runtime.generation.rules import rules_of
from hfaccel.runtime.generation.sampling import SamplingSettings, make_generators
from hfaccel.runtime.generation.text_to_text import TextToTextModel
from hfaccel.runtime.speech.model import SpeechModel


class ArtifactAnswers:
    """A compiled encoder-decoder of text; an :class:`~hfaccel.measure.answer_bench.AnswerEngine`.

    Args:
        model: of the artifact.

    Attributes:
        generation: how it answers.
        encoder: what it reads.
    """

    def __init__(self, model: TextToTextModel) -> None:
        generation = model.contract.generation
        assert generation is not None and generation.encoder is not None  # else there would be no such model
        self.generation: GenerationSettings = generation
        self.encoder: EncoderSettings = generation.encoder
        self._model = model

    def answer(self, source: Sequence[int], new: int) -> Callable[[], list[int]]:
        """A run of the run time's own loop, greedy, under the rules of the checkpoint."""
        ids = np.array([list(source)], dtype=np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        start, settings = [self.encoder.start_token_ids], SamplingSettings(max_new_tokens=new)
        rules = rules_of(self.generation, min_new_tokens=new)
        model = self._model.encoder_decoder

        def run() -> list[int]:
            tokens: list[int] = []
            memory = model.encode(feeds)
            accept = partial(_accept, tokens)
            for _ in answer_tokens(model, memory, start, settings, rules, make_generators(0, 1), accept):
                pass
            return tokens

        return run

    def source(self, tokens: int) -> list[int]:
        """Token ids of real texts, one after the other, so many of them."""
        texts, _ = packaged_texts(self._model.contract)
        ids: list[int] = []
        for encoded in self._model.tokenizer.encode([str(text) for text in texts]):
            ids += encoded.ids.tolist()
        return (ids * (tokens // len(ids) + 1))[:tokens]


class ArtifactListener:
    """A compiled speech model, greedy; a :data:`~hfaccel.measure.speech_bench.Listen`.

    Args:
        model: of the artifact.

    Attributes:
        speech: what it listens to.
    """

    def __init__(self, model: SpeechModel) -> None:
        encoder = model.contract.generation.encoder if model.contract.generation is not None else None
        assert encoder is not None and encoder.speech is not None  # else there would be no such model
        self.speech: SpeechSettings = encoder.speech
        self._model = model

    def __call__(self, samples: np.ndarray) -> str:
        """From samples to text."""
        text: str = self._model.transcribe(
            samples, sampling_rate_hz=self.speech.sampling_rate_hz, num_beams=1, temperatures=0
        ).text
        return text

    def features(self, clip: Clip) -> Callable[[], None]:
        """A run that makes the features of a clip."""

        def run() -> None:
            self._model.features.of_window(clip.samples)

        return run

    def encoder(self, clip: Clip) -> Callable[[], None]:
        """A run of the encoder over the features of a clip."""
        feeds = {"input_features": self._model.features.of_window(clip.samples)[None]}

        def run() -> None:
            self._model.encoder_decoder.encode(feeds)

        return run


def _accept(tokens: list[int], _row: int, token: int) -> bool:
    tokens.append(token)
    return False

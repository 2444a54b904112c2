"""Feeds of an encoder-decoder that read a source and a given answer at once, and the answers that are given to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hfaccel.artifact.contract import Contract
from hfaccel.artifact.generation import EncoderSettings, GenerationSettings
from hfaccel.evaluate.cached_decoding import empty_past
from hfaccel.evaluate.example import Example
from hfaccel.evaluate.perplexity import Window
from hfaccel.runtime.batching import pad, plan_batches
from hfaccel.runtime.generation.rules import rooms_of, rules_of
from hfaccel.runtime.session import Runner
from hfaccel.runtime.speech.audio import load_sound
from hfaccel.runtime.speech.features import LogMelFeatures
from hfaccel.runtime.speech.prompt import heard_languages, start_tokens
from hfaccel.runtime.tokenizer import TextTokenizer

OWN_ANSWER_TOKENS = 64
"""Most tokens of an answer that the source gives itself."""
_OWN_ANSWER_BATCH = 8


@dataclass(frozen=True)
class ForcedAnswer:
    """A source with an answer to it.

    Attributes:
        example: holds the source.
        window: the tokens that the decoder reads: what it begins with, then the answer, whose tokens alone are scored.
    """

    example: Example
    window: Window


class AnswerReader:
    """Makes feeds of sources and answers, as the run time does for the compiled folder.

    Args:
        tokenizer_folder: holds ``tokenizer.json``.
        contract: of an encoder-decoder.

    Attributes:
        generation: of the contract.
        encoder: of the contract.
    """

    def __init__(self, tokenizer_folder: Path, contract: Contract) -> None:
        generation = contract.generation
        assert generation is not None
        assert generation.encoder is not None  # asked of encoder-decoders only
        self.generation: GenerationSettings = generation
        self.encoder: EncoderSettings = generation.encoder
        text = replace(contract.text, max_length=self.encoder.source_length)
        self._tokenizer = TextTokenizer(tokenizer_folder, text)
        self._features = None if self.encoder.speech is None else LogMelFeatures(self.encoder.speech)

    def can_read(self, example: Example) -> bool:
        """Whether the encoder reads the source at once: a sound that is longer than its window is read in parts.

        Raises:
            DataError: the sound cannot be read.
        """
        return self._features is None or len(self._samples(example)) <= self._features.window_samples

    def source_length(self, example: Example) -> int:
        """Tokens of a text as the encoder reads it; 0 of a sound, which always fills a window."""
        return 0 if self._features is not None else len(self._tokenizer.encode([str(example.text)])[0].ids)

    def source_feeds(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """``input_ids`` and ``attention_mask`` [batch, sequence], or ``input_features`` [batch, mel_bins, frames].

        Raises:
            DataError: a sound cannot be read.
        """
        if self._features is not None:
            features = [self._features.of_window(self._samples(example)) for example in examples]
            return {"input_features": np.stack(features)}
        encoded = self._tokenizer.encode([str(example.text) for example in examples])
        feeds = pad(encoded, self._tokenizer.settings)
        return {name: feeds[name] for name in ("input_ids", "attention_mask")}

    def answer_feeds(self, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """What the decoder reads of each row at once, padded on the right, with an empty cache."""
        width = max(map(len, rows))
        ids = np.full((len(rows), width), self.generation.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = row, 1
        positions = np.ascontiguousarray(np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape))
        named = {"decoder_input_ids": ids, "decoder_attention_mask": mask, "decoder_position_ids": positions}
        return {**named, **empty_past(len(rows), self.generation)}

    def logits(self, runner: Runner, examples: Sequence[Example], rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits [batch, decoder_sequence, vocabulary] of the tokens that follow each token of the rows."""
        return runner.run({**self.source_feeds(examples), **self.answer_feeds(rows)})["logits"]

    def answer_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of a written answer as the model would give them, the one that ends it included."""
        tokenizer = self._tokenizer.library_tokenizer
        first, ends = self.encoder.forced_first_token_id, self.generation.end_token_ids
        if self.encoder.speech is not None:  # Whisper's text begins with a blank
            ids = tuple(tokenizer.encode(" " + text.strip(), add_special_tokens=False).ids)
        elif first is not None:  # in the place of what marks a source
            ids = (first, *tokenizer.encode(text, add_special_tokens=False).ids)
        else:
            ids = tuple(tokenizer.encode(text).ids)
        return ids if not ends or (ids and ids[-1] in ends) else (*ids, ends[0])

    def starts(self, source: Runner, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """What each answer begins with; of multilingual speech models the language is the one that the source hears."""
        speech = self.encoder.speech
        if speech is None:
            return [self.encoder.start_token_ids] * len(examples)
        languages: list[str | None] = [None] * len(examples)
        if speech.languages:
            begun = [(speech.start_of_transcript_token_id,)]
            languages = [heard_languages(speech, self.logits(source, [item], begun)[:, 0])[0] for item in examples]
        return [tuple(start_tokens(speech, language=item, task="transcribe", timestamps=False)) for item in languages]

    def force(self, number: int, example: Example, start: Sequence[int], answer: Sequence[int]) -> ForcedAnswer:
        """Source and answer, cut to what the decoder reads.

        Args:
            number: of the example; no other has it.
            example: holds the source.
            start: what the answer begins with.
            answer: its tokens.
        """
        ids = (*start, *answer)[: self.generation.context_length]
        return ForcedAnswer(example, Window(ids, number, first=len(start)))

    def _samples(self, example: Example) -> np.ndarray:
        assert self.encoder.speech is not None  # asked of speech models only
        return load_sound(str(example.text), self.encoder.speech.sampling_rate_hz)


def own_answers(
    source: Runner, reader: AnswerReader, examples: Sequence[Example], starts: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """The source's own answers: always the likeliest token that its rules allow, without a cache, at most 64 tokens.

    Args:
        source: gives the logits of all tokens.
        reader: of the source's contract.
        examples: the sources.
        starts: what each answer begins with.
    """
    answers: list[tuple[int, ...]] = [()] * len(examples)
    lengths = [max(1, reader.source_length(example)) for example in examples]
    for batch in plan_batches(lengths, _OWN_ANSWER_BATCH):
        given = [examples[index] for index in batch]
        for index, answer in zip(batch, _answer_batch(source, reader, given, [starts[index] for index in batch]), strict=True):
            answers[index] = answer
    return answers


def _answer_batch(
    source: Runner, reader: AnswerReader, examples: Sequence[Example], starts: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    rules = rules_of(reader.generation)
    feeds: Mapping[str, np.ndarray] = reader.source_feeds(examples)
    rows, rooms = [list(start) for start in starts], rooms_of(starts, OWN_ANSWER_TOKENS, reader.generation.context_length)
    ended = [False] * len(rows)
    while not all(ended):
        logits = source.run({**feeds, **reader.answer_feeds(rows)})["logits"]
        last = np.stack([logits[place, len(row) - 1] for place, row in enumerate(rows)])
        new = [len(row) - len(start) for row, start in zip(rows, starts, strict=True)]
        chosen = rules.apply(last, rows, new, rooms).argmax(axis=1).tolist()
        for place, token in enumerate(chosen):
            if not ended[place]:
                rows[place].append(token)
                ended[place] = token in reader.generation.end_token_ids or new[place] + 1 >= rooms[place]
    return [tuple(row[len(start) :]) for row, start in zip(rows, starts, strict=True)]

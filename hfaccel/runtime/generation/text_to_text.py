"""A compiled encoder-decoder of text: texts in, their translations, summaries or answers out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hfaccel.artifact.contract import Contract
from hfaccel.artifact.generation import EncoderSettings, GenerationSettings
from hfaccel.errors import DataError, UsageError
from hfaccel.runtime.batching import pad, plan_batches
from hfaccel.runtime.generation.answer import Answer
from hfaccel.runtime.generation.answering import answer_tokens
from hfaccel.runtime.generation.beams import BeamSettings, search_beams
from hfaccel.runtime.generation.detokenizer import AnswerText
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.languages import find_language, language_ids, mark_source
from hfaccel.runtime.generation.memory import Memory
from hfaccel.runtime.generation.option_checks import check_batch
from hfaccel.runtime.generation.rules import TokenRules, rooms_of, rules_of
from hfaccel.runtime.generation.sampling import SamplingSettings, advised_settings, make_generators
from hfaccel.runtime.tokenizer import Encoded, TextTokenizer

_MAX_BATCH = 16
# Padding costs the encoder once; each later step costs a batch little more than a single row.
_MAX_PADDING = 0.5


@dataclass(frozen=True)
class AnswerSettings:
    """All that decides an answer.

    Attributes:
        sampling: how a token is chosen, and when an answer ends.
        beams: how many there are and how they are compared; with one of them ``sampling`` chooses.
        rules: what may be chosen.
    """

    sampling: SamplingSettings
    beams: BeamSettings
    rules: TokenRules


class TextToTextModel:
    """An encoder-decoder with its tokenizer and its contract. May be shared by threads.

    Args:
        encoder_decoder: made with ``contract.generation``.
        tokenizer_folder: holds ``tokenizer.json``, which reads the sources and writes the answers.
        contract: of a ``text2text-generation`` model.

    Attributes:
        encoder_decoder: as given.
        tokenizer: cuts sources to ``contract.generation.encoder.source_length`` tokens.
        contract: as given.
        languages: ids of the tokens of languages by their names, of translation models that have many; else empty.

    Raises:
        UsageError: the contract is of another task.
        IntegrityError: the file of the tokenizer is missing or damaged.
    """

    def __init__(self, encoder_decoder: EncoderDecoder, tokenizer_folder: Path, contract: Contract) -> None:
        generation = contract.generation
        if generation is None or generation.encoder is None or generation.encoder.speech is not None:
            raise UsageError(
                f"this model was compiled for {contract.task} and makes no text of text",
                hint="compile it with --task text2text-generation",
            )
        self.encoder_decoder = encoder_decoder
        self.contract = contract
        text = replace(contract.text, max_length=generation.encoder.source_length)
        self.tokenizer = TextTokenizer(tokenizer_folder, text)
        self._generation: GenerationSettings = generation
        self._encoder: EncoderSettings = generation.encoder
        self.languages = language_ids(self.tokenizer.library_tokenizer)

    def __call__(self, texts: str | Sequence[str]) -> Any:
        """The answer to a text, or those to several, as the checkpoint advises; see :meth:`generate`."""
        return self.generate(texts)

    def generate(
        self,
        text: str | Sequence[str],
        *,
        max_new_tokens: int = 256,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        min_new_tokens: int | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
        stop: str | Sequence[str] | None = (),
        seed: int | None = None,
        stream: bool = False,
        max_batch: int = _MAX_BATCH,
    ) -> Any:
        """Answer a text, or several.

        Options that are None are as the checkpoint advises (``contract.generation.defaults``). What they mean is told at
        :class:`~hfaccel.runtime.generation.sampling.SamplingSettings`, :class:`~hfaccel.runtime.generation.beams.BeamSettings` and
        :class:`~hfaccel.runtime.generation.rules.TokenRules`.

        Args:
            text: a text, or a list of them. What the model cannot read of a long one is cut off.
            max_new_tokens: most tokens of an answer; it also ends where the decoder's context is full.
            num_beams: beginnings of an answer that go on side by side; 1 takes one token after the other. Where tokens are drawn
                the default is 1.
            length_penalty: of beams: power of the length that scores are divided by.
            early_stopping: of beams: stop as soon as as many answers as beams have ended.
            do_sample: draw tokens; None draws where ``temperature``, ``top_k``, ``top_p`` or ``min_p`` is given.
            temperature: above 0; 0 takes the likeliest token, as ``do_sample=False`` does.
            top_k: tokens that stay in the draw.
            top_p: share of the probability that stays in the draw.
            min_p: least share, of the probability of the likeliest token, that stays in the draw.
            repetition_penalty: above 1 against repetition.
            no_repeat_ngram_size: so many tokens in a row do not come twice; 0 allows it.
            min_new_tokens: before so many tokens no answer ends.
            source_language: of translation models with many languages, what the texts are in: the name of its token, ``en_XX`` or
                ``eng_Latn``, or the code in it; None is what the checkpoint's tokenizer marks.
            target_language: what the answers shall be in, likewise; None is what the checkpoint forces
                (``forced_bos_token_id``), if anything.
            stop: texts that end an answer; it ends before them.
            seed: repeats the draws. Each text has its own, which depend on the seed and its place in the list.
            stream: give the answer in pieces while it grows; for a single text, and without beams.
            max_batch: most rows computed at once, each beam being one; texts of like length go together.

        Returns:
            The answer without special tokens: a str for one text, a list of str for several, an iterator of pieces with
            ``stream``. Pieces hold whole characters only.

        Raises:
            UsageError: an option has a value that it cannot have, or options do not go together.
            DataError: a text has no tokens or is no text.
        """
        sampling = advised_settings(
            self._generation.defaults,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
        )
        rules = rules_of(
            self._generation,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            min_new_tokens=min_new_tokens,
        )
        if target_language is not None:
            rules = replace(rules, forced_first_token_id=find_language(target_language, self.languages, option="target_language"))
        check_batch(max_batch, stream=stream)
        beams = self._beams(sampling, num_beams, length_penalty, early_stopping)
        settings = AnswerSettings(sampling, beams, rules)
        single = isinstance(text, str)
        sources = self._encode([text] if isinstance(text, str) else text)
        if source_language is not None:
            marked = find_language(source_language, self.languages, option="source_language")
            sources = [mark_source(source, marked, self.languages) for source in sources]
        if stream:
            _check_stream(len(sources), settings, single=single)
            return self._stream(sources[0], settings)
        texts = [answer.text() for answer in self._answers(sources, settings, max_batch, with_text=True)]
        return texts[0] if single else texts

    def generate_ids(self, texts: Sequence[str], settings: AnswerSettings, *, max_batch: int = _MAX_BATCH) -> list[list[int]]:
        """Token ids of the answer to each text; what the decoder begins with is not among them, the token that ended it is.

        Args:
            texts: the sources.
            settings: all that decides an answer.
            max_batch: most rows computed at once, each beam being one.

        Raises:
            DataError: a text has no tokens or is no text.
        """
        answers = self._answers(self._encode(texts), settings, max_batch, with_text=bool(settings.sampling.stop))
        return [answer.ids for answer in answers]

    def raw_outputs(self, texts: Sequence[str]) -> list[dict[str, np.ndarray]]:
        """``logits`` [vocabulary] of the first token of each answer, no rule applied, as golden files hold them."""
        sources = self._encode(texts)
        return [
            {"logits": self.encoder_decoder.prefill(self._remember([source]), self._starts(1)).logits[0]} for source in sources
        ]

    def _beams(
        self, sampling: SamplingSettings, beams: int | None, length_penalty: float | None, early_stopping: bool | None
    ) -> BeamSettings:
        defaults = self._generation.defaults
        if sampling.do_sample and beams is not None and beams > 1:
            raise UsageError(
                "beams are searched, not drawn", where="num_beams", hint="leave it out, or leave out what draws tokens"
            )
        advised = 1 if sampling.do_sample else defaults.num_beams
        return BeamSettings(
            beams=advised if beams is None else beams,
            max_new_tokens=sampling.max_new_tokens,
            length_penalty=defaults.length_penalty if length_penalty is None else length_penalty,
            early_stopping=defaults.early_stopping if early_stopping is None else early_stopping,
        )

    def _encode(self, texts: Sequence[str]) -> list[Encoded]:
        if isinstance(texts, bytes | bytearray) or not isinstance(texts, Sequence):
            raise DataError(f"a text or a list of texts is read, not {type(texts).__name__}", hint="give a text")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"a text is a str, not {type(text).__name__}", where=f"text {index}", hint="give a text")
        sources = self.tokenizer.encode(texts)
        for index, source in enumerate(sources):
            if not source.ids.size:
                raise DataError("the text has no tokens", where=f"text {index}", hint="leave empty texts out")
        return sources

    def _remember(self, sources: Sequence[Encoded]) -> Memory:
        return self.encoder_decoder.encode(pad(sources, self.tokenizer.settings))

    def _starts(self, rows: int) -> list[tuple[int, ...]]:
        return [self._encoder.start_token_ids] * rows

    def _answers(self, sources: Sequence[Encoded], settings: AnswerSettings, max_batch: int, *, with_text: bool) -> list[Answer]:
        answers = [self._answer(settings, with_text=with_text) for _ in sources]
        generators = make_generators(settings.sampling.seed, len(sources))
        together = max(1, max_batch // settings.beams.beams)
        for batch in plan_batches([source.ids.size for source in sources], together, _MAX_PADDING):
            own, given = [answers[index] for index in batch], [sources[index] for index in batch]
            if settings.beams.beams > 1:
                self._search(given, settings, own)
            else:
                for _ in self._steps(given, settings, [generators[index] for index in batch], own):
                    pass
        return answers

    def _search(self, sources: Sequence[Encoded], settings: AnswerSettings, answers: Sequence[Answer]) -> None:
        memory, starts = self._remember(sources), self._starts(len(sources))
        found = search_beams(self.encoder_decoder, memory, starts, settings.beams, settings.rules)
        for answer, ids in zip(answers, found, strict=True):
            for token in ids:
                if answer.add(token):
                    break

    def _stream(self, source: Encoded, settings: AnswerSettings) -> Iterator[str]:
        answer = self._answer(settings, with_text=True)
        with closing(self._steps([source], settings, make_generators(settings.sampling.seed, 1), [answer])) as steps:
            for _ in steps:
                if piece := answer.take():
                    yield piece
        if rest := answer.text():
            yield rest

    def _steps(
        self,
        sources: Sequence[Encoded],
        settings: AnswerSettings,
        generators: Sequence[np.random.Generator],
        answers: Sequence[Answer],
    ) -> Generator[None]:
        return answer_tokens(
            self.encoder_decoder,
            self._remember(sources),
            self._starts(len(sources)),
            settings.sampling,
            settings.rules,
            generators,
            lambda row, token: answers[row].add(token),
        )

    def _answer(self, settings: AnswerSettings, *, with_text: bool) -> Answer:
        (room,) = rooms_of(self._starts(1), settings.sampling.max_new_tokens, self._generation.context_length)
        text = AnswerText(self.tokenizer.library_tokenizer, settings.sampling.stop) if with_text else None
        return Answer(room, frozenset(self._generation.end_token_ids), text)


def _check_stream(texts: int, settings: AnswerSettings, *, single: bool) -> None:
    if not single:
        raise UsageError(
            f"only a single text can be streamed, not a list of {texts}",
            where="stream",
            hint="call generate for each of them, or without stream",
        )
    if settings.beams.beams > 1:
        raise UsageError(
            f"of {settings.beams.beams} beams the best one is known only at the end, and cannot be streamed",
            where="stream",
            hint="ask for one beam (num_beams=1), or for the answer as a whole",
        )

"""A compiled speech model: sound in, text out, with times where they are wanted."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hfaccel.artifact.contract import Contract
from hfaccel.errors import DataError, UsageError
from hfaccel.runtime.generation.beams import BeamSettings
from hfaccel.runtime.generation.detokenizer import Detokenizer
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.memory import Memory
from hfaccel.runtime.generation.option_checks import check_batch, check_count, check_flag
from hfaccel.runtime.generation.rules import rooms_of, rules_of
from hfaccel.runtime.generation.sampling import make_generators
from hfaccel.runtime.speech.audio import load_sound
from hfaccel.runtime.speech.fallback import (
    GREEDY,
    USUAL,
    FallbackSettings,
    fallback_settings,
)
from hfaccel.runtime.speech.features import LogMelFeatures
from hfaccel.runtime.speech.listening import Listening
from hfaccel.runtime.speech.prompt import SpeechTask, heard_languages, known_language, start_tokens
from hfaccel.runtime.speech.transcript import Segment, Transcript, decode_text, make_segment
from hfaccel.runtime.speech.windows import WindowAnswers
from hfaccel.runtime.tokenizer import open_tokenizer

Sound = str | Path | np.ndarray
"""Path of a sound file, or samples [samples] or [samples, channels]."""

_MAX_BATCH = 8


class SpeechModel:
    """An encoder-decoder that listens, with its tokenizer and its contract. May be shared by threads.

    Args:
        encoder_decoder: made with ``contract.generation``.
        tokenizer_folder: holds ``tokenizer.json``.
        contract: of an ``automatic-speech-recognition`` model.

    Attributes:
        encoder_decoder: as given.
        tokenizer: the ``tokenizers.Tokenizer``.
        contract: as given.
        features: how sound becomes what the encoder reads.

    Raises:
        UsageError: the contract is of another task.
        IntegrityError: the file of the tokenizer is missing or damaged.
    """

    def __init__(self, encoder_decoder: EncoderDecoder, tokenizer_folder: Path, contract: Contract) -> None:
        encoder = contract.generation.encoder if contract.generation is not None else None
        if contract.generation is None or encoder is None or encoder.speech is None:
            raise UsageError(
                f"this model was compiled for {contract.task} and reads no sound",
                hint="compile a speech model with --task automatic-speech-recognition",
            )
        self.encoder_decoder = encoder_decoder
        self.tokenizer = open_tokenizer(tokenizer_folder / "tokenizer.json")
        self.contract = contract
        self.features = LogMelFeatures(encoder.speech)
        self._generation = contract.generation
        self._speech = encoder.speech
        rules = rules_of(contract.generation)
        self._rules = replace(rules, end_token_ids=tuple({*rules.end_token_ids, encoder.speech.end_of_text_token_id}))
        self._windows = WindowAnswers(encoder_decoder, encoder.speech, self._rules)

    def __call__(self, sound: Sound | Sequence[Sound], *, sampling_rate_hz: int | None = None, timestamps: bool = False) -> Any:
        """What is said in a sound, or in several, as the checkpoint advises; see :meth:`transcribe`."""
        return self.transcribe(sound, sampling_rate_hz=sampling_rate_hz, timestamps=timestamps)

    def transcribe(
        self,
        sound: Sound | Sequence[Sound],
        *,
        sampling_rate_hz: int | None = None,
        timestamps: bool = False,
        language: str | None = None,
        task: SpeechTask = "transcribe",
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        temperatures: float | Sequence[float] | None = None,
        compression_ratio_threshold: float | None = None,
        logprob_threshold: float | None = None,
        no_speech_threshold: float | None = None,
        seed: int | None = 0,
        stream: bool = False,
        max_batch: int = _MAX_BATCH,
    ) -> Any:
        """Write down what is said in a sound, or in several.

        A sound that is longer than a window of the encoder is read window by window, always with times among the tokens: the next
        window starts where the last finished segment of this one ends (Radford et al. 2022, "Robust Speech Recognition via
        Large-Scale Weak Supervision", section 3.8, without the text of earlier windows).

        A sound of one window is answered once, with the likeliest tokens. Of longer ones an answer that repeats itself or is unlikely
        is drawn again, more freely, and a window that seems to be silent is left out: see
        :class:`~hfaccel.runtime.speech.fallback.FallbackSettings`. As soon as one of the four options of that is given they count for
        every sound, and the other three are as usual; ``temperatures=0`` alone takes the likeliest tokens of every window.

        Args:
            sound: a file, samples, or a list of these.
            sampling_rate_hz: of samples; files tell their own.
            timestamps: give segments with their times beside the text.
            language: code of what is spoken; None lets a multilingual model hear it in the first window.
            task: ``translate`` gives English text, of multilingual models.
            max_new_tokens: most tokens of a window; None, and more than there is room for, fill the decoder's context.
            num_beams: beginnings of an answer that go on side by side; None is as the checkpoint advises.
            temperatures: tried one after the other while an answer is not good enough; usually 0, 0.2, ... 1.
            compression_ratio_threshold: above it an answer repeats itself; usually 1.35.
            logprob_threshold: below it an answer is unlikely; usually -1.
            no_speech_threshold: an unlikely answer counts as silence where the model holds that for likelier; usually 0.6.
            seed: repeats the draws; each sound has its own. None draws others each time.
            stream: give the text in pieces while it grows (window by window where an answer may be tried again), or with
                ``timestamps`` each segment when it is finished; for a single sound.
            max_batch: most rows computed at once, each beam of each sound being one.

        Returns:
            A :class:`~hfaccel.runtime.speech.transcript.Transcript` for one sound, a list of them for several; with ``stream`` an
            iterator of str, or of :class:`~hfaccel.runtime.speech.transcript.Segment` with ``timestamps``.

        Raises:
            UsageError: an option has a value that it cannot have, or several sounds are to be streamed.
            DataError: a sound is missing, empty or cannot be read.
        """
        fallback = fallback_settings(temperatures, compression_ratio_threshold, logprob_threshold, no_speech_threshold)
        beams = self._beams(num_beams, max_new_tokens)
        request = self._request(sampling_rate_hz, timestamps, language, task, beams, fallback, seed)
        check_batch(max_batch, stream=stream)
        single = not isinstance(sound, list | tuple)
        sounds: list[Any] = list(sound) if isinstance(sound, list | tuple) else [sound]
        if stream and not single:
            raise UsageError(
                f"only a single sound can be streamed, not a list of {len(sounds)}",
                where="stream",
                hint="call transcribe for each of them, or without stream",
            )
        if stream:
            listening = self._listen(sounds[0], request)
            listening.generator = make_generators(seed, 1)[0]
            return self._stream_segments(listening, request) if timestamps else self._stream_text(listening, request)
        transcripts = [self._transcript(listening, request) for listening in self._listened(sounds, request, max_batch)]
        return transcripts[0] if single else transcripts

    def transcribe_ids(
        self,
        sounds: Sequence[Sound],
        *,
        sampling_rate_hz: int | None = None,
        timestamps: bool = False,
        language: str | None = None,
        task: SpeechTask = "transcribe",
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        temperatures: float | Sequence[float] | None = None,
        compression_ratio_threshold: float | None = None,
        logprob_threshold: float | None = None,
        no_speech_threshold: float | None = None,
        seed: int | None = 0,
        max_batch: int = _MAX_BATCH,
    ) -> list[list[int]]:
        """Token ids of each transcript, times among them, without the tokens that end answers; options as for :meth:`transcribe`."""
        fallback = fallback_settings(temperatures, compression_ratio_threshold, logprob_threshold, no_speech_threshold)
        beams = self._beams(num_beams, max_new_tokens)
        request = self._request(sampling_rate_hz, timestamps, language, task, beams, fallback, seed)
        return [listening.token_ids for listening in self._listened(sounds, request, max_batch)]

    def raw_outputs(self, sounds: Sequence[Sound | float], *, sampling_rate_hz: int | None = None) -> list[dict[str, np.ndarray]]:
        """``logits`` [vocabulary] of the token that follows ``start_of_transcript`` in the first window of each sound.

        Args:
            sounds: as for :meth:`transcribe`; a number is a second of a tone of so many Hz, as golden files hold them.
            sampling_rate_hz: of samples.
        """
        own_rate_hz = self._speech.sampling_rate_hz
        request = self._request(sampling_rate_hz, False, None, "transcribe", self._beams(1, 1), GREEDY, 0)
        tones = replace(request, sampling_rate_hz=own_rate_hz)
        windows = (
            self._listen(tone(sound, own_rate_hz), tones).window_features()
            if isinstance(sound, float)
            else self._listen(sound, request).window_features()
            for sound in sounds
        )
        memories = (self.encoder_decoder.encode({"input_features": window[None]}) for window in windows)
        return [{"logits": self._windows.first_logits(memory)[0]} for memory in memories]

    def _request(
        self,
        sampling_rate_hz: int | None,
        timestamps: bool,
        language: str | None,
        task: SpeechTask,
        beams: BeamSettings,
        fallback: FallbackSettings | None,
        seed: int | None,
    ) -> _Request:
        code = None if language is None else known_language(self._speech, language)
        check_flag("timestamps", timestamps, "True gives segments with their times; there are none of words")
        # What the model cannot do is said before a sound is read.
        start_tokens(self._speech, language=code, task=task, timestamps=timestamps)
        if seed is not None:
            check_count("seed", seed, 0, "give a whole number, or None for another draw each time")
        return _Request(sampling_rate_hz, timestamps, code, task, beams, fallback, seed)

    def _beams(self, num_beams: int | None, max_new_tokens: int | None) -> BeamSettings:
        defaults = self._generation.defaults
        return BeamSettings(
            beams=defaults.num_beams if num_beams is None else num_beams,
            max_new_tokens=self._generation.context_length if max_new_tokens is None else max_new_tokens,
            length_penalty=defaults.length_penalty,
            early_stopping=defaults.early_stopping,
        )

    def _listen(self, sound: Sound, request: _Request) -> Listening:
        if not isinstance(sound, str | Path | np.ndarray):
            raise DataError(
                f"a sound is a path or an array, not {type(sound).__name__}",
                hint="give a path, or samples as a numpy array; or a list of these",
            )
        samples = load_sound(sound, self._speech.sampling_rate_hz, array_rate_hz=request.sampling_rate_hz)
        listening = Listening(samples, self.features, self._speech, self._rules.end_token_ids, timestamps=request.timestamps)
        listening.language = request.language
        listening.fallback = request.fallback or (USUAL if listening.long else GREEDY)
        return listening

    def _listened(self, sounds: Sequence[Sound], request: _Request, max_batch: int) -> Iterator[Listening]:
        """Each sound read to its end, in order; not more of them are in memory than go together."""
        together = max(1, max_batch // request.beams.beams)
        generators = make_generators(request.seed, len(sounds))
        for first in range(0, len(sounds), together):
            batch = [self._listen(sound, request) for sound in sounds[first : first + together]]
            for listening, generator in zip(batch, generators[first:], strict=False):
                listening.generator = generator
            for _ in self._steps(batch, request):
                pass
            yield from batch

    def _steps(self, listenings: Sequence[Listening], request: _Request) -> Generator[None]:
        """Read every window of a batch of sounds; yields after every token and after every window."""
        while waiting := [listening for listening in listenings if not listening.done]:
            alike = (waiting[0].timed, waiting[0].fallback)
            active = [listening for listening in waiting if (listening.timed, listening.fallback) == alike]
            memory = self.encoder_decoder.encode({"input_features": np.stack([item.window_features() for item in active])})
            self._hear_languages(memory, active)
            rows = [
                start_tokens(self._speech, language=item.language, task=request.task, timestamps=item.timed) for item in active
            ]
            rooms = rooms_of(rows, request.beams.max_new_tokens, self._generation.context_length)
            for listening, room in zip(active, rooms, strict=True):
                listening.next_window(room)
            yield from self._windows.answer(memory, rows, active, request.beams)
            for listening in active:
                listening.end_window()
            yield

    def _hear_languages(self, memory: Memory, active: Sequence[Listening]) -> None:
        if not self._speech.languages or all(listening.language is not None for listening in active):
            return
        heard = heard_languages(self._speech, self._windows.first_logits(memory))
        for listening, language in zip(active, heard, strict=True):
            listening.language = listening.language or language

    def _transcript(self, listening: Listening, request: _Request) -> Transcript:
        text = decode_text(self.tokenizer, listening.take_text_ids())
        segments = [make_segment(self.tokenizer, segment) for segment in listening.segments] if request.timestamps else []
        return Transcript(text, tuple(segment for segment in segments if segment is not None), listening.language)

    def _stream_text(self, listening: Listening, request: _Request) -> Iterator[str]:
        detokenizer = Detokenizer(self.tokenizer)
        begun = False
        with closing(self._steps([listening], request)) as steps:
            for _ in steps:
                piece = "".join(map(detokenizer.push, listening.take_text_ids()))
                if piece := (piece if begun else piece.lstrip()):
                    begun = True
                    yield piece
        if rest := detokenizer.finish():
            yield rest if begun else rest.lstrip()

    def _stream_segments(self, listening: Listening, request: _Request) -> Iterator[Segment]:
        given = 0
        with closing(self._steps([listening], request)) as steps:
            for _ in steps:
                fresh, given = listening.segments[given:], len(listening.segments)
                for segment in fresh:
                    if (worded := make_segment(self.tokenizer, segment)) is not None:
                        yield worded


def tone(frequency_hz: float, sampling_rate_hz: int) -> np.ndarray:
    """A second of a sine, float32 [samples]."""
    seconds = np.arange(sampling_rate_hz, dtype=np.float64) / sampling_rate_hz
    return (0.1 * np.sin(2 * np.pi * frequency_hz * seconds)).astype(np.float32)


@dataclass(frozen=True)
class _Request:
    """The options of one call, checked."""

    sampling_rate_hz: int | None
    timestamps: bool
    language: str | None
    task: SpeechTask
    beams: BeamSettings
    fallback: FallbackSettings | None
    seed: int | None

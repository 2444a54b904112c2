"""Answers to windows of sounds: told while they grow, or judged first and tried again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

import numpy as np

from hfaccel.artifact.generation import SpeechSettings
from hfaccel.runtime.generation.answering import answer_tokens
from hfaccel.runtime.generation.beams import BeamSettings, score_beams
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.memory import Memory
from hfaccel.runtime.generation.rules import Hook, TokenRules
from hfaccel.runtime.generation.sampling import SamplingSettings, make_generators
from hfaccel.runtime.speech.fallback import Attempt, ScoredAnswers, judge, no_speech_probabilities
from hfaccel.runtime.speech.listening import Listening
from hfaccel.runtime.speech.timestamps import allow_timestamps


class WindowAnswers:
    """Answers one window of each sound of a batch. May be shared by threads.

    Args:
        model: reads and answers.
        speech: settings of the model.
        rules: which tokens it may choose.
    """

    def __init__(self, model: EncoderDecoder, speech: SpeechSettings, rules: TokenRules) -> None:
        self._model = model
        self._speech = speech
        self._rules = rules

    def answer(
        self, memory: Memory, rows: Sequence[Sequence[int]], active: Sequence[Listening], beams: BeamSettings
    ) -> Generator[None]:
        """Answer one window of each sound; yields after every token where the answer is told while it grows.

        Args:
            memory: of the windows.
            rows: what each answer is asked for with.
            active: the sounds, alike in whether they have times and in what answers are judged by; they take the answers.
            beams: how to search, where nothing is drawn.
        """
        if active[0].fallback.judges:
            self._judge(memory, rows, active, beams)
            return
        if beams.beams > 1:
            for listening, attempt in zip(active, self._attempt(memory, rows, active, beams, 0.0), strict=True):
                listening.take(attempt.ids)
            return
        yield from answer_tokens(
            self._model,
            memory,
            rows,
            SamplingSettings(max_new_tokens=beams.max_new_tokens),
            self._rules,
            make_generators(0, len(rows)),
            lambda row, token: active[row].add(token),
            self._hook(active),
        )

    def _judge(self, memory: Memory, rows: Sequence[Sequence[int]], active: Sequence[Listening], beams: BeamSettings) -> None:
        """Answer one window of each sound, at the next temperature those whose answer is not good enough."""
        settings, silence = active[0].fallback, _Silence(self, memory)
        waiting = list(range(len(active)))
        for number, temperature in enumerate(settings.temperatures, start=1):
            left = [active[place] for place in waiting]
            attempts = self._attempt(memory.select(waiting), [rows[place] for place in waiting], left, beams, temperature)
            refused = []
            for place, listening, attempt in zip(waiting, left, attempts, strict=True):
                verdict = judge(
                    attempt, partial(silence.of_row, place), settings, vocabulary=self._model.settings.vocabulary_size
                )
                if verdict == "silence":
                    listening.leave_out_window()
                elif verdict == "good" or number == len(settings.temperatures):
                    listening.take(attempt.ids)
                else:
                    refused.append(place)
            waiting = refused
            if not waiting:
                return

    def _attempt(
        self,
        memory: Memory,
        rows: Sequence[Sequence[int]],
        active: Sequence[Listening],
        beams: BeamSettings,
        temperature: float,
    ) -> list[Attempt]:
        """An answer to one window of each sound; beams are searched only where nothing is drawn."""
        if temperature == 0 and beams.beams > 1:
            found = score_beams(self._model, memory, rows, beams, self._rules, self._hook(active))
            return [Attempt(tuple(ids), score) for ids, score in found]
        draws = SamplingSettings(beams.max_new_tokens, do_sample=temperature > 0, temperature=temperature or 1.0)
        scored = ScoredAnswers(len(rows), self._hook(active))
        generators = [listening.generator for listening in active]
        steps = answer_tokens(self._model, memory, rows, draws, self._rules, generators, scored.accept, scored.hook)
        for _ in steps:
            pass
        return scored.attempts()

    def _hook(self, active: Sequence[Listening]) -> Hook | None:
        return (lambda new, logits: allow_timestamps(logits, new, self._speech)) if active[0].timed else None

    def first_logits(self, memory: Memory) -> np.ndarray:
        """Logits [batch, vocabulary] of the token that follows ``start_of_transcript``."""
        rows = [[self._speech.start_of_transcript_token_id]] * memory.batch
        return self._model.prefill(memory, rows, room=0).logits

    def no_speech_probabilities(self, memory: Memory) -> np.ndarray:
        """How likely the model holds each window for silent, float32 [batch]."""
        return no_speech_probabilities(self.first_logits(memory), self._speech.no_timestamps_token_id)


class _Silence:
    """How likely each window of a batch is silent; computed once, and only where it is asked for."""

    def __init__(self, windows: WindowAnswers, memory: Memory) -> None:
        self._windows = windows
        self._memory = memory
        self._found: np.ndarray | None = None

    def of_row(self, row: int) -> float:
        if self._found is None:
            self._found = self._windows.no_speech_probabilities(self._memory)
        return float(self._found[row])

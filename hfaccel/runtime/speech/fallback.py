"""When a window is answered again, more freely, and when it is taken for silence.

Greedy answers sometimes run in circles or lose the thread, and a window without speech is answered too. So OpenAI's ``transcribe``
(Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 4.5) looks at each answer and, where it
repeats itself or is unlikely, draws another one at a higher temperature. The arithmetic is that of ``_need_fallback`` in
transformers' ``generation_whisper.py``, version 5; its compression ratio is of token ids, not of text as OpenAI's, hence other
usual thresholds.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hfaccel.runtime.generation.option_checks import Range, check, check_number
from hfaccel.runtime.generation.rules import Hook

Verdict = Literal["good", "retry", "silence"]

USUAL_TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
USUAL_COMPRESSION_RATIO = 1.35
USUAL_LOGPROB = -1.0
USUAL_NO_SPEECH = 0.6
_NOT_BELOW_ZERO = Range("from 0 on", 0, sys.float_info.max)
_ANY = Range("or infinity", -math.inf, math.inf)


@dataclass(frozen=True)
class FallbackSettings:
    """What is tried, and what makes an answer good enough.

    Attributes:
        temperatures: one after the other, until an answer is good; 0 takes the likeliest token, or searches beams. The last one's
            answer stays whatever it is.
        compression_ratio_threshold: an answer whose token ids zlib makes smaller than by this factor repeats itself; None: may.
        logprob_threshold: an answer whose mean logarithmic probability per token is below is unlikely; None: may be.
        no_speech_threshold: an unlikely answer where the model holds silence for likelier than this is dropped, and nothing more is
            tried; None: never. It needs ``logprob_threshold``.

    Raises:
        UsageError: a value that its option cannot have.
    """

    temperatures: tuple[float, ...] = (0.0,)
    compression_ratio_threshold: float | None = None
    logprob_threshold: float | None = None
    no_speech_threshold: float | None = None

    def __post_init__(self) -> None:
        good = len(self.temperatures) > 0
        check("temperatures", self.temperatures, good, "must be one number or several", "0 takes the likeliest tokens")
        for value in self.temperatures:
            check_number("temperatures", value, _NOT_BELOW_ZERO, "0 takes the likeliest tokens, 1 draws as the model says")
        for name in ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"):
            if (limit := getattr(self, name)) is not None:
                check_number(name, limit, _ANY, "leave it out for the usual value")

    @property
    def judges(self) -> bool:
        """Whether an answer may be refused, or was drawn; else it is the greedy one and can be told while it grows."""
        limits = (self.compression_ratio_threshold, self.logprob_threshold, self.no_speech_threshold)
        return self.temperatures != (0.0,) or any(limit is not None for limit in limits)


GREEDY = FallbackSettings()
USUAL = FallbackSettings(USUAL_TEMPERATURES, USUAL_COMPRESSION_RATIO, USUAL_LOGPROB, USUAL_NO_SPEECH)


def fallback_settings(
    temperatures: float | Sequence[float] | None,
    compression_ratio_threshold: float | None,
    logprob_threshold: float | None,
    no_speech_threshold: float | None,
) -> FallbackSettings | None:
    """The settings that options of a call ask for; None where none of them was given.

    What is None is as usual (temperatures 0, 0.2, ... 1; 1.35; -1; 0.6), but for thresholds where a single temperature was given.

    Raises:
        UsageError: a value that its option cannot have.
    """
    limits = (compression_ratio_threshold, logprob_threshold, no_speech_threshold)
    if temperatures is None and all(limit is None for limit in limits):
        return None
    several = USUAL_TEMPERATURES if temperatures is None else temperatures
    tried = tuple(several) if isinstance(several, Iterable) else (several,)
    ratio, logprob, silence = (
        usual if len(tried) > 1 else None for usual in (USUAL_COMPRESSION_RATIO, USUAL_LOGPROB, USUAL_NO_SPEECH)
    )
    if no_speech_threshold is not None:
        logprob = USUAL_LOGPROB  # silence is looked for in unlikely answers only
    return FallbackSettings(
        tried,
        ratio if compression_ratio_threshold is None else compression_ratio_threshold,
        logprob if logprob_threshold is None else logprob_threshold,
        silence if no_speech_threshold is None else no_speech_threshold,
    )


@dataclass(frozen=True)
class Attempt:
    """An answer to a window.

    Attributes:
        ids: its new tokens, the one that ended it included.
        logprob: mean logarithmic probability of these, before a temperature changed them; of beams their score.
    """

    ids: tuple[int, ...]
    logprob: float


def judge(
    attempt: Attempt, no_speech_probability: Callable[[], float], settings: FallbackSettings, *, vocabulary: int
) -> Verdict:
    """Whether an answer is good enough.

    Args:
        attempt: the answer.
        no_speech_probability: how likely the model holds silence; asked only where that decides.
        settings: the thresholds.
        vocabulary: tokens of the model.
    """
    ratio, logprob, silence = settings.compression_ratio_threshold, settings.logprob_threshold, settings.no_speech_threshold
    unlikely = logprob is not None and attempt.logprob < logprob
    if unlikely and silence is not None and no_speech_probability() > silence:
        return "silence"
    repeats = ratio is not None and compression_ratio(attempt.ids, vocabulary) > ratio
    return "retry" if repeats or unlikely else "good"


def compression_ratio(ids: Sequence[int], vocabulary: int) -> float:
    """Bytes of token ids / bytes that zlib makes of them: high where tokens repeat.

    Args:
        ids: of an answer.
        vocabulary: tokens of the model; each is written with as many bytes as its logarithm to the base 256 has, and one more.
    """
    width = int(math.log2(vocabulary) / 8) + 1
    written = b"".join(token.to_bytes(width, "little") for token in ids)
    return len(written) / len(zlib.compress(written))


def no_speech_probabilities(logits: np.ndarray, no_timestamps_token_id: int) -> np.ndarray:
    """How likely silence is [batch]: the token before ``no_timestamps`` says it, as transformers has it.

    Args:
        logits: float32 [batch, vocabulary], of the token that follows ``start_of_transcript``.
        no_timestamps_token_id: of the model.
    """
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = chances[:, no_timestamps_token_id - 1] / chances.sum(axis=1)
    return probabilities


class ScoredAnswers:
    """Takes the tokens of a batch, with how likely each of them was.

    Args:
        rows: of the batch.
        rules: applied to the logits before a token is chosen; or None.
    """

    def __init__(self, rows: int, rules: Hook | None) -> None:
        self._rules = rules
        self._ids: list[list[int]] = [[] for _ in range(rows)]
        self._sums = [0.0] * rows
        self._waiting: list[np.ndarray] = []

    def hook(self, new: Sequence[Sequence[int]], logits: np.ndarray) -> np.ndarray:
        """The logits behind the rules; the next tokens are chosen from them."""
        ruled = logits if self._rules is None else self._rules(new, logits)
        self._waiting = list(ruled[::-1])
        return ruled

    def accept(self, row: int, token: int) -> bool:
        """Take a token, in the order of the logits; it ends no answer that has not ended."""
        logits = self._waiting.pop()
        loudest = float(logits.max())
        self._sums[row] += float(logits[token]) - loudest - math.log(float(np.exp(logits - loudest).sum()))
        self._ids[row].append(token)
        return False

    def attempts(self) -> list[Attempt]:
        """The answers, once all have ended."""
        return [Attempt(tuple(ids), total / max(len(ids), 1)) for ids, total in zip(self._ids, self._sums, strict=True)]

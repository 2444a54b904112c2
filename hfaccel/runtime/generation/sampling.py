"""How the next token is chosen from the logits: the penalties and filters of transformers, in its order, and the draw.

Logits are float32 [batch, vocabulary]. A token that a filter leaves out gets minus infinity. No function changes what it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hfaccel.artifact.generation import GenerationDefaults
from hfaccel.runtime.generation.option_checks import ABOVE_ZERO, Range, check, check_count, check_flag, check_number

PROMPT_LOOKUP_NUM_TOKENS = 8
"""Guesses in a step at most; how many pay is decided step by step, and they are rarely more than five."""
_NEVER = np.float32(-np.inf)


@dataclass(frozen=True)
class SamplingSettings:
    """How an answer is chosen, and when it ends.

    Attributes:
        max_new_tokens: most tokens of the answer.
        do_sample: draw from the probabilities; else the most likely token is taken, and only ``repetition_penalty`` counts of the
            numbers below.
        temperature: divides the logits: below 1 the likely become likelier.
        top_k: tokens that stay in the draw, the likeliest first; 0 keeps all.
        top_p: the likeliest tokens stay that hold this share of the probability together; 1 keeps all.
        min_p: tokens stay that have at least this share of the probability of the likeliest; 0 keeps all.
        repetition_penalty: above 1 makes tokens less likely that the prompt or the answer has already.
        seed: repeats the draws; None draws new ones each time.
        stop: texts that end the answer; it ends before them.
        prompt_lookup_num_tokens: most tokens that a row which is alone guesses in a step; 0 guesses none. What that changes
            is told at :mod:`hfaccel.runtime.generation.lookahead`.

    Raises:
        UsageError: a value that its option cannot have.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    prompt_lookup_num_tokens: int = PROMPT_LOOKUP_NUM_TOKENS

    def __post_init__(self) -> None:
        check_count("max_new_tokens", self.max_new_tokens, 1, "give how many tokens the answer may have at most")
        check_count("top_k", self.top_k, 0, "give how many of the likeliest tokens stay, or 0 for all")
        check_count(
            "prompt_lookup_num_tokens", self.prompt_lookup_num_tokens, 0, "give how many tokens are guessed at most, or 0"
        )
        if self.seed is not None:
            check_count("seed", self.seed, 0, "give a whole number, or None for another draw each time")
        check_flag("do_sample", self.do_sample, "True draws tokens, False takes the likeliest")
        check_number("temperature", self.temperature, ABOVE_ZERO, "0 takes the likeliest token; to draw give more")
        check_number("top_p", self.top_p, Range("above 0 and at most 1", 0, 1, low_counts=False), "1 keeps every token")
        check_number("min_p", self.min_p, Range("from 0 to 1", 0, 1), "0 keeps every token")
        check_number("repetition_penalty", self.repetition_penalty, ABOVE_ZERO, "1 changes nothing, 1.1 is usual")
        for text in self.stop:
            check(
                "stop", text, isinstance(text, str) and text != "", "must be a text with at least one character", "leave it out"
            )


def advised_settings(
    defaults: GenerationDefaults,
    *,
    max_new_tokens: int,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = (),
    prompt_lookup_num_tokens: int = PROMPT_LOOKUP_NUM_TOKENS,
) -> SamplingSettings:
    """Settings in which everything that is None is as the checkpoint advises. See :class:`SamplingSettings` for what they mean.

    Args:
        defaults: of the checkpoint.
        max_new_tokens: most tokens of the answer.
        do_sample: None draws where ``temperature``, ``top_k``, ``top_p`` or ``min_p`` is given.
        temperature: 0 takes the likeliest token, as ``do_sample=False`` does.
        top_k: tokens that stay in the draw.
        top_p: share of the probability that stays in the draw.
        min_p: least share, of the probability of the likeliest token, that stays in the draw.
        repetition_penalty: above 1 against repetition.
        seed: repeats the draws.
        stop: one text or several that end the answer; None is none.
        prompt_lookup_num_tokens: most guesses in a step; 0 is none.

    Raises:
        UsageError: a value that its option cannot have.
    """
    greedy = isinstance(temperature, int | float | np.floating) and not isinstance(temperature, bool) and temperature == 0
    if greedy and not do_sample:
        temperature, do_sample = None, False
    given = any(value is not None for value in (temperature, top_k, top_p, min_p))
    return SamplingSettings(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample if do_sample is not None else given or defaults.do_sample,
        temperature=defaults.temperature if temperature is None else temperature,
        top_k=defaults.top_k if top_k is None else top_k,
        top_p=defaults.top_p if top_p is None else top_p,
        min_p=defaults.min_p if min_p is None else min_p,
        repetition_penalty=defaults.repetition_penalty if repetition_penalty is None else repetition_penalty,
        seed=seed,
        stop=_stop_strings(stop),
        prompt_lookup_num_tokens=prompt_lookup_num_tokens,
    )


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(stop, str):
        return (stop,)
    check("stop", stop, stop is None or isinstance(stop, Iterable), "must be a text or a list of texts", "leave it out")
    return tuple(stop or ())


def make_generators(seed: int | None, rows: int) -> list[np.random.Generator]:
    """A source of draws for each row, made of the seed and the row's index alone: neighbours change nothing."""
    return [np.random.default_rng(own) for own in np.random.SeedSequence(seed).spawn(rows)]


def penalize_repetition(logits: np.ndarray, seen_ids_per_row: Sequence[Sequence[int]], penalty: float) -> np.ndarray:
    """Divide positive logits of the tokens that a row has seen by the penalty, and multiply negative ones.

    Args:
        logits: float32 [batch, vocabulary].
        seen_ids_per_row: token ids of each row, prompt and answer; one that comes twice counts once.
        penalty: above 0.
    """
    penalized = logits.copy()
    for row, seen in zip(penalized, seen_ids_per_row, strict=True):
        ids = np.unique(np.asarray(seen, dtype=np.int64))
        scores = row[ids]
        row[ids] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return penalized


def apply_temperature(logits: np.ndarray, temperature: float) -> np.ndarray:
    """The logits divided by the temperature."""
    return logits / np.float32(temperature)


def keep_top_k(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Leave out what is less likely than the k-th likeliest token of its row; those level with it stay."""
    kept = min(top_k, logits.shape[1])
    threshold = np.partition(logits, -kept, axis=1)[:, -kept, None]
    return np.where(logits < threshold, _NEVER, logits)


def keep_top_p(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Leave out the least likely tokens whose probabilities add up to at most ``1 - top_p``; the likeliest always stays."""
    probabilities = _softmax(logits)
    spare = 1 - top_p
    # All tokens below this share together hold no more than the spare: they go, and only the others need sorting.
    floor = spare / logits.shape[1]
    filtered = logits.copy()
    for row, chances in zip(filtered, probabilities, strict=True):
        candidates = np.flatnonzero(chances > floor)
        order = candidates[np.argsort(row[candidates], kind="stable")]
        before = chances.sum(dtype=np.float64) - chances[order].sum(dtype=np.float64)
        gone = (before + np.cumsum(chances[order], dtype=np.float64)).astype(np.float32) <= np.float32(spare)
        gone[-1] = False
        kept = order[~gone]
        scores = row[kept]
        row.fill(_NEVER)
        row[kept] = scores
    return filtered


def keep_min_p(logits: np.ndarray, min_p: float) -> np.ndarray:
    """Leave out what is less likely than ``min_p`` times the likeliest token of its row."""
    probabilities = _softmax(logits)
    threshold = np.float32(min_p) * probabilities.max(axis=1, keepdims=True)
    return np.where(probabilities < threshold, _NEVER, logits)


def choose(
    logits: np.ndarray,
    seen_ids_per_row: Sequence[Sequence[int]],
    settings: SamplingSettings,
    generators: Sequence[np.random.Generator],
) -> np.ndarray:
    """The next token of each row.

    Args:
        logits: float32 [batch, vocabulary].
        seen_ids_per_row: token ids of each row, prompt and answer.
        settings: how to choose.
        generators: one per row, see :func:`make_generators`; each gives one number for a draw, and none where nothing is drawn.

    Returns:
        int64 [batch].
    """
    if settings.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen_ids_per_row, settings.repetition_penalty)
    return take(logits, settings, generators)


def take(logits: np.ndarray, settings: SamplingSettings, generators: Sequence[np.random.Generator]) -> np.ndarray:
    """The next token of each row, of logits that are penalized already.

    Args:
        logits: float32 [batch, vocabulary].
        settings: how to choose; its ``repetition_penalty`` is not looked at.
        generators: as of :func:`choose`.

    Returns:
        int64 [batch].
    """
    if not settings.do_sample:
        return np.asarray(logits.argmax(axis=1), dtype=np.int64)
    if settings.temperature != 1:
        logits = apply_temperature(logits, settings.temperature)
    if settings.top_k > 0:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p > 0:
        logits = keep_min_p(logits, settings.min_p)
    return np.array([_draw(row, generator) for row, generator in zip(logits, generators, strict=True)], dtype=np.int64)


def _draw(logits: np.ndarray, generator: np.random.Generator) -> int:
    candidates = np.flatnonzero(logits > _NEVER)
    scores = logits[candidates].astype(np.float64)
    cumulative = np.cumsum(np.exp(scores - scores.max()))
    # Rounding may put the number on the upper end, which is nobody's.
    position = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(candidates[min(int(position), candidates.size - 1)])


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: np.ndarray = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities

"""Timing that can be trusted on a machine that others use too: interleaved rounds, stable windows, paired bounds.

What is compared runs in turn (A B C, B C A, ...), so that a slow phase of the machine hits all alike; the comparison pairs the
samples of one round.

An onnxruntime session whose worker threads spin after a run takes cores away from whoever runs next: for 40 ms, which made
runs of 10 ms take 17. Open sessions that are compared with ``spin_after_run=False``, or let ``pause_s`` pass. The pause is
spent awake: after 60 ms of sleep a run of 2 ms was seen to take 6.

A short run pays for what ran before it: cold caches, worker threads that fell asleep (2.9 ms became 4.0 with openvino). With
``settle_s`` each turn begins with runs that do not count, so that a sample is what a server under load would see.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

MIN_ROUNDS = 7
SETTLE_S = 0.01
"""What compares engines lets runs shorter than this warm up that long in each turn."""
PATIENCE = 4.0
"""What must be right may take this many times its seconds while a timing is not stable: a busy spell of the machine passes."""

_WINDOWS = 5
_WINDOWS_JUDGED = 3
_SMALLEST_WINDOW = 2
_STABLE_WITHIN = 0.10
_MILLISECONDS = 1000.0
_RESAMPLES = 2000
_CONFIDENCE = 0.95
_MOST_SETTLING_RUNS = 50


@dataclass(frozen=True)
class Timing:
    """The samples of one runner in milliseconds, in round order: sample ``i`` of all runners of one call belong together.

    Percentiles and comparisons are of the last three of five windows: what came before is taken for settling in.
    """

    samples_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples_ms:
            raise ValueError("a timing needs at least one sample")

    @property
    def p50(self) -> float:
        """Median in milliseconds."""
        return float(np.percentile(self.settled_ms, 50))

    @property
    def p95(self) -> float:
        """95th percentile in milliseconds."""
        return float(np.percentile(self.settled_ms, 95))

    @property
    def p99(self) -> float:
        """99th percentile in milliseconds."""
        return float(np.percentile(self.settled_ms, 99))

    @property
    def stable(self) -> bool:
        """Whether the medians of the last three windows (of a fifth of the samples each) lie within 10 % of their mean.

        Fewer than six samples are never stable.
        """
        return _agree(self.window_medians_ms())

    @property
    def settled_ms(self) -> np.ndarray:
        """The samples of the last three windows; all of them when there are fewer than six."""
        return np.asarray(self.samples_ms[-self._window_size * _WINDOWS_JUDGED :])

    @property
    def _window_size(self) -> int:
        return max(_SMALLEST_WINDOW, len(self.samples_ms) // _WINDOWS)

    def window_medians_ms(self) -> np.ndarray:
        """Medians of the last three windows; empty when there are fewer than six samples."""
        if len(self.samples_ms) < self._window_size * _WINDOWS_JUDGED:
            return np.empty(0)
        return np.asarray(np.median(self.settled_ms.reshape(_WINDOWS_JUDGED, self._window_size), axis=1))


def _agree(values: np.ndarray) -> bool:
    """Whether there are values and all lie within 10 % of their mean."""
    return values.size > 0 and bool(np.all(np.abs(values - values.mean()) <= _STABLE_WITHIN * values.mean()))


@dataclass(frozen=True)
class Speedup:
    """How many times faster the candidate is than its parent (above 1: faster).

    Attributes:
        ratio: median of the parent over median of the candidate.
        lower_bound: one-sided 95 % bootstrap bound; above 1 the candidate is faster.
        upper_bound: the same on the other side; below 1 the candidate is slower.
        stable: whether the ratio was the same in the last three windows (to 10 %); one that was not is no result. What slows
            both sides alike, as a busy neighbour does, leaves the ratio stable though neither time is.
    """

    ratio: float
    lower_bound: float
    upper_bound: float
    stable: bool


def stay_awake(seconds: float) -> None:
    """Let time pass without letting the core go to sleep."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def interleaved(
    runners: Mapping[str, Callable[[], None]],
    *,
    seconds: float,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = 400,
    warmup_rounds: int = 2,
    pause_s: float = 0.0,
    settle_s: float = 0.0,
    patience: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = stay_awake,
) -> dict[str, Timing]:
    """Time runners against each other, one sample of each per round; the order rotates from round to round.

    Args:
        runners: name -> one run.
        seconds: time budget for all runners together, warm-up not counted.
        min_rounds: rounds made even when they exceed the budget.
        max_rounds: rounds after which to stop even inside the budget.
        warmup_rounds: rounds before the first that counts.
        patience: how many times ``seconds`` (and ``max_rounds``) may be used up while a runner is not stable yet.
        pause_s: sleep before each sample, so that spinning threads of the previous runner come to rest.
        settle_s: a runner whose runs are shorter than this runs that long, uncounted, before each sample.
        clock: seconds, rising.
        sleep: how to pause.

    Returns:
        Name -> timing, in the order of ``runners``; all have the same number of samples.

    Raises:
        ValueError: no runner, or rounds that make no sense.
    """
    if not runners:
        raise ValueError("nothing to time")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"min_rounds {min_rounds} must lie between 1 and max_rounds {max_rounds}")
    names = list(runners)
    last_s = dict.fromkeys(names, math.inf)
    for _ in range(warmup_rounds):
        for name in names:
            last_s[name] = _seconds_of(runners[name], clock)
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = clock()
    for round_index in range(int(max_rounds * patience)):
        used_up = round_index >= max_rounds or (round_index >= min_rounds and clock() - started >= seconds)
        out_of_patience = round_index >= min_rounds and clock() - started >= seconds * patience
        if out_of_patience or (used_up and all(Timing(tuple(values)).stable for values in samples.values())):
            break
        first = round_index % len(names)
        for name in names[first:] + names[:first]:
            if pause_s > 0:
                sleep(pause_s)
            for _ in range(_settling_runs(last_s[name], settle_s)):
                runners[name]()
            last_s[name] = _seconds_of(runners[name], clock)
            samples[name].append(last_s[name] * _MILLISECONDS)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _settling_runs(run_s: float, settle_s: float) -> int:
    """How many runs fill ``settle_s``; none if one run is longer."""
    return 0 if run_s >= settle_s else min(_MOST_SETTLING_RUNS, math.ceil(settle_s / max(run_s, 1e-9)))


def _seconds_of(run: Callable[[], None], clock: Callable[[], float]) -> float:
    before = clock()
    run()
    return clock() - before


def milliseconds_of(run: Callable[[], None]) -> float:
    """Of one run, now."""
    return _seconds_of(run, time.perf_counter) * _MILLISECONDS


def compare(parent: Timing, candidate: Timing, *, seed: int = 0) -> Speedup:
    """The speed-up of ``candidate`` over ``parent``, both from one call of :func:`interleaved`.

    The bootstrap draws rounds, not samples: what disturbed a round disturbs both sides of it.

    Raises:
        ValueError: the timings have different numbers of rounds, so they cannot be paired.
    """
    if len(parent.samples_ms) != len(candidate.samples_ms):
        raise ValueError(f"timings of {len(parent.samples_ms)} and {len(candidate.samples_ms)} rounds cannot be paired")
    parents, candidates = parent.settled_ms, candidate.settled_ms
    rounds = len(parents)
    drawn = np.random.default_rng(seed).integers(0, rounds, (_RESAMPLES, rounds))
    ratios = np.median(parents[drawn], axis=1) / np.median(candidates[drawn], axis=1)
    return Speedup(
        ratio=parent.p50 / candidate.p50,
        lower_bound=float(np.quantile(ratios, 1.0 - _CONFIDENCE)),
        upper_bound=float(np.quantile(ratios, _CONFIDENCE)),
        stable=_agree(parent.window_medians_ms() / candidate.window_medians_ms()),
    )

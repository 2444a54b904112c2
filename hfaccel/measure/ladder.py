"""The way from an out-of-box deployment to the artifact: one time per step for the same request, and what each step brings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfaccel.measure.bench import NOT_STABLE, PAUSE_S
from hfaccel.measure.generation_bench import speedup_json
from hfaccel.measure.timing import MIN_ROUNDS, PATIENCE, SETTLE_S, Speedup, Timing, compare, interleaved, stay_awake

COLUMNS = ("step", "what", "time", "tokens/s", "factor", "total")
_MILLISECONDS = 1000.0


@dataclass(frozen=True)
class Share:
    """Work of a request that is timed by itself.

    Attributes:
        name: of the run; shares of one name are timed once, also when several steps have them.
        run: does the work once.
        times: how often a request holds it; need not be whole, where a request is extrapolated.
    """

    name: str
    run: Callable[[], None]
    times: float = 1.0


@dataclass(frozen=True)
class Rung:
    """A step of the way: what is changed, and what a request then consists of. ``note`` says what a reader must know of the time."""

    what: str
    shares: tuple[Share, ...]
    note: str = ""


@dataclass(frozen=True)
class LadderRow:
    """A step with its time.

    Attributes:
        step: counted from 1.
        what: what is changed.
        note: what a reader must know of the time.
        timing: of the whole request.
        new_tokens: that the request generates.
        factor: how many times faster than the step before; None for the first.
        total: how many times faster than the first step: the product of the factors.
    """

    step: int
    what: str
    note: str
    timing: Timing
    new_tokens: int
    factor: Speedup | None
    total: float

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of the whole request, at the median."""
        return self.new_tokens * _MILLISECONDS / self.timing.p50

    def cells(self) -> tuple[str, ...]:
        """The row as text, by :data:`COLUMNS`; a star where there is a note.

        What was not stable is shown all the same, and says so: a way has no gaps.
        """
        time_ms = f"{self.timing.p50:.0f} ms" if self.timing.p50 >= 100 else f"{self.timing.p50:.2f} ms"
        factor = "" if self.factor is None else f"{self.factor.ratio:.2f}x"
        if not self.timing.stable:
            time_ms += f" ({NOT_STABLE})"
        if self.factor is not None and not self.factor.stable:
            factor += f" ({NOT_STABLE})"
        return (
            str(self.step),
            f"{self.what} *" if self.note else self.what,
            time_ms,
            f"{self.tokens_per_second:.1f}",
            factor,
            f"{self.total:.2f}x",
        )

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON types, samples included."""
        return {
            "step": self.step,
            "what": self.what,
            "note": self.note,
            "p50_ms": self.timing.p50,
            "stable": self.timing.stable,
            "tokens_per_second": self.tokens_per_second,
            "factor": 1.0 if self.factor is None else self.factor.ratio,
            "factor_bounds": None if self.factor is None else speedup_json(self.factor),
            "total": self.total,
            "samples_ms": [round(sample, 4) for sample in self.timing.samples_ms],
        }


def interpolation_weights(positions: Sequence[int], start: int, count: int) -> tuple[float, ...]:
    """How often each measured step stands for one of ``count`` steps, at lengths from ``start`` on.

    The time of a step at a length that was not measured is taken to lie on the line between its neighbours.

    Args:
        positions: lengths that are measured, rising; they should span ``start`` to ``start + count - 1``.
        start: length at the first step.
        count: steps.

    Returns:
        A weight for each position; together they are ``count``.
    """
    lengths = np.arange(start, start + count)
    hats = np.eye(len(positions))
    return tuple(float(np.interp(lengths, positions, hat).sum()) for hat in hats)


def run_ladder(
    rungs: Sequence[Rung],
    *,
    new_tokens: int,
    seconds: float,
    pause_s: float = PAUSE_S,
    min_rounds: int = MIN_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = stay_awake,
) -> tuple[LadderRow, ...]:
    """Time all steps in one interleaved run.

    Args:
        rungs: at least one, in order.
        new_tokens: that each request generates.
        seconds: time budget of all steps together; ``min_rounds`` rounds are made all the same.
        pause_s: pause between runs, see :mod:`hfaccel.measure.timing`.
        min_rounds: fewest rounds; one more warms up.
        clock: seconds, rising.
        sleep: how to pause.
    """
    runners = {share.name: share.run for rung in rungs for share in rung.shares}
    timings = interleaved(
        runners,
        seconds=seconds,
        min_rounds=min_rounds,
        warmup_rounds=1,
        pause_s=pause_s,
        settle_s=SETTLE_S,
        patience=PATIENCE,
        clock=clock,
        sleep=sleep,
    )
    whole = [_whole(rung, {share.name: timings[share.name] for share in rung.shares}) for rung in rungs]
    return tuple(
        LadderRow(
            step=index + 1,
            what=rung.what,
            note=rung.note,
            timing=whole[index],
            new_tokens=new_tokens,
            factor=None if index == 0 else compare(whole[index - 1], whole[index]),
            total=whole[0].p50 / whole[index].p50,
        )
        for index, rung in enumerate(rungs)
    )


def _whole(rung: Rung, timings: dict[str, Timing]) -> Timing:
    """The time of a request in each round: the sum of its shares."""
    samples = sum(np.asarray(timings[share.name].samples_ms) * share.times for share in rung.shares)
    return Timing(tuple(np.asarray(samples).tolist()))

"""The way from an out-of-box deployment to the artifact: one time per step for the same request, and what each step brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hfaccel.artifact.contract import SessionSettings
from hfaccel.measure.timing import Speedup, Timing, compare
from hfaccel.measure.verdict import NOT_STABLE, per_second, speedup_json

if TYPE_CHECKING:
    from hfaccel.measure.stopwatch import Stopwatch

Unit = Literal["tokens", "texts"]
"""What a request is counted in: new tokens that are written, or texts that are answered."""

RUST_TOKENIZER = "Rust tokenizer in place of Python"
"""A step of both ways, where transformers has a tokenizer in Python to begin with."""
HUGE_PAGES_NOTE = "its weights lie in pages of 2 MiB"
"""Of the artifact's session, where that makes it another one than that of the step before."""


def columns(unit: Unit) -> tuple[str, ...]:
    """Headings of the cells of a :class:`LadderRow`."""
    return ("step", "what", "time", f"{unit}/s", "factor", "total")


def is_default(session: SessionSettings, threads: int) -> bool:
    """Whether an artifact's session, run with so many threads, is that of the steps before it."""
    return session.intra_op_num_threads in (0, threads) and replace(session, intra_op_num_threads=0) == SessionSettings()


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
class LeftOut:
    """A step that the way has elsewhere and not here, and why, in one line."""

    what: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """As plain JSON types."""
        return {"what": self.what, "reason": self.reason}


@dataclass(frozen=True)
class Way:
    """All steps in order, and those that are left out."""

    rungs: tuple[Rung, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class LadderRow:
    """A step with its time.

    Attributes:
        step: counted from 1.
        what: what is changed.
        note: what a reader must know of the time.
        timing: of the whole request.
        amount: of what the request brings: its new tokens or its texts.
        factor: how many times faster than the step before; None for the first.
        total: how many times faster than the first step: the product of the factors.
        unit: of the amount.
    """

    step: int
    what: str
    note: str
    timing: Timing
    amount: int
    factor: Speedup | None
    total: float
    unit: Unit = "tokens"

    @property
    def per_second(self) -> float:
        """Tokens or texts per second of the whole request, at the median."""
        return per_second(self.amount, self.timing)

    def cells(self) -> tuple[str, ...]:
        """The row as text, by :func:`columns`; a star where there is a note.

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
            f"{self.per_second:.1f}",
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
            f"{self.unit}_per_second": self.per_second,
            "factor": 1.0 if self.factor is None else self.factor.ratio,
            "factor_bounds": None if self.factor is None else speedup_json(self.factor),
            "total": self.total,
            "samples_ms": [round(sample, 4) for sample in self.timing.samples_ms],
        }


def notes(rows: Sequence[LadderRow], left_out: Sequence[LeftOut]) -> list[str]:
    """What a reader must know of the steps and of those that are missing, one line each; steps with the same note share theirs."""
    steps: dict[str, list[str]] = {}
    for row in (row for row in rows if row.note):
        steps.setdefault(row.note, []).append(str(row.step))
    told = [f"* step{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {note}" for note, numbers in steps.items()]
    return told + [f'no step "{item.what}": {item.reason}' for item in left_out]


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
    amount: int,
    watch: Stopwatch,
    unit: Unit = "tokens",
) -> tuple[LadderRow, ...]:
    """Time all steps in one interleaved run.

    Args:
        rungs: at least one, in order.
        amount: new tokens or texts of a request.
        watch: its seconds are for all steps, where seven rounds do not take longer.
        unit: of the amount.
    """
    runners = {share.name: share.run for rung in rungs for share in rung.shares}
    timings = watch.measure(runners, warmup_rounds=1)
    whole = [_whole(rung, {share.name: timings[share.name] for share in rung.shares}) for rung in rungs]
    return tuple(
        LadderRow(
            step=index + 1,
            what=rung.what,
            note=rung.note,
            timing=whole[index],
            amount=amount,
            factor=None if index == 0 else compare(whole[index - 1], whole[index]),
            total=whole[0].p50 / whole[index].p50,
            unit=unit,
        )
        for index, rung in enumerate(rungs)
    )


def _whole(rung: Rung, timings: dict[str, Timing]) -> Timing:
    """The time of a request in each round: the sum of its shares."""
    samples = sum(np.asarray(timings[share.name].samples_ms) * share.times for share in rung.shares)
    return Timing(tuple(np.asarray(samples).tolist()))

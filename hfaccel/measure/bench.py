"""An artifact against its peers over a workload: what to time, in which order, and what may be said about it.

Pure orchestration: it is given functions that run, and knows neither onnxruntime nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from hfaccel.measure.timing import Speedup, Timing, compare
from hfaccel.measure.verdict import NOT_STABLE, per_second, speedup_cells, speedup_json
from hfaccel.measure.workload import Point

if TYPE_CHECKING:
    from hfaccel.measure.likeness import Likeness
    from hfaccel.measure.stopwatch import Stopwatch

Mode = Literal["graph only", "end to end"]
MODES: tuple[Mode, ...] = get_args(Mode)
COLUMNS = ("workload", "what", "engine", "p50 ms", "p95 ms", "p99 ms", "examples/s", "speed-up", "at least", "cosine")


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: how reports call it.
        graph_only: prepares a run on ready-made token ids of one point of the workload.
        end_to_end: prepares a run from text to answer of one point; it must not answer from a cache.
        likeness: how far its answers are the source's; None where that is not known.
    """

    name: str
    graph_only: Callable[[Point], Callable[[], None]]
    end_to_end: Callable[[Point], Callable[[], None]]
    likeness: Likeness | None = None

    def prepare(self, mode: Mode, point: Point) -> Callable[[], None]:
        """The run to time."""
        return self.graph_only(point) if mode == "graph only" else self.end_to_end(point)


@dataclass(frozen=True)
class Row:
    """One contender at one point: its timing, and how many times faster the artifact is (None for the artifact itself)."""

    point: Point
    mode: Mode
    contender: str
    timing: Timing
    speedup: Speedup | None
    likeness: Likeness | None = None

    @property
    def examples_per_second(self) -> float:
        """Throughput at the median."""
        return per_second(self.point.batch, self.timing)

    def cells(self) -> tuple[str, ...]:
        """The row as text, by :data:`COLUMNS`; what was not stable says so instead of giving a number."""
        timing = self.timing
        if timing.stable:
            numbers = [f"{timing.p50:.2f}", f"{timing.p95:.2f}", f"{timing.p99:.2f}", f"{self.examples_per_second:.1f}"]
        else:
            numbers = [NOT_STABLE, "", "", ""]
        likeness = "" if self.likeness is None else self.likeness.cell()
        return (str(self.point), self.mode, self.contender, *numbers, *speedup_cells(self.speedup), likeness)

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON types, samples included; derived numbers are null where the timing was not stable."""
        timing, stable = self.timing, self.timing.stable
        data: dict[str, Any] = {
            "workload": str(self.point),
            "mode": self.mode,
            "engine": self.contender,
            "stable": stable,
            "p50_ms": timing.p50 if stable else None,
            "p95_ms": timing.p95 if stable else None,
            "p99_ms": timing.p99 if stable else None,
            "examples_per_second": self.examples_per_second if stable else None,
            "samples_ms": [round(sample, 4) for sample in timing.samples_ms],
        }
        if self.likeness is not None:
            data["likeness"] = self.likeness.to_json()
        if self.speedup is not None:
            data["artifact_speedup"] = speedup_json(self.speedup)
        return data


def run_bench(
    artifact: Contender,
    peers: Sequence[Contender],
    points: Sequence[Point],
    *,
    modes: Sequence[Mode] = MODES,
    watch: Stopwatch,
) -> tuple[Row, ...]:
    """Time the artifact and its peers in interleaved rounds, point by point and mode by mode.

    Args:
        artifact: what the speed-ups are about.
        peers: what it is compared with.
        points: the workload.
        modes: what to time.
        watch: its seconds are for one point in one mode; a peer that fails at a point has no row there.
    """
    rows: list[Row] = []
    contenders = (artifact, *peers)
    for point in points:
        for mode in modes:
            watch.on_step(f"timing {point}, {mode}: {', '.join(contender.name for contender in contenders)}")
            prepare = {item.name: partial(item.prepare, mode, point) for item in contenders}
            timings = watch.measure(watch.prepared(prepare))
            own = timings[artifact.name]
            for item in contenders:
                if item.name in timings:
                    speedup = None if item is artifact else compare(timings[item.name], own)
                    rows.append(Row(point, mode, item.name, timings[item.name], speedup, item.likeness))
    return tuple(rows)

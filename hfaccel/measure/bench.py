"""An artifact against its peers over a workload: what to time, in which order, and what may be said about it.

Pure orchestration: it is given functions that run, and knows neither onnxruntime nor torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hfaccel.measure.timing import Speedup, Timing, compare, interleaved
from hfaccel.measure.workload import Point

Mode = Literal["graph only", "end to end"]
MODES: tuple[Mode, ...] = get_args(Mode)
NOT_STABLE = "not stable"
COLUMNS = ("workload", "what", "engine", "p50 ms", "p95 ms", "p99 ms", "examples/s", "speed-up", "at least")

# Long enough for the worker threads of onnxruntime and OpenMP to stop spinning before the other one's turn.
PAUSE_S = 0.01
PATIENCE = 4.0
"""A point may take this many times its seconds while a timing is not stable: a busy spell of the machine passes."""


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: how reports call it.
        graph_only: prepares a run on ready-made token ids of one point of the workload.
        end_to_end: prepares a run from text to answer of one point; it must not answer from a cache.
    """

    name: str
    graph_only: Callable[[Point], Callable[[], None]]
    end_to_end: Callable[[Point], Callable[[], None]]

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

    @property
    def examples_per_second(self) -> float:
        """Throughput at the median."""
        return self.point.batch * 1000.0 / self.timing.p50

    def cells(self) -> tuple[str, ...]:
        """The row as text, by :data:`COLUMNS`; what was not stable says so instead of giving a number."""
        timing = self.timing
        if timing.stable:
            numbers = [f"{timing.p50:.2f}", f"{timing.p95:.2f}", f"{timing.p99:.2f}", f"{self.examples_per_second:.1f}"]
        else:
            numbers = [NOT_STABLE, "", "", ""]
        if self.speedup is None:
            verdict = ["", ""]
        elif self.speedup.stable:
            verdict = [f"{self.speedup.ratio:.2f}x", f"{self.speedup.lower_bound:.2f}x"]
        else:
            verdict = [NOT_STABLE, ""]
        return (str(self.point), self.mode, self.contender, *numbers, *verdict)

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
        if self.speedup is not None:
            speedup = self.speedup
            data["artifact_speedup"] = {
                "stable": speedup.stable,
                "ratio": speedup.ratio if speedup.stable else None,
                "lower_bound": speedup.lower_bound if speedup.stable else None,
                "upper_bound": speedup.upper_bound if speedup.stable else None,
            }
        return data


def run_bench(
    artifact: Contender,
    peers: Sequence[Contender],
    points: Sequence[Point],
    *,
    modes: Sequence[Mode] = MODES,
    seconds: float,
    pause_s: float = PAUSE_S,
    on_step: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Row, ...]:
    """Time the artifact and its peers in interleaved rounds, point by point and mode by mode.

    Args:
        artifact: what the speed-ups are about.
        peers: what it is compared with.
        points: the workload.
        modes: what to time.
        seconds: time budget of one point in one mode, all contenders together.
        pause_s: pause between runs, see :mod:`hfaccel.measure.timing`.
        on_step: told what is being timed now.
        clock: seconds, rising.
        sleep: how to pause.
    """
    rows: list[Row] = []
    contenders = (artifact, *peers)
    for point in points:
        for mode in modes:
            on_step(f"timing {point}, {mode}: {', '.join(contender.name for contender in contenders)}")
            runners = {contender.name: contender.prepare(mode, point) for contender in contenders}
            timings = interleaved(runners, seconds=seconds, pause_s=pause_s, patience=PATIENCE, clock=clock, sleep=sleep)
            own = timings[artifact.name]
            rows.append(Row(point, mode, artifact.name, own, None))
            rows += [Row(point, mode, peer.name, timings[peer.name], compare(timings[peer.name], own)) for peer in peers]
    return tuple(rows)

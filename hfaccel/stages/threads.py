"""With how many threads the chosen graph runs: as many as there are cores, unless fewer are measured to be faster.

A small model on a large machine spends its time on handing work to threads and waiting for them: on 64 cores a text of 16 tokens is
often answered faster by four of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hfaccel.runtime.cores import physical_cores
from hfaccel.stages.race import Entrant, geometric_mean, glance, is_slower, settings_race

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from hfaccel.stages.base import StageContext
    from hfaccel.stages.candidates import Candidate, PointTiming

    Race = Callable[[int, int, bool], Sequence[PointTiming]]

CLEARLY_FASTER = 1.03
"""By so much, at the lower bound, fewer threads must be faster: a machine's noise is not to decide."""


@dataclass(frozen=True)
class ThreadTrial:
    """Half as many threads against the number that was best before.

    Attributes:
        count: threads.
        against: the number before.
        speedup: geometric mean over the workload, of the objective throughput that of its last point.
        lower_bound: one-sided 95 % bound of it.
    """

    count: int
    against: int
    speedup: float
    lower_bound: float


def with_tuned_threads(chosen: Candidate, graph: Path, ctx: StageContext) -> tuple[Candidate, dict[str, Any]]:
    """The candidate with its number of threads, and how it was found.

    Off the target nothing is timed, and the number is left to the machine that runs it, as where all cores are best.
    """
    wanted, cores = ctx.recipe.measure.threads, physical_cores()
    count, trials = wanted or 0, list[ThreadTrial]()
    if wanted is None and ctx.on_target and cores > 1:
        ctx.progress.step(f"timing {chosen.name} with fewer threads than {cores}")

        def race(before: int, fewer: int, thoroughly: bool) -> Sequence[PointTiming]:
            many, few = (replace(chosen.session, intra_op_num_threads=count) for count in (before, fewer))
            if chosen.finalist and before == cores and not thoroughly:
                return glance(Entrant(graph, few, chosen.size_bytes), chosen.timings, ctx)  # the final race has timed the other
            return settings_race(Entrant(graph, many, chosen.size_bytes), few, ctx, thoroughly=thoroughly)

        best, trials = halve_threads(cores, race, last_point=ctx.recipe.measure.objective == "throughput")
        count = best if best < cores else 0
    found = {"cores": cores, "count": count or cores, "trials": [asdict(trial) for trial in trials]}
    return replace(chosen, session=replace(chosen.session, intra_op_num_threads=count)), found


def halve_threads(cores: int, race: Race, *, last_point: bool) -> tuple[int, list[ThreadTrial]]:
    """The best number of threads, halved from ``cores`` as long as that is clearly faster, and the trials made.

    Args:
        cores: where to begin.
        race: what times the second number of threads against the first, thoroughly or for a moment; where a moment shows that fewer are
            slower, no more is asked.
        last_point: look at the workload's last point only.
    """
    best, trials = cores, list[ThreadTrial]()
    points = slice(-1, None) if last_point else slice(None)
    while best > 1:
        fewer = best // 2
        timings = race(best, fewer, False)[points]
        if not is_slower(timings):
            timings = race(best, fewer, True)[points]
        speedup, bound = (
            geometric_mean(values)
            for values in ([item.speedup for item in timings], [item.speedup_lower_bound for item in timings])
        )
        trial = ThreadTrial(fewer, best, round(speedup, 3), round(bound, 3))
        trials.append(trial)
        if trial.lower_bound < CLEARLY_FASTER:
            break
        best = fewer
    return best, trials

"""Times graphs against each other, in turns, so that a slow phase of the machine hits all alike: all quickly, finalists well."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.artifact.contract import SessionSettings
from hfaccel.evaluate.cached_decoding import open_encoder_decoder
from hfaccel.measure.decoding import answering_calls, decoding_calls, parse_requests
from hfaccel.measure.timing import MIN_ROUNDS, PATIENCE, SETTLE_S, Timing, compare, interleaved, milliseconds_of
from hfaccel.measure.workload import fit_workload, make_feeds, parse_workload
from hfaccel.rewrites.graphs import graph_bytes
from hfaccel.runtime.cores import physical_cores
from hfaccel.runtime.engines import open_graph
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.memory import gains_from_huge_pages, use_huge_pages
from hfaccel.stages.candidates import FLOAT_PARENT, Candidate, PointTiming

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.quant.calibration import Feeds
    from hfaccel.runtime.session import Runner
    from hfaccel.stages.base import StageContext

PAUSE_S = 0.002
"""Between runs; enough, because sessions in the race stop spinning when a run ends (else each disturbs the next for 40 ms)."""
SESSION_FACTOR, SESSION_BASE_BYTES = 2, 60_000_000
"""Memory of an open session: its weights twice (as read, and packed for the kernels), and its arena."""
OPEN_FACTOR, OPEN_BASE_BYTES = 3, 600_000_000
"""Sessions are open at the same time up to three times the float graph's bytes and this: compiling must fit a laptop."""
QUICK, QUICK_ROUNDS = 0.3, 4
"""Share of the recipe's seconds per point that a quick race takes, and the fewest rounds of it."""
GLANCES, GLANCE_MARGIN = 2, 1.25
"""Runs of each point at a glance, and by how much a fastest run of so few, at another time than what it is compared with, may be off."""
REMATCHES = 2
"""How often a race against the float graph is run again, longer, while its bounds lie on both sides of 1."""


@dataclass(frozen=True)
class Entrant:
    """A graph in the race, the session settings that it will run with, and its size on disk."""

    graph: Path
    session: SessionSettings
    size_bytes: int


@dataclass(frozen=True)
class RaceResult:
    """The fastest float graph by name, and every entrant's timings against it, one per point of the workload."""

    parent: str
    timings: Mapping[str, tuple[PointTiming, ...]]


def quick_race(floats: Mapping[str, Entrant], candidates: Mapping[str, Entrant], ctx: StageContext) -> RaceResult:
    """Time the float graphs, then the candidates with the fastest of them, shortly: enough to drop what is clearly slower.

    Candidates race together, as many as memory allows, with the threads of the recipe or as many as there are physical cores. Those of different
    groups met the float graph at different times; what ships is decided by :func:`final_race`.

    Args:
        floats: the float graphs; the fastest of them is the parent that the others are compared with.
        candidates: the graphs to compare with it.
        ctx: of the stage: workload, seconds per point and progress.
    """
    ctx.progress.step(f"timing the float graph{'s' if len(floats) > 1 else ''}: {', '.join(floats)}")
    timed = _time(floats, ctx, share=QUICK, min_rounds=QUICK_ROUNDS)
    parent = min(floats, key=lambda name: geometric_mean([times[name].p50 for times in timed.values()]))
    results = {name: _against(parent, name, timed) for name in floats}
    for group in _groups(floats[parent], candidates):
        ctx.progress.step(f"timing {', '.join(group)}")
        timed = _time({parent: floats[parent], **group}, ctx, share=QUICK, min_rounds=QUICK_ROUNDS)
        results |= {name: _against(parent, name, timed) for name in group}
    return RaceResult(parent, results)


def final_race(
    parent: str, floating: Entrant, finalists: Mapping[str, Entrant], ctx: StageContext
) -> dict[str, tuple[PointTiming, ...]]:
    """Timings of the parent and of the finalists, all in one interleaved run that waits for calm.

    One of which the bounds do not tell whether it is faster than the parent meets it again, alone and longer.

    Args:
        parent: name of the float graph.
        floating: the float graph.
        finalists: what to compare, best first; those that memory has no room for are left out of the race and of the result.
        ctx: of the stage: workload, seconds per point and progress.
    """
    group = next(_groups(floating, finalists), {})
    ctx.progress.step(f"timing together: {', '.join((parent, *group))}")
    timed = _time({parent: floating, **group}, ctx, share=1.0, patience=PATIENCE)
    results = {name: _against(parent, name, timed) for name in (parent, *group)}
    for name, entrant in group.items():
        for attempt in range(1, REMATCHES + 1):
            if is_faster(results[name]) or is_slower(results[name]):
                break
            ctx.progress.step(f"timing {name} again: the bounds do not tell whether it is faster than float")
            timed = _time({parent: floating, name: entrant}, ctx, share=2.0**attempt, patience=PATIENCE)
            results[name] = _against(parent, name, timed)
    return results


def settings_race(
    entrant: Entrant, other: SessionSettings, ctx: StageContext, *, thoroughly: bool = False
) -> tuple[PointTiming, ...]:
    """Timings of a graph with other settings of the session against it with its own, one per point of the workload."""
    entrants = {"before": entrant, "after": replace(entrant, session=other)}
    if thoroughly:
        timed = _time(entrants, ctx, share=1.0, patience=PATIENCE)
    else:
        timed = _time(entrants, ctx, share=QUICK, min_rounds=QUICK_ROUNDS)
    return _against("before", "after", timed)


def glance(entrant: Entrant, known: Sequence[PointTiming], ctx: StageContext) -> tuple[PointTiming, ...]:
    """Timings of a graph from two runs of each point, against known ones of it with other settings: shows what is much slower, no more."""
    known_ms, found = {item.point: item.candidate_ms for item in known}, []
    for point, calls in _calls({"after": entrant}, ctx):
        calls["after"]()
        before_ms, after_ms = known_ms[point], min(milliseconds_of(calls["after"]) for _ in range(GLANCES))
        ratio = before_ms / after_ms
        bounds = ratio / GLANCE_MARGIN, ratio * GLANCE_MARGIN
        found.append(PointTiming(point, before_ms, after_ms, after_ms, ratio, *bounds, stable=False))
    return tuple(found)


def with_timings(candidate: Candidate, timings: tuple[PointTiming, ...], *, quick: bool) -> Candidate:
    """The candidate with its timings and its speed-up, their geometric mean; dropped unless it is faster than its parent.

    Args:
        candidate: what was timed.
        timings: by point.
        quick: they are of a quick race: only what is clearly slower is dropped.
    """
    speedup = geometric_mean([item.speedup for item in timings])
    timed = replace(candidate, timings=timings, speedup=speedup, finalist=not quick)
    if is_faster(timings) or (quick and not is_slower(timings)):
        return timed
    detail = f"{speedup:.2f}x its float parent, 95 % bound not above 1"
    return replace(timed, reason="slower-than-parent", detail=detail)


def timed_against(parent: Artifact, candidate: Candidate, ctx: StageContext) -> Candidate:
    """A candidate that a search made, if it holds the gate, with its speed against the float graph; off the target nothing is timed."""
    if not ctx.on_target or candidate.reason is not None:
        return candidate
    floating = Entrant(parent.graph_path, SessionSettings(), graph_bytes(parent.folder))
    entrant = Entrant(ctx.workdir / candidate.graph, candidate.session, candidate.size_bytes)
    timings = quick_race({FLOAT_PARENT: floating}, {candidate.name: entrant}, ctx).timings[candidate.name]
    return with_timings(candidate, timings, quick=True)


def is_faster(timings: Sequence[PointTiming]) -> bool:
    """Whether the lower bound of the speed-up lies above 1 over the workload."""
    return geometric_mean([item.speedup_lower_bound for item in timings]) > 1.0


def is_slower(timings: Sequence[PointTiming]) -> bool:
    """Whether even the upper bound of the speed-up lies at 1 or below."""
    return geometric_mean([item.speedup_upper_bound for item in timings]) <= 1.0


def _groups(parent: Entrant, candidates: Mapping[str, Entrant]) -> Iterator[dict[str, Entrant]]:
    """Candidates that are open together with the parent, as many as fit into the memory that compiling may use."""
    room = OPEN_FACTOR * parent.size_bytes + OPEN_BASE_BYTES - _session_bytes(parent)
    group: dict[str, Entrant] = {}
    for name, entrant in candidates.items():
        if group and sum(map(_session_bytes, (*group.values(), entrant))) > room:
            yield group
            group = {}
        group[name] = entrant
    if group:
        yield group


def _session_bytes(entrant: Entrant) -> int:
    return SESSION_FACTOR * entrant.size_bytes + SESSION_BASE_BYTES


def _time(
    entrants: Mapping[str, Entrant], ctx: StageContext, *, share: float, patience: float = 1.0, min_rounds: int = MIN_ROUNDS
) -> dict[str, dict[str, Timing]]:
    """Samples by point of the workload and entrant; ``share`` times as long as the recipe says for each entrant.

    Where there is patience, weights lie where :func:`hfaccel.load` has them; moving them costs seconds, and shows no screen more.
    """
    seconds = ctx.recipe.measure.seconds_per_point * len(entrants) * share
    times: dict[str, dict[str, Timing]] = {}
    for point, calls in _calls(entrants, ctx):
        if not times and patience > 1 and _gain_from_huge_pages(entrants):
            use_huge_pages()
        times[point] = interleaved(
            calls, seconds=seconds, min_rounds=min_rounds, pause_s=PAUSE_S, settle_s=SETTLE_S, patience=patience
        )
    return times


def _gain_from_huge_pages(entrants: Mapping[str, Entrant]) -> bool:
    return any(gains_from_huge_pages(entrant.size_bytes, entrant.session.engine) for entrant in entrants.values())


def _calls(entrants: Mapping[str, Entrant], ctx: StageContext) -> Iterator[tuple[str, dict[str, Callable[[], None]]]]:
    """What to time, by point of the workload and entrant; all entrants are open meanwhile."""
    contract, workload, seed = ctx.artifacts["export"].contract, ctx.recipe.measure.workload, ctx.recipe.seed
    settings = {
        name: replace(entrant.session, intra_op_num_threads=_threads(entrant, ctx), spin_after_run=False)
        for name, entrant in entrants.items()
    }
    if contract.generation is not None and contract.generation.encoder is not None:
        answering = {name: open_encoder_decoder(entrants[name].graph, settings[name], contract.generation) for name in entrants}
        yield from answering_calls(answering, parse_requests(workload), seed=seed)
        return
    if contract.generation is not None:
        decoders = {name: Decoder(entrants[name].graph, settings[name], contract.generation) for name in entrants}
        yield from decoding_calls(decoders, parse_requests(workload), seed=seed)
        return
    runners = {name: open_graph(entrants[name].graph, settings[name]) for name in entrants}
    for point in fit_workload(parse_workload(workload), contract.text.max_length):
        yield (
            str(point),
            {
                name: functools.partial(
                    _call,
                    runner,
                    make_feeds(point, runner.input_names, vocabulary_size=ctx.source.vocabulary_size, seed=seed),
                )
                for name, runner in runners.items()
            },
        )


def _threads(entrant: Entrant, ctx: StageContext) -> int:
    return entrant.session.intra_op_num_threads or ctx.recipe.measure.threads or physical_cores()


def _against(parent: str, name: str, timed: Mapping[str, Mapping[str, Timing]]) -> tuple[PointTiming, ...]:
    return tuple(_point_timing(point, times[parent], times[name]) for point, times in timed.items())


def _point_timing(point: str, parent: Timing, candidate: Timing) -> PointTiming:
    result = compare(parent, candidate)
    return PointTiming(
        point=point,
        parent_ms=parent.p50,
        candidate_ms=candidate.p50,
        candidate_p95_ms=candidate.p95,
        speedup=result.ratio,
        speedup_lower_bound=result.lower_bound,
        speedup_upper_bound=result.upper_bound,
        stable=result.stable,
    )


def _call(runner: Runner, feeds: Feeds) -> None:
    runner.run(feeds)


def geometric_mean(values: Sequence[float]) -> float:
    """Of speed-ups or times over a workload; 1 of none."""
    return math.exp(sum(math.log(max(value, 1e-9)) for value in values) / len(values)) if values else 1.0

"""Which of the candidates that hold every gate ships."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfaccel.stages.candidates import FLOAT_PARENT, Candidate

if TYPE_CHECKING:
    from hfaccel.recipe.schema import Objective

NEAR_EQUAL = 0.05
"""Candidates this close to the best one are equal as far as timings on a shared machine can tell: accuracy decides."""
CLEARLY = 1.1
"""What is this much faster in one quick race is faster: medians of its few rounds were off by up to a twentieth."""
MUCH_SMALLER = 0.75
"""A slower graph of at most this share of the bytes may be wanted all the same, so its loss is told."""


def choose(judged: Sequence[Candidate], objective: Objective) -> Candidate | None:
    """The best candidate without a reason against it; None when there is none.

    Among those within 5 % of the best by the objective, the one whose accuracy is most certain is taken. The float parent ships
    only when no other candidate is left: those that are left were measured faster (or, off the target, are smaller). A float graph
    in another engine or in bfloat16 is no smaller, so it counts only where it was timed.
    """
    left = [candidate for candidate in judged if candidate.reason is None]
    better = [item for item in left if item.name != FLOAT_PARENT and (item.timings or item.precision not in ("fp32", "bf16"))]
    if not better:
        return next((item for item in left if item.name == FLOAT_PARENT), left[0] if left else None)
    best = max(merit(candidate, objective) for candidate in better)
    near = [candidate for candidate in better if merit(candidate, objective) >= best * (1 - NEAR_EQUAL)]
    return min(near, key=risk)


def outdone(candidate: Candidate, judged: Sequence[Candidate], objective: Objective) -> str | None:
    """Why a candidate that was not judged yet cannot be chosen any more, or None: one that holds the accuracy gate is better.

    In the same quick race that one was a tenth faster over the workload, at no point a tenth slower, and it is not much larger. Judging
    a graph that generates text takes longer than all its timing.
    """
    if objective == "size" or not candidate.timings:
        return None
    for other in judged:
        if other.reason is not None or other.name == FLOAT_PARENT or not _met(candidate, other):
            continue
        somewhere_faster = any(
            own.speedup > its.speedup * CLEARLY for own, its in zip(candidate.timings, other.timings, strict=True)
        )
        smaller = candidate.size_bytes <= other.size_bytes * MUCH_SMALLER
        if candidate.speedup * CLEARLY < other.speedup and not somewhere_faster and not smaller:
            told = f"{candidate.speedup:.2f}x float in the quick race"
            return f"{told}; {other.name} was {other.speedup:.2f}x in the same race and holds the accuracy gate"
    return None


def _met(candidate: Candidate, other: Candidate) -> bool:
    """Whether both were timed in one race: they met the same float graph at the same times, so what disturbed one disturbed both."""
    times = [[(item.point, item.parent_ms) for item in each.timings] for each in (candidate, other)]
    return times[0] == times[1]


def rank(judged: Sequence[Candidate], chosen: Candidate, objective: Objective) -> list[Candidate]:
    """All candidates as reports list them: the chosen one first, then by the objective; each that lost says so.

    Those of the Pareto set are marked.
    """
    told: list[Candidate] = []
    best = pareto_set(judged)
    marked = [replace(candidate, pareto=candidate.name in best) for candidate in judged]
    chosen = replace(chosen, pareto=chosen.name in best)
    for candidate in sorted(marked, key=lambda candidate: -merit(candidate, objective)):
        if candidate.name == chosen.name:
            told.insert(0, replace(chosen, detail="chosen"))
        elif candidate.reason is None:
            detail = "holds all gates; " + _why_not(candidate, chosen, objective)
            told.append(replace(candidate, reason="not-better-than-chosen", detail=detail))
        else:
            told.append(candidate)
    return told


def pareto_set(judged: Sequence[Candidate]) -> frozenset[str]:
    """Names of the candidates that hold all gates and of which no other is as good in every respect and better in one.

    Respects are the speed-up over the workload, that at its last point, bytes, and the upper bound of the loss. Speed counts as far
    as it was measured in one race.
    """
    left = [candidate for candidate in judged if candidate.reason is None]
    values = {candidate.name: _respects(candidate) for candidate in left}
    return frozenset(
        name for name, own in values.items() if not any(other != own and _at_least(other, own) for other in values.values())
    )


def risk(candidate: Candidate) -> tuple[float, float]:
    """Upper bound of the loss, then distance of the outputs: smaller is safer."""
    verdict = candidate.verdict or {}
    losses = [float(loss["upper_bound"]) for loss in verdict.get("losses") or ()]
    return max(losses, default=0.0), 1.0 - float(verdict.get("cosine_lower_bound") or 0.0)


def _respects(candidate: Candidate) -> tuple[float, ...]:
    """More is better in each."""
    last = candidate.timings[-1].speedup if candidate.timings else 1.0
    return (candidate.speedup, last, -float(candidate.size_bytes), *(-value for value in risk(candidate)))


def _at_least(left: tuple[float, ...], right: tuple[float, ...]) -> bool:
    return all(a >= b for a, b in zip(left, right, strict=True))


def merit(candidate: Candidate, objective: Objective) -> float:
    """More is better: bytes saved, speed-up at the last point of the workload, or speed-up over all of it."""
    if objective == "size":
        return 1.0 / max(1, candidate.size_bytes)
    if objective == "throughput" and candidate.timings:
        return candidate.timings[-1].speedup
    return candidate.speedup


def _why_not(candidate: Candidate, chosen: Candidate, objective: Objective) -> str:
    if candidate.name == FLOAT_PARENT or merit(chosen, objective) > merit(candidate, objective):
        return f"{chosen.name} is better by the objective ({objective})"
    return f"{chosen.name} is as good within 5 % by the objective ({objective}), and more accurate"

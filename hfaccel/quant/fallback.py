"""Which MatMuls must stay in float for the rest to hold a gate: a near-minimal set, found with few trials.

The ranking by sensitivity says in which order to give up; the gate says when to stop. Three steps: double the number of the worst
MatMuls in float until the gate holds, halve the gap to the last number that did not, then try to take each one back, the least
sensitive first. The set is minimal in the sense that no single member can be taken back; finding the smallest one would need
a trial for every subset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Trial = Callable[[frozenset[str]], bool]
"""Whether the gate holds with these MatMuls in float and all others in 8 bit."""


@dataclass(frozen=True)
class Fallback:
    """What the search found.

    Attributes:
        kept_float: MatMuls that stay in float, worst first.
        trials: how many sets were tried.
        complete: whether no member can be taken back; False when time ran out first.
    """

    kept_float: tuple[str, ...]
    trials: int
    complete: bool


def find_float_set(ranking: Sequence[str], holds: Trial, out_of_time: Callable[[], bool]) -> Fallback | None:
    """Search a near-minimal float set; the best one so far when time runs out, None when none was found to hold.

    Args:
        ranking: all MatMuls that are in 8 bit, most sensitive first.
        holds: the gate; called for different sets only. It should hold with everything in float.
        out_of_time: asked before each trial.
    """
    trials = 0

    def attempt(names: Sequence[str]) -> bool | None:
        nonlocal trials
        if out_of_time():
            return None
        trials += 1
        return holds(frozenset(names))

    known_bad, good = -1, None
    count = 0
    while good is None:
        verdict = attempt(ranking[:count])
        if verdict is None:
            return None
        if verdict:
            good = count
        elif count >= len(ranking):
            return None
        else:
            known_bad, count = count, min(len(ranking), max(1, 2 * count))
    while good - known_bad > 1:
        middle = (good + known_bad) // 2
        verdict = attempt(ranking[:middle])
        if verdict is None:
            return Fallback(tuple(ranking[:good]), trials, complete=False)
        good, known_bad = (middle, known_bad) if verdict else (good, middle)
    return _take_back(list(ranking[:good]), attempt, lambda: trials)


def _take_back(kept: list[str], attempt: Callable[[Sequence[str]], bool | None], trials: Callable[[], int]) -> Fallback:
    """Put members back into 8 bit, the least sensitive first, wherever the gate still holds.

    The last of the ranking's prefix needs no trial: without it the gate was just seen not to hold.
    """
    for name in list(reversed(kept))[1:]:
        verdict = attempt([other for other in kept if other != name])
        if verdict is None:
            return Fallback(tuple(kept), trials(), complete=False)
        if verdict:
            kept.remove(name)
    return Fallback(tuple(kept), trials(), complete=True)

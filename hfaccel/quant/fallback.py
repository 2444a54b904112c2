"""Which MatMuls must stay in float for the rest to hold a gate: a near-minimal set, found with few trials.

The ranking by sensitivity says in which order to give up; the gate says when to stop. Three steps: start with nearly all in float and
halve their number until the gate is missed, halve the gap to the last number that held, then try to take members back, the least
sensitive first. Where all were tried, the set is minimal in the sense that no single member can be taken back; finding the smallest one
would need a trial for every subset. What is taken back late is more sensitive than the one whose return was just seen to miss the gate,
and seldom holds: a search that is in a hurry tries the first few only, and its trials err with a larger share each. It ends where even
three quarters in float miss the gate: 8 bit in fewer than a quarter gains next to nothing (eight trials of four seconds for each rung of
a classifier found nothing).

All trials look at the same data, so each gets a share of the error that one verdict may make, or one of many would pass by luck. The first
step tests in an order fixed beforehand and ends at the first miss, so its trials together err no more often than one of them (fixed
sequence, Maurer, Hothorn and Lehmacher 1995): it gets half. The other half is split among the trials of the other two steps,
whose number is known when they begin (Bonferroni). Searching from the risky side took as many trials, and what it found lost twice
as much on texts never seen as on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Trial = Callable[[frozenset[str], float], bool]
"""Whether the gate holds with these MatMuls in float and all others in 8 bit, erring with this share of a single verdict's error."""
HALF = 0.5


@dataclass(frozen=True)
class Fallback:
    """What the search found.

    Attributes:
        kept_float: MatMuls that stay in float, worst first.
        trials: how many sets were tried.
        complete: whether no member can be taken back; False where not all were tried.
        error_share: of the trial that accepted this set.
    """

    kept_float: tuple[str, ...]
    trials: int
    complete: bool
    error_share: float


def find_float_set(
    ranking: Sequence[str], holds: Trial, out_of_time: Callable[[], bool], *, most_take_backs: int | None = None
) -> Fallback | None:
    """Search a near-minimal float set; the best one so far when time runs out, None when only all in float would hold.

    Args:
        ranking: all MatMuls that are in 8 bit, most sensitive first.
        holds: the gate; called for different sets only. With everything in float it is taken to hold.
        out_of_time: asked before each trial.
        most_take_backs: how many members to try to take back, of a search in a hurry; None for all.
    """
    trials, in_a_hurry = 0, most_take_backs is not None

    def attempt(names: Sequence[str], share: float) -> bool | None:
        nonlocal trials
        if out_of_time():
            return None
        trials += 1
        return holds(frozenset(names), share)

    good, known_bad, share = len(ranking), -1, HALF
    for count in _descending(len(ranking)):
        verdict = attempt(ranking[:count], share)
        if verdict is None:
            return _found(ranking[:good], ranking, trials, share)
        if not verdict:
            known_bad = count
            break
        good = count
    if good == len(ranking) and in_a_hurry:
        return None
    gap = good - known_bad
    take_backs = good if most_take_backs is None else min(good, most_take_backs)
    rest = HALF / max(1, gap.bit_length() + take_backs)
    while good - known_bad > 1:
        middle = (good + known_bad) // 2
        verdict = attempt(ranking[:middle], rest)
        if verdict is None:
            return _found(ranking[:good], ranking, trials, share)
        good, known_bad, share = (middle, known_bad, rest) if verdict else (good, middle, share)
    kept, share, complete = _take_back(list(ranking[:good]), take_backs, attempt, share, rest)
    return _found(kept, ranking, trials, share, complete=complete)


def _descending(count: int) -> list[int]:
    """Three quarters, a half, a quarter and so on down to none."""
    sizes = [3 * count // 4]
    while count > 0:
        count //= 2
        sizes.append(count)
    return sorted(set(sizes), reverse=True)


def _found(kept: Sequence[str], ranking: Sequence[str], trials: int, share: float, *, complete: bool = False) -> Fallback | None:
    return Fallback(tuple(kept), trials, complete, share) if len(kept) < len(ranking) else None


def _take_back(
    kept: list[str], most: int, attempt: Callable[[Sequence[str], float], bool | None], share: float, rest: float
) -> tuple[list[str], float, bool]:
    """Put members back into 8 bit, the least sensitive first and no more than ``most``, wherever the gate still holds.

    The last of the ranking's prefix needs no trial: without it the gate was just seen not to hold.

    Returns:
        The members that stay, the share of the error of the trial that accepted them, and whether all were tried.
    """
    candidates = list(reversed(kept))[1:]
    for name in candidates[:most]:
        verdict = attempt([other for other in kept if other != name], rest)
        if verdict is None:
            return kept, share, False
        if verdict:
            kept, share = [other for other in kept if other != name], rest
    return kept, share, most >= len(candidates)

"""Looks at growing parts of the data, so that a clear case does not cost all of it, without more errors than one look makes.

A candidate is accepted at the first look whose upper bound lies inside the limit, and refused at the first whose lower bound lies
above it; the last look refuses what is still open. Each look may err with a share of the 5 %, and the shares add up to it
(Bonferroni), so no assumption on how looks depend on each other is needed:

accepting: 5 % * t**3 is spent by the time a part t of the data was seen (alpha spending, Lan and DeMets, Biometrika 70, 1983; the
    power family of Kim and DeMets, Biometrika 74, 1987; the exponent 3 comes close to O'Brien and Fleming). The last look keeps
    4.4 % of the 5 %: a border-line case needs hardly more examples than with a single look.
refusing: the same share at each look, because a refusal by mistake costs speed, not accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hfaccel.evaluate.resampling import units_of

TOTAL_ERROR = 0.05
FRACTIONS = (0.125, 0.25, 0.5, 1.0)
SMALLEST_LOOK = 200
SEQUENTIAL_MINIMUM = 400
"""Data of fewer examples is looked at once."""

Outcome = Literal["accepted", "refused", "open"]


@dataclass(frozen=True)
class Look:
    """One look at a part of the data.

    Attributes:
        number: from 1.
        examples: how many examples, from the first on.
        accept_error: how often a candidate over its limit may be accepted at this look.
        refuse_error: how often a candidate inside its limit may be refused at this look.
        last: whether nothing comes after it.
    """

    number: int = 1
    examples: int = 0
    accept_error: float = TOTAL_ERROR
    refuse_error: float = TOTAL_ERROR
    last: bool = True

    def outcome(self, lower_bound: float, upper_bound: float, limit: float) -> Outcome:
        """What this look says of a loss between two bounds; the last look leaves nothing open."""
        if upper_bound <= limit:
            return "accepted"
        return "refused" if self.last or lower_bound > limit else "open"


def plan_looks(total: int, ends: Sequence[int] | None = None) -> tuple[Look, ...]:
    """The looks at ``total`` examples, at most four.

    Args:
        total: how many examples there are.
        ends: after how many examples a look may end, ascending; None allows any number.
    """
    allowed = np.arange(1, total + 1) if ends is None else np.asarray(ends)
    wanted = [total * fraction for fraction in FRACTIONS if total >= SEQUENTIAL_MINIMUM or fraction == 1.0]
    sizes = sorted({int(allowed[min(int(np.searchsorted(allowed, size)), len(allowed) - 1)]) for size in wanted})
    sizes = [size for size in sizes if size >= SMALLEST_LOOK or size == total]
    spent = [0.0, *(TOTAL_ERROR * (size / total) ** 3 for size in sizes)]
    return tuple(
        Look(index + 1, size, spent[index + 1] - spent[index], TOTAL_ERROR / len(sizes), size == total)
        for index, size in enumerate(sizes)
    )


def order_of(clusters: Sequence[tuple[int, ...]] | None, total: int, seed: int) -> tuple[list[int], tuple[Look, ...]]:
    """In which order examples are looked at, and the looks.

    Examples that share texts stay together; where nearly all hang together they are looked at once, in the given order.

    Args:
        clusters: text numbers of each example, where examples share texts.
        total: how many examples there are.
        seed: of the order.
    """
    units = units_of(clusters, total)
    if total < SEQUENTIAL_MINIMUM or units.method == "texts":
        return list(range(total)), plan_looks(total, [total])
    groups = units.numbers[0]
    place = np.random.default_rng(seed).permutation(int(groups.max()) + 1)[groups]
    order = np.argsort(place, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(place[order])) + 1, total)
    return order.tolist(), plan_looks(total, ends.tolist())

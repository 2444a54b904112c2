"""Whether the options of a call have values that they can have."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from hfaccel.errors import UsageError


@dataclass(frozen=True)
class Range:
    """Numbers above ``low``, up to ``high``; ``low`` is one of them where ``low_counts``."""

    words: str
    low: float
    high: float
    low_counts: bool = True

    def holds(self, value: float) -> bool:
        """Whether it is one of them."""
        return self.low < value <= self.high or (self.low_counts and value == self.low)


ABOVE_ZERO = Range("above 0", 0, sys.float_info.max, low_counts=False)


def check_count(name: str, value: object, least: int, hint: str) -> None:
    """Refuse what is no whole number from ``least`` on.

    Raises:
        UsageError: it is not.
    """
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    check(name, value, good, f"must be a whole number from {least} on", hint)


def check_number(name: str, value: object, allowed: Range, hint: str) -> None:
    """Refuse what is no number of a range.

    Raises:
        UsageError: it is not.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and allowed.holds(value)
    check(name, value, good, f"must be a number {allowed.words}", hint)


def check(name: str, value: object, good: bool, rule: str, hint: str) -> None:
    """Refuse a value that is not good.

    Raises:
        UsageError: it is not.
    """
    if not good:
        raise UsageError(f"{rule}, not {value!r}", where=name, hint=hint)

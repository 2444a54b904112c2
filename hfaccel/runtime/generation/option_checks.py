"""Whether the options of a call have values that they can have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


LARGEST = float(np.finfo(np.float32).max)
"""Logits are of this type: what is larger is infinity to them."""
ABOVE_ZERO = Range("above 0", 0, LARGEST, low_counts=False)


def check_count(name: str, value: object, least: int, hint: str) -> None:
    """Refuse what is no whole number from ``least`` on.

    Raises:
        UsageError: it is not.
    """
    good = isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= least
    check(name, value, good, f"must be a whole number from {least} on", hint)


def check_number(name: str, value: object, allowed: Range, hint: str) -> None:
    """Refuse what is no number of a range.

    Raises:
        UsageError: it is not.
    """
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    good = is_number and allowed.holds(float(value))  # type: ignore[arg-type]
    check(name, value, good, f"must be a number {allowed.words}", hint)


def check_flag(name: str, value: object, hint: str) -> None:
    """Refuse what is neither True nor False.

    Raises:
        UsageError: it is neither.
    """
    check(name, value, isinstance(value, bool | np.bool_), "must be True or False", hint)


def check_batch(max_batch: object, *, stream: object) -> None:
    """Refuse what is no largest batch, and what says neither yes nor no to a stream.

    Raises:
        UsageError: it is not.
    """
    check_count("max_batch", max_batch, 1, "1 computes one after the other")
    check_flag("stream", stream, "True gives the answer in pieces")


def check(name: str, value: object, good: bool, rule: str, hint: str) -> None:
    """Refuse a value that is not good.

    Raises:
        UsageError: it is not.
    """
    if not good:
        raise UsageError(f"{rule}, not {value!r}", where=name, hint=hint)

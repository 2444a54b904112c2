"""Confidence bounds of shares and means in closed form."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def share_lower_bound(successes: float, total: float, *, confidence: float) -> float:
    """One-sided Clopper-Pearson lower bound of a share (Biometrika 26, 1934).

    Args:
        successes: how many of ``total``; a fraction interpolates between whole numbers.
        total: of how many.
        confidence: of the one-sided bound, for example 0.95.
    """
    if successes <= 0:
        return 0.0
    from scipy.stats import beta  # scipy is of the compile extra and slow to import

    return float(beta.ppf(1 - confidence, successes, total - successes + 1))


def share_upper_bound(successes: float, total: float, *, confidence: float) -> float:
    """One-sided Clopper-Pearson upper bound of a share; with no success seen about 3 / total at 95 % (the "rule of three")."""
    return 1 - share_lower_bound(total - successes, total, confidence=confidence)


def paired_lower_bound(worse: float, better: float, total: float, *, confidence: float) -> float:
    """One-sided lower bound of (share of worse examples) - (share of better examples); see :func:`paired_upper_bound`."""
    return -paired_upper_bound(better, worse, total, confidence=confidence)


def paired_upper_bound(worse: float, better: float, total: float, *, confidence: float) -> float:
    """One-sided upper bound of (share of worse examples) - (share of better examples) over the same examples.

    The exact bounds of both shares, put together as Newcombe does for paired proportions (Statistics in Medicine 17, 1998) with
    Zou and Donner's term for their correlation (27, 2008). Where no example is better it is the exact bound of the worse share:
    a bootstrap is too sure of itself there, because it hardly sees the losses of a rare kind.

    Args:
        worse: how many examples only the source has right.
        better: how many examples only the candidate has right.
        total: how many examples there are.
        confidence: of the one-sided bound.
    """
    worse_share, better_share = worse / total, better / total
    above = share_upper_bound(worse, total, confidence=confidence) - worse_share
    below = better_share - share_lower_bound(better, total, confidence=confidence)
    rest = (1 - worse_share) * (1 - better_share)
    correlation = -math.sqrt(worse_share * better_share / rest) if rest > 0 else -1.0
    return worse_share - better_share + math.sqrt(above**2 + below**2 - 2 * correlation * above * below)


def mean_lower_bound(values: npt.ArrayLike, *, confidence: float, shares: bool = False) -> tuple[float, float]:
    """Mean and its one-sided lower bound.

    Args:
        values: one per example [examples].
        confidence: of the one-sided bound.
        shares: the values are shares of right answers: when all are 0 or 1 the bound is Clopper-Pearson's, which sees that a
            sample without a failure does not prove that there is none. Else Student's t.

    Raises:
        ValueError: no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("no values to bound the mean of")
    mean = float(array.mean())
    if shares and bool(np.isin(array, (0.0, 1.0)).all()):
        return mean, share_lower_bound(int(array.sum()), array.size, confidence=confidence)
    if array.size == 1:
        return mean, -1.0
    from scipy.stats import t

    return mean, mean - float(t.ppf(confidence, array.size - 1)) * float(array.std(ddof=1)) / float(np.sqrt(array.size))


def mean_upper_bound(values: npt.ArrayLike, *, confidence: float, shares: bool = False) -> float:
    """One-sided upper bound of the mean of values that are at most 1; arguments as of :func:`mean_lower_bound`."""
    return 1 - mean_lower_bound(1 - np.asarray(values, dtype=np.float64), confidence=confidence, shares=shares)[1]

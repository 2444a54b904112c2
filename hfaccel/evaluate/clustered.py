"""Means over tokens with bounds over texts, because the tokens of a text hang together.

A mean over tokens is a ratio estimator: what all texts sum up to / how many tokens they have (Cochran, Sampling Techniques, 1977,
chapter 6). Its standard error is the cluster-robust jackknife over texts, which does not shrink where one text holds most tokens
(CR3; Bell and McCaffrey, Survey Methodology 28, 2002; MacKinnon, Nielsen and Webb, Journal of Applied Econometrics 38, 2023). Few
texts make wide bounds by Student's t with texts - 1 degrees of freedom; one text makes none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hfaccel.evaluate.bounds import share_lower_bound
from hfaccel.evaluate.metrics import Floats


@dataclass(frozen=True)
class ClusteredMean:
    """A mean over tokens.

    Attributes:
        mean: the mean.
        error: its standard error over texts; infinite for one text.
        tokens: how many.
        clusters: how many texts.
    """

    mean: float
    error: float
    tokens: int
    clusters: int

    def margin(self, confidence: float) -> float:
        """How far from the mean its one-sided bound lies; infinite for one text."""
        return self.error * _student(confidence, self.clusters - 1) if self.clusters > 1 else math.inf

    def share_lower_bound(self, confidence: float) -> float:
        """One-sided lower bound of a mean of values that are 0 or 1.

        Clopper-Pearson's, with as many tokens as would be as good were they independent (Korn and Graubard, Survey Methodology 24,
        1998). Where all values are equal nothing is known of how texts vary, and the tokens count as independent: the bound of a
        share of 1 stays below 1 all the same. 0 for one text.
        """
        if self.clusters == 1:
            return 0.0
        spread = self.mean * (1 - self.mean)
        independent = float(self.tokens)
        if self.error > 0 and spread > 0:
            independent = min(independent, spread / self.error**2)
        ratio = _student(confidence, max(self.tokens - 1, 1)) / _student(confidence, self.clusters - 1)
        effective = independent * min(1.0, ratio**2)
        return share_lower_bound(self.mean * effective, effective, confidence=confidence)


def clustered_mean(values: Floats, clusters: npt.NDArray[np.int64]) -> ClusteredMean:
    """Mean and standard error.

    Args:
        values: one per token [tokens], at least one.
        clusters: number of the text of each token [tokens].
    """
    _, numbers = np.unique(clusters, return_inverse=True)
    tokens, sums = np.bincount(numbers).astype(np.float64), np.bincount(numbers, weights=values)
    count, mean = len(tokens), float(sums.sum() / tokens.sum())
    if count == 1:
        return ClusteredMean(mean, math.inf, len(values), count)
    # By how much the mean would move without the text; for texts of one length this is the usual formula.
    moves = (sums - mean * tokens) / (tokens.sum() - tokens)
    return ClusteredMean(mean, math.sqrt(float((moves**2).sum()) * (count - 1) / count), len(values), count)


def _student(confidence: float, freedom: int) -> float:
    from scipy.stats import t  # scipy is of the compile extra and slow to import

    return float(t.ppf(confidence, freedom))

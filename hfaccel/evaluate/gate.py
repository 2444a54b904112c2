"""How much worse than its source a candidate may be, with a one-sided confidence bound.

Methods:
    counts: right-or-wrong scores of examples that share no text: bounds in closed form from how many examples got worse and
        how many got better (:mod:`hfaccel.evaluate.bounds`).
    examples, groups, texts: paired bootstrap over these (:mod:`hfaccel.evaluate.resampling`).
    exact: with fewer than 5 examples judged differently a bootstrap hardly sees the losses of a rare kind; the Clopper-Pearson
        bound of the share of worse examples, times what the costliest of them costs, is a floor then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfaccel.evaluate.bounds import paired_lower_bound, paired_upper_bound, share_upper_bound
from hfaccel.evaluate.metrics import Floats, Metric
from hfaccel.evaluate.resampling import resample, units_of

FEW_DISCORDANT = 5
# Relative losses of a source that scores about nothing would be noise divided by nothing.
SMALLEST_SCALE = 0.01
MOST_EXAMPLES = 1_000_000
"""More than these are not proposed to anyone."""


@dataclass(frozen=True)
class Loss:
    """What a candidate loses on one metric.

    Attributes:
        metric: name of the metric.
        source: value of the source model.
        candidate: value of the candidate.
        loss: (source - candidate) / |source|; candidate - source of metrics that count errors (``wer``); positive is worse.
        lower_bound: one-sided lower bound of the loss: above the budget, the candidate is proven to be over it.
        upper_bound: one-sided upper bound of the loss: inside the budget, the candidate is proven to be inside.
        examples: how many examples were compared.
        method: how the bounds were found (``identical``, ``counts``, ``examples``, ``groups``, ``texts``; ``+exact`` where that
            floor decided).
        worse: how many examples only the source has right, where scores are right or wrong.
        better: how many examples only the candidate has right.
        labelled: whether references of the user were used.
    """

    metric: str
    source: float
    candidate: float
    loss: float
    lower_bound: float
    upper_bound: float
    examples: int
    method: str
    worse: int | None = None
    better: int | None = None
    labelled: bool = True

    def examples_needed(self, limit: float, *, confidence: float) -> int | None:
        """Roughly how many examples would bring the upper bound to ``limit``, were the loss as seen; None: no practical number.

        Args:
            limit: of the loss.
            confidence: of the upper bound.
        """
        if self.loss >= limit:
            return None
        if self.worse is None or self.better is None:
            shrinks = 1.0 if self.method.endswith("exact") else 2.0
            return round_up(self.examples * float((self.upper_bound - self.loss) / (limit - self.loss)) ** shrinks)
        scale = max(abs(self.source), SMALLEST_SCALE)
        low, high = 1.0, float(MOST_EXAMPLES)
        while high > low * 1.01:
            middle = math.sqrt(low * high)
            share = middle / self.examples
            bound = paired_upper_bound(self.worse * share, self.better * share, middle, confidence=confidence)
            low, high = (low, middle) if bound / scale <= limit else (middle, high)
        return round_up(high)


def round_up(examples: float) -> int | None:
    """A number of examples with two digits that count; None above a million."""
    if not examples < MOST_EXAMPLES * 0.98:
        return None
    unit = int(10 ** max(0, len(str(int(examples))) - 2))
    return math.ceil(examples / unit) * unit


def paired_loss(
    metric: Metric,
    source_predictions: Any,
    candidate_predictions: Any,
    references: Any,
    *,
    confidence: float,
    lower_confidence: float | None = None,
    clusters: Sequence[tuple[int, ...]] | None = None,
    resamples: int,
    seed: int,
    same_outputs: bool = True,
    largest_cost: float = 1.0,
) -> Loss:
    """Relative loss of the candidate with its one-sided bounds.

    Args:
        metric: the metric; its ``statistics`` take the predictions below.
        source_predictions: one per example.
        candidate_predictions: one per example, same order.
        references: one per example.
        confidence: of the upper bound.
        lower_confidence: of the lower bound; None takes that of the upper.
        clusters: text numbers of each example, where examples share texts.
        resamples: bootstrap draws.
        seed: of the draws.
        same_outputs: what equal predictions prove: True, that the models are the same (loss and bounds 0); False, when the raw
            outputs are known to differ, only that no difference showed on these examples, so that the exact bound applies.
        largest_cost: of an example that the candidate loses as a whole.
    """
    lower_confidence = confidence if lower_confidence is None else lower_confidence
    source, candidate = metric.statistics(source_predictions, references), metric.statistics(candidate_predictions, references)
    count = len(references)
    once = np.ones((1, count))
    source_value, candidate_value = float(metric.combine(source, once)[0]), float(metric.combine(candidate, once)[0])
    if _same(source_predictions, candidate_predictions) and (same_outputs or not metric.discrete):
        return Loss(metric.name, source_value, candidate_value, 0.0, 0.0, 0.0, count, "identical")
    scale = max(abs(source_value), SMALLEST_SCALE) if metric.higher_is_better else 1.0
    sign = 1.0 if metric.higher_is_better else -1.0
    units = units_of(clusters, count)
    method: str = units.method
    worse = better = None
    if units.method == "examples" and _right_or_wrong(source, candidate):
        worse, better = int((source > candidate).sum()), int((source < candidate).sum())
        lower = paired_lower_bound(worse, better, count, confidence=lower_confidence)
        upper = paired_upper_bound(worse, better, count, confidence=confidence)
        method = "counts"
    else:
        resampled = resample(
            lambda weights: sign * (metric.combine(source, weights) - metric.combine(candidate, weights)),
            units,
            resamples=resamples,
            seed=seed,
        )
        lower, upper = resampled.lower_bound(lower_confidence), resampled.upper_bound(confidence)
        floor = _exact_floor(metric, source, candidate, confidence, largest_cost) if metric.discrete else None
        if floor is not None and floor > upper:
            upper, method = floor, f"{method}+exact"
    loss = (source_value - candidate_value if metric.higher_is_better else candidate_value - source_value) / scale
    return Loss(
        metric.name, source_value, candidate_value, loss, lower / scale, upper / scale, count, method, worse=worse, better=better
    )


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return bool(np.array_equal(left, right))
    return list(left) == list(right)


def _right_or_wrong(source: Floats, candidate: Floats) -> bool:
    """Whether the metric is the mean of scores that are 0 or 1; statistics of one column are scores."""
    return source.shape[1] == 1 and bool(np.isin(source, (0.0, 1.0)).all() and np.isin(candidate, (0.0, 1.0)).all())


def _exact_floor(metric: Metric, source: Floats, candidate: Floats, confidence: float, largest_cost: float) -> float | None:
    """Upper bound of a loss that few examples show; None where enough differ for the bootstrap.

    The share of examples that got worse has an exact bound, and each may cost what the costliest one seen did. What was not seen, an
    example lost as a whole, may still be as frequent as it can be without showing.
    """
    differing, count = np.flatnonzero((source != candidate).any(axis=1)), len(source)
    if len(differing) >= FEW_DISCORDANT:
        return None
    once, sign = np.ones((1, count)), 1.0 if metric.higher_is_better else -1.0
    before, costs = metric.combine(source, once), []
    for example in differing:
        swapped = source.copy()
        swapped[example] = candidate[example]
        costs.append(count * sign * float((before - metric.combine(swapped, once))[0]))
    worse = [cost for cost in costs if cost > 0]
    unseen = share_upper_bound(0, count, confidence=confidence) * largest_cost
    return max(unseen, share_upper_bound(len(worse), count, confidence=confidence) * max(worse, default=0.0))

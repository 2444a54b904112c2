"""How much worse than its source a candidate may be, with 95 % confidence.

Methods:
    examples: paired bootstrap; both models are scored on the same draws (Efron and Tibshirani, An Introduction to the
        Bootstrap, 1993).
    groups: the same over groups of examples that share texts, where there are many small groups (cluster bootstrap).
    texts: where most examples hang together (similarity of all pairs of some documents), texts are drawn with replacement and an
        example counts as often as the product of its texts' counts: the vertex bootstrap of Snijders and Borgatti (1999),
        pigeonhole bootstrap in Owen (2007). Pairs of a text with its own copy do not exist and are left out.
    exact: with fewer than 5 examples judged differently a bootstrap hardly sees the losses of a rare kind; the Clopper-Pearson
        bound (Biometrika 26, 1934; with none seen about 3/n, the "rule of three") of the share of worse examples is a floor then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hfaccel.evaluate.metrics import Floats, Metric

CONFIDENCE = 0.95
FEW_DISCORDANT = 5
MINIMUM_GROUPS = 20
LARGEST_GROUP_SHARE = 0.05
# Relative losses of a source that scores about nothing would be noise divided by nothing.
SMALLEST_SCALE = 0.01
_WEIGHTS_PER_CHUNK = 2_000_000


@dataclass(frozen=True)
class Loss:
    """What a candidate loses on one metric.

    Attributes:
        metric: name of the metric.
        source: value of the source model.
        candidate: value of the candidate.
        loss: (source - candidate) / |source|; positive is worse.
        upper_bound: one-sided 95 % bound of the loss.
        examples: how many examples were compared.
        method: how the bound was found (``identical``, ``examples``, ``groups``, ``texts``; ``+exact`` where that floor decided).
        labelled: whether references of the user were used.
    """

    metric: str
    source: float
    candidate: float
    loss: float
    upper_bound: float
    examples: int
    method: str
    labelled: bool = True


def paired_loss(
    metric: Metric,
    source_predictions: Any,
    candidate_predictions: Any,
    references: Any,
    *,
    clusters: Sequence[tuple[int, ...]] | None = None,
    resamples: int,
    seed: int,
    same_outputs: bool = True,
) -> Loss:
    """Relative loss of the candidate with its one-sided 95 % bound.

    Args:
        metric: the metric; its ``statistics`` take the predictions below.
        source_predictions: one per example.
        candidate_predictions: one per example, same order.
        references: one per example.
        clusters: text numbers of each example, where examples share texts.
        resamples: bootstrap draws.
        seed: of the draws.
        same_outputs: what equal predictions prove: True, that the models are the same (loss and bound 0); False, when the raw
            outputs are known to differ, only that no difference showed on these examples, so that the exact floor applies.
    """
    source = metric.statistics(source_predictions, references)
    candidate = metric.statistics(candidate_predictions, references)
    count = len(references)
    once = np.ones((1, count))
    source_value, candidate_value = float(metric.combine(source, once)[0]), float(metric.combine(candidate, once)[0])
    if _same(source_predictions, candidate_predictions) and (same_outputs or not metric.discrete):
        return Loss(metric.name, source_value, candidate_value, 0.0, 0.0, count, "identical")
    scale = max(abs(source_value), SMALLEST_SCALE)
    method, units = _units(clusters, count)
    generator = np.random.default_rng(seed)
    rows = max(1, _WEIGHTS_PER_CHUNK // count)
    losses = []
    for start in range(0, resamples, rows):
        weights = _draw(units, min(rows, resamples - start), generator)
        losses.append(metric.combine(source, weights) - metric.combine(candidate, weights))
    bound = float(np.quantile(np.concatenate(losses), CONFIDENCE))
    floor = _exact_floor(source, candidate) if metric.discrete else None
    if floor is not None and floor > bound:
        bound, method = floor, f"{method}+exact"
    return Loss(
        metric.name, source_value, candidate_value, (source_value - candidate_value) / scale, bound / scale, count, method
    )


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return bool(np.array_equal(left, right))
    return list(left) == list(right)


def _exact_floor(source: Floats, candidate: Floats) -> float | None:
    """Upper bound of the share of worse examples; None when enough examples differ for the bootstrap."""
    differing = int((source != candidate).any(axis=1).sum())
    if differing >= FEW_DISCORDANT:
        return None
    # Statistics of one column are scores; of counts per class or entity any difference may be a loss.
    worse = int((source > candidate).sum()) if source.shape[1] == 1 else differing
    return 1 - share_lower_bound(len(source) - worse, len(source))


def _units(clusters: Sequence[tuple[int, ...]] | None, count: int) -> tuple[str, list[npt.NDArray[np.int64]]]:
    """What is drawn: arrays [examples] of unit numbers; an example's weight is the product over the arrays.

    A text that an example lacks has number -1 and weight 1.
    """
    if clusters is None or sum(len(set(cluster)) for cluster in clusters) == len(
        {text for cluster in clusters for text in cluster}
    ):
        return "examples", [np.arange(count)]
    groups = _connected(clusters)
    sizes = Counter(groups.tolist())
    if len(sizes) >= MINIMUM_GROUPS and max(sizes.values()) <= LARGEST_GROUP_SHARE * count:
        return "groups", [groups]
    width = max(len(set(cluster)) for cluster in clusters)
    number = {text: index for index, text in enumerate(dict.fromkeys(text for cluster in clusters for text in cluster))}
    table = np.full((count, width), -1, dtype=np.int64)
    for row, cluster in enumerate(clusters):
        for column, text in enumerate(dict.fromkeys(cluster)):
            table[row, column] = number[text]
    return "texts", list(table.T)


def _connected(clusters: Sequence[tuple[int, ...]]) -> npt.NDArray[np.int64]:
    """Number of the connected group of each example; examples that share a text are connected."""
    parent: dict[int, int] = {}

    def root(text: int) -> int:
        parent.setdefault(text, text)
        while parent[text] != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for cluster in clusters:
        for text in cluster[1:]:
            parent[root(text)] = root(cluster[0])
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(root(cluster[0]), len(numbers)) for cluster in clusters], dtype=np.int64)


def _draw(units: list[npt.NDArray[np.int64]], rows: int, generator: np.random.Generator) -> Floats:
    """Weights [rows, examples] of ``rows`` resamples."""
    total = int(max(int(unit.max()) for unit in units)) + 1
    drawn = generator.integers(0, total, size=(rows, total))
    flat = (drawn + np.arange(rows)[:, None] * total).ravel()
    counts = np.bincount(flat, minlength=rows * total).reshape(rows, total).astype(np.float64)
    padded = np.concatenate([counts, np.ones((rows, 1))], axis=1)  # number -1 reads the last column
    weights = padded[:, units[0]]
    for unit in units[1:]:
        weights = weights * padded[:, unit]
    return np.asarray(weights, dtype=np.float64)


def share_lower_bound(successes: int, total: int) -> float:
    """One-sided 95 % Clopper-Pearson lower bound of a share."""
    if successes == 0:
        return 0.0
    from scipy.stats import beta  # scipy is of the compile extra and slow to import

    return float(beta.ppf(1 - CONFIDENCE, successes, total - successes + 1))


def mean_lower_bound(values: npt.ArrayLike, *, shares: bool = False) -> tuple[float, float]:
    """Mean and its one-sided 95 % lower bound.

    Args:
        values: one per example [examples].
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
        return mean, share_lower_bound(int(array.sum()), array.size)
    if array.size == 1:
        return mean, -1.0
    from scipy.stats import t

    return mean, mean - float(t.ppf(CONFIDENCE, array.size - 1)) * float(array.std(ddof=1)) / float(np.sqrt(array.size))

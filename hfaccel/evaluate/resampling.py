"""The paired bootstrap: what is drawn, and bounds from the draws.

Methods:
    examples: both models are scored on the same draws (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).
    groups: the same over groups of examples that share texts, where there are many small groups (cluster bootstrap).
    texts: where most examples hang together (similarity of all pairs of some documents), texts are drawn with replacement and an
        example counts as often as the product of its texts' counts: the vertex bootstrap of Snijders and Borgatti (1999),
        pigeonhole bootstrap in Owen (2007). Pairs of a text with its own copy do not exist and are left out.

Bounds are corrected for bias and skew (BCa; Efron, JASA 82, 1987): losses are few and of one sign, and the plain percentile is
then too sure of itself. The skew comes from a jackknife over at most 200 sets of units: the third moment of sums of independent
terms is the sum of theirs, so sets do as well as single examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from hfaccel.evaluate.metrics import Floats

Method = Literal["examples", "groups", "texts"]
Numbers = npt.NDArray[np.int64]

MINIMUM_GROUPS = 20
LARGEST_GROUP_SHARE = 0.05
JACKKNIFE_SETS = 200
_WEIGHTS_PER_CHUNK = 2_000_000
_DRAWS_IN_TAIL = 10
"""A quantile with fewer draws beyond it is extrapolated from the one that has as many."""


@dataclass(frozen=True)
class Units:
    """What is drawn.

    Attributes:
        method: how.
        numbers: arrays [examples] of unit numbers; an example's weight is the product over the arrays. A text that an example
            lacks has number -1 and weight 1.
    """

    method: Method
    numbers: tuple[Numbers, ...]


def units_of(clusters: Sequence[tuple[int, ...]] | None, count: int) -> Units:
    """The units of ``count`` examples.

    Args:
        clusters: text numbers of each example, where examples share texts.
        count: how many examples there are.
    """
    if clusters is None or sum(len(set(cluster)) for cluster in clusters) == len(
        {text for cluster in clusters for text in cluster}
    ):
        return Units("examples", (np.arange(count),))
    groups = _connected(clusters)
    sizes = Counter(groups.tolist())
    if len(sizes) >= MINIMUM_GROUPS and max(sizes.values()) <= LARGEST_GROUP_SHARE * count:
        return Units("groups", (groups,))
    width = max(len(set(cluster)) for cluster in clusters)
    number = {text: index for index, text in enumerate(dict.fromkeys(text for cluster in clusters for text in cluster))}
    table = np.full((count, width), -1, dtype=np.int64)
    for row, cluster in enumerate(clusters):
        for column, text in enumerate(dict.fromkeys(cluster)):
            table[row, column] = number[text]
    return Units("texts", tuple(table.T))


def _connected(clusters: Sequence[tuple[int, ...]]) -> Numbers:
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


@dataclass(frozen=True)
class Resampled:
    """A value with what it became on other draws.

    Attributes:
        point: the value over all examples.
        draws: the value per resample [resamples].
        left_out: the value without one set of units [sets].
    """

    point: float
    draws: Floats
    left_out: Floats

    def upper_bound(self, confidence: float) -> float:
        """One-sided upper bound (BCa)."""
        return _bca(self.point, self.draws, self.left_out, confidence)

    def lower_bound(self, confidence: float) -> float:
        """One-sided lower bound (BCa)."""
        return -_bca(-self.point, -self.draws, -self.left_out, confidence)


def resample(value: Callable[[Floats], Floats], units: Units, *, resamples: int, seed: int) -> Resampled:
    """Draw units with replacement, and leave them out set by set.

    Args:
        value: weights [rows, examples] -> value per row [rows].
        units: what is drawn.
        resamples: how many draws.
        seed: of the draws.
    """
    count = len(units.numbers[0])
    generator = np.random.default_rng(seed)
    rows = max(1, _WEIGHTS_PER_CHUNK // count)
    draws = [value(_draw(units, min(rows, resamples - start), generator)) for start in range(0, resamples, rows)]
    point = float(value(np.ones((1, count)))[0])
    return Resampled(
        point, np.concatenate(draws), np.concatenate([value(weights) for weights in _leave_out(units, rows, generator)])
    )


def _draw(units: Units, rows: int, generator: np.random.Generator) -> Floats:
    """Weights [rows, examples] of ``rows`` resamples."""
    total = _unit_count(units)
    drawn = generator.integers(0, total, size=(rows, total))
    flat = (drawn + np.arange(rows)[:, None] * total).ravel()
    return _weights(units, np.bincount(flat, minlength=rows * total).reshape(rows, total).astype(np.float64))


def _leave_out(units: Units, rows: int, generator: np.random.Generator) -> list[Floats]:
    """Weights [sets, examples] in chunks of at most ``rows``, each row without one set of units."""
    total = _unit_count(units)
    sets = min(total, JACKKNIFE_SETS)
    set_of_unit = generator.permutation(np.arange(total) % sets)
    kept = (set_of_unit[None, :] != np.arange(sets)[:, None]).astype(np.float64)
    return [_weights(units, kept[start : start + rows]) for start in range(0, sets, rows)]


def _unit_count(units: Units) -> int:
    return int(max(int(numbers.max()) for numbers in units.numbers)) + 1


def _weights(units: Units, counts: Floats) -> Floats:
    """Weights [rows, examples] from how often each unit counts [rows, units]."""
    padded = np.concatenate([counts, np.ones((len(counts), 1))], axis=1)  # number -1 reads the last column
    weights = padded[:, units.numbers[0]]
    for numbers in units.numbers[1:]:
        weights = weights * padded[:, numbers]
    return np.asarray(weights, dtype=np.float64)


def _bca(point: float, draws: Floats, left_out: Floats, confidence: float) -> float:
    normal = NormalDist()
    below = float((draws < point).mean() + (draws == point).mean() / 2)
    bias = normal.inv_cdf(min(max(below, 1 / len(draws)), 1 - 1 / len(draws)))
    deviations = left_out.mean() - left_out
    squares = float((deviations**2).sum())
    skew = float((deviations**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    shifted = bias + normal.inv_cdf(confidence)
    wanted = bias + shifted / max(1 - skew * shifted, 0.25)
    edge = normal.inv_cdf(1 - _DRAWS_IN_TAIL / len(draws))
    if wanted <= edge:
        return float(np.quantile(draws, normal.cdf(wanted)))
    return point + (float(np.quantile(draws, normal.cdf(edge))) - point) * wanted / edge

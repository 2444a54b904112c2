"""Which MatMuls move the model's answers most when only they are quantized: no labels needed.

In a large graph whole blocks (layers, where they are known) are measured first, and single MatMuls only inside the blocks that
hold the error. Batches are taken one at a time, and each finding can be written down at once, so that a ranking that was killed
goes on where it stopped. One that runs out of time ranks by what it has measured.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np

from hfaccel.quant.calibration import Feeds

RANK_EACH_UP_TO = 48
"""So many MatMuls (eight layers of most encoders) are measured one by one: blocks would save a few seconds at most."""
HARMLESS_SHARE = 0.05
"""Blocks that hold no more of the summed block error than this, all together, are not looked into."""
STANDS_OUT = 4.0
"""A block this many times as bad as the median block is looked into even if one far worse makes its share of the sum tiny."""
RANKING_SHARE = 0.5
"""Of the time that a search has left, the most that its ranking takes: without a trial the best ranking finds nothing."""
_NOT_FINITE = 1e30
"""Error of answers that are not finite: worse than any other, and still a number that sums and JSON can hold."""

Sums = tuple[float, float]
"""How far answers moved, and what that is relative to; both add up over outputs and batches."""
Distance = Callable[[np.ndarray, np.ndarray], Sums]
"""From the reference's answers and those of the graph with something quantized, arrays of one shape."""


class Switchable(Protocol):
    """Like :class:`hfaccel.quant.switches.SwitchedGraph`."""

    @property
    def names(self) -> tuple[str, ...]:
        """The MatMuls that can be switched."""

    def switch_on(self, names: Sequence[str]) -> None:
        """Quantize exactly these."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""


class Ledger(Protocol):
    """Where findings are kept: per batch, counted from 0, and set of quantized MatMuls."""

    def known_error(self, batch: int, quantized: Sequence[str]) -> Sums | None:
        """What was found before, or None."""

    def add_error(self, batch: int, quantized: Sequence[str], sums: Sums) -> None:
        """Write down a finding at once."""


def squared_error(reference: np.ndarray, actual: np.ndarray) -> Sums:
    """Squared distance, relative to the squares of the reference: for vectors and for scores."""
    difference = np.square(actual - reference).sum(dtype=np.float64)
    return float(difference), float(np.square(reference).sum(dtype=np.float64))


def divergence(reference: np.ndarray, actual: np.ndarray) -> Sums:
    """Kullback-Leibler divergence of the softmax over the last axis, relative to the number of rows: for logits [..., labels]."""
    expected, found = _log_softmax(reference), _log_softmax(actual)
    return float((np.exp(expected) * (expected - found)).sum()), float(math.prod(reference.shape[:-1]))


def rank_by_sensitivity(
    graph: Switchable,
    batches: Iterable[Feeds],
    *,
    blocks: Sequence[Sequence[str]] | None = None,
    distance: Distance = squared_error,
    ledger: Ledger | None = None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> list[tuple[str, float]]:
    """MatMul names with the error of the outputs when only that one is quantized, worst first.

    Args:
        graph: with the MatMuls to rank; it is left with none switched on.
        batches: a few padded batches of real text, gone through once for the blocks and once more for what is inside of them.
            Beside one batch, answers of two runs on it are held. Not an iterator, which is spent after the first time.
        blocks: the MatMuls, parted as :func:`blocks_of` does, which is the default.
        distance: :func:`squared_error` or :func:`divergence`.
        ledger: findings of a ranking of the same graph and batches that was killed, and where to write down new ones.
        out_of_time: asked before each run; once it says so, nothing more is measured.

    Returns:
        For a MatMul in a harmless block, or one that there was no time for, an equal share of its block's error; a block that there
        was no time for is taken to be like the middle one of the others.

    Raises:
        TypeError: ``batches`` is an iterator.
    """
    if isinstance(batches, Iterator):
        raise TypeError("batches are gone through twice: give a list or another iterable, not an iterator or generator")
    parted = [tuple(block) for block in (blocks if blocks is not None else blocks_of(graph.names))]
    block_errors = _like_the_middle(_errors(graph, batches, parted, distance, ledger, out_of_time))
    opened = {index for index in blocks_to_open(block_errors) if len(parted[index]) > 1}
    inside = [(name,) for index in sorted(opened, key=lambda index: -block_errors[index]) for name in parted[index]]
    errors = _errors(graph, batches, inside, distance, ledger, out_of_time)
    found = {names[0]: error for names, error in zip(inside, errors, strict=True) if error is not None}
    for names, error in zip(parted, block_errors, strict=True):
        for name in names:
            found.setdefault(name, error / len(names))
    return sorted(((name, found[name]) for name in graph.names), key=lambda item: -item[1])


def ranking_deadline(deadline: float) -> float:
    """When the ranking of a search must end that has until ``deadline``, both of ``time.monotonic``."""
    now = time.monotonic()
    return now + RANKING_SHARE * max(0.0, deadline - now)


def blocks_of(names: Sequence[str], layers: Mapping[str, int | None] = MappingProxyType({})) -> list[tuple[str, ...]]:
    """MatMuls parted into the blocks that are measured as a whole first; every one alone where they are few.

    Args:
        names: of the MatMuls, in graph order.
        layers: number of the layer that each belongs to. Those beside the layers or not known, and layers out of proportion (all
            layers share their weights, for example), are cut into runs of about the square root of ``len(names)``.
    """
    if len(names) <= RANK_EACH_UP_TO:
        return [(name,) for name in names]
    groups: dict[int | None, list[str]] = {}
    for name in names:
        groups.setdefault(layers.get(name), []).append(name)
    size = round(math.sqrt(len(names)))
    blocks: list[tuple[str, ...]] = []
    for layer, members in groups.items():
        whole = layer is not None and len(members) <= 2 * size
        step = len(members) if whole else math.ceil(len(members) / math.ceil(len(members) / size))
        blocks += [tuple(members[start : start + step]) for start in range(0, len(members), step)]
    return blocks


def blocks_to_open(errors: Sequence[float]) -> list[int]:
    """Indices of the blocks worth looking into, worst first: all but those that are harmless even together.

    What is left out holds at most ``HARMLESS_SHARE`` of the sum, and none of it stands out from the median block.
    """
    order = sorted(range(len(errors)), key=lambda index: -errors[index])
    allowed, typical, left_out = HARMLESS_SHARE * sum(errors), statistics.median(errors), 0.0
    while order:
        least = errors[order[-1]]
        left_out += least
        if left_out > allowed or least > STANDS_OUT * typical:
            break
        order.pop()
    return order


def _like_the_middle(errors: Sequence[float | None]) -> list[float]:
    """The errors; those not known are the median of the others."""
    middle = statistics.median([error for error in errors if error is not None] or [0.0])
    return [middle if error is None else error for error in errors]


def _errors(
    graph: Switchable,
    batches: Iterable[Feeds],
    subsets: Sequence[Sequence[str]],
    distance: Distance,
    ledger: Ledger | None,
    out_of_time: Callable[[], bool],
) -> list[float | None]:
    """Error of each set of MatMuls, quantized with all others in float, None where no batch was run before time was up.

    The reference runs only where something is not known.
    """
    totals, measured = np.zeros((len(subsets), 2)), [False] * len(subsets)
    for number, feeds in enumerate(batches if subsets else ()):
        reference: list[np.ndarray] | None = None
        for index, names in enumerate(subsets):
            sums = ledger.known_error(number, names) if ledger is not None else None
            if sums is None and out_of_time():
                continue
            if sums is None:
                reference = _answers(graph, (), feeds) if reference is None else reference
                pairs = zip(reference, _answers(graph, names, feeds), strict=True)
                moved, relative_to = zip(*(distance(expected, actual) for expected, actual in pairs), strict=True)
                sums = sum(moved), sum(relative_to)
                if ledger is not None:
                    ledger.add_error(number, names, sums)
            totals[index] += sums
            measured[index] = True
    graph.switch_on(())
    errors = totals[:, 0] / np.maximum(totals[:, 1], 1e-30)
    finite = [float(error) if error < _NOT_FINITE else _NOT_FINITE for error in errors]  # no comparison holds for NaN
    return [error if ran else None for error, ran in zip(finite, measured, strict=True)]


def _answers(graph: Switchable, names: Sequence[str], feeds: Feeds) -> list[np.ndarray]:
    """Outputs with exactly these MatMuls quantized; of an output [batch, sequence, channels] the positions that hold text."""
    graph.switch_on(names)
    text = feeds["attention_mask"].astype(bool)
    outputs = graph.run(feeds).values()
    return [array[text] if array.ndim == 3 and array.shape[:2] == text.shape else array for array in outputs]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))

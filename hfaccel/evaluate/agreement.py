"""Comparison of raw outputs without labels: does the candidate say what the source says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hfaccel.artifact.contract import ProblemType, Task
from hfaccel.evaluate.metrics import Floats

RawOutput = Mapping[str, npt.NDArray[np.floating]]


@dataclass(frozen=True)
class Expected:
    """How probably decisions are right if the source's probabilities are, [examples] each.

    Attributes:
        source: its own decisions.
        candidate: the candidate's.
        worst: the decisions that it holds for the least probable.
    """

    source: Floats
    candidate: Floats
    worst: Floats


@dataclass(frozen=True)
class Agreement:
    """Agreement per example.

    Attributes:
        cosine: of the sentence embedding, the mean of ``last_hidden_state``, or the flattened logits [examples].
        top1: share of equal decisions [examples]; None for vectors. A decision is the top label of a position, each label's yes
            or no (multi-label), or the order against every other example (a single number per example).
        expected: how probably the decisions are right by the source's own probabilities; None for vectors and single numbers.
        kl: mean Kullback-Leibler divergence from the source in nats [examples]; None for vectors, multi-label and single numbers.
        non_finite: how many examples have a candidate output that is not finite.
        identical: whether all outputs are equal to the bit.
    """

    cosine: Floats
    top1: Floats | None
    expected: Expected | None
    kl: Floats | None
    non_finite: int
    identical: bool


def compare_outputs(
    task: Task, source: Sequence[RawOutput], candidate: Sequence[RawOutput], *, problem_type: ProblemType | None = None
) -> Agreement:
    """Compare outputs example by example.

    Args:
        task: decides what the outputs mean.
        source: per example ``logits`` [labels] or [sequence, labels], ``start_logits`` and ``end_logits`` [sequence],
            ``last_hidden_state`` [sequence, hidden] or ``sentence_embedding`` [dim], without padding.
        candidate: the same examples in the same order.
        problem_type: of classification tasks.

    Raises:
        ValueError: the two differ in number or shape, or there are none.
    """
    if len(source) != len(candidate) or not source:
        raise ValueError(f"{len(candidate)} candidate outputs for {len(source)} source outputs")
    vectors = task in ("sentence-similarity", "feature-extraction")
    left = [vector_of(output) if vectors else _logits(output) for output in source]
    right = [vector_of(output) if vectors else _logits(output) for output in candidate]
    for index, (first, second) in enumerate(zip(left, right, strict=True)):
        if first.shape != second.shape:
            raise ValueError(f"example {index}: output shape {second.shape}, the source has {first.shape}")
    non_finite = sum(not all(np.isfinite(array).all() for array in output.values()) for output in candidate)
    identical = all(
        first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)
        for first, second in zip(source, candidate, strict=True)
    )
    left, right = [np.nan_to_num(array) for array in left], [np.nan_to_num(array) for array in right]
    cosines = np.array([cosine(first, second) for first, second in zip(left, right, strict=True)])
    if vectors:
        return Agreement(cosines, None, None, None, non_finite, identical)
    many_labels = problem_type == "multi_label_classification"
    if left[0].shape[-1] == 1 and not many_labels:
        order = _same_order(*(np.array([array.ravel()[0] for array in side]) for side in (left, right)))
        return Agreement(cosines, order, None, None, non_finite, identical)
    decide, pairs = _labels_of if many_labels else _top_label, list(zip(left, right, strict=True))
    same, *expected = (np.array(column) for column in zip(*(decide(*pair) for pair in pairs), strict=True))
    divergence = None if many_labels else np.array([_divergence(*pair) for pair in pairs])
    return Agreement(cosines, same, Expected(*expected), divergence, non_finite, identical)


def _top_label(source: Floats, candidate: Floats) -> tuple[float, float, float, float]:
    """Of logits [..., labels]: the share of equal decisions, and how probably the source's, the candidate's and the worst are right."""
    probabilities = np.exp(_log_softmax(source))
    first, second = source.argmax(axis=-1), candidate.argmax(axis=-1)
    own, others = (np.take_along_axis(probabilities, top[..., None], axis=-1).mean() for top in (first, second))
    return float(np.mean(first == second)), float(own), float(others), float(probabilities.min(axis=-1).mean())


def _labels_of(source: Floats, candidate: Floats) -> tuple[float, float, float, float]:
    """The same where each label is a yes or no of its own."""
    certainty = 1 / (1 + np.exp(-np.abs(source)))
    same = (source > 0) == (candidate > 0)
    others = np.where(same, certainty, 1 - certainty)
    return float(same.mean()), float(certainty.mean()), float(others.mean()), float(1 - certainty.mean())


def vector_of(output: RawOutput) -> Floats:
    """The vector that stands for the text: the sentence embedding, or the mean of the token vectors [dim]."""
    if "sentence_embedding" in output:
        return np.asarray(output["sentence_embedding"], dtype=np.float64).ravel()
    mean: Floats = np.asarray(output["last_hidden_state"], dtype=np.float64).mean(axis=0)
    return mean


def cosine(left: Floats, right: Floats) -> float:
    """Cosine of two arrays read as vectors; two zero vectors are equal (1), one alone is not (0)."""
    first, second = left.ravel(), right.ravel()
    lengths = float(np.linalg.norm(first) * np.linalg.norm(second))
    if lengths == 0:
        return float(np.array_equal(first, second))
    return float(np.clip(first @ second / lengths, -1, 1))


def _logits(output: RawOutput) -> Floats:
    """Logits with the decision along the last axis; start and end of an answer are two rows."""
    if "start_logits" in output:
        return np.stack([output["start_logits"], output["end_logits"]]).astype(np.float64)
    return np.asarray(output["logits"], dtype=np.float64)


def _divergence(source: Floats, candidate: Floats) -> float:
    first, second = _log_softmax(source), _log_softmax(candidate)
    return max(0.0, float((np.exp(first) * (first - second)).sum(axis=-1).mean()))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _same_order(source: Floats, candidate: Floats) -> Floats:
    """Per example the share of other examples that it stands to in the same order (above, below, equal) in both."""
    if len(source) == 1:
        return np.ones(1)
    equal = [
        int((np.sign(value - source) == np.sign(other - candidate)).sum()) - 1
        for value, other in zip(source, candidate, strict=True)
    ]
    return np.array(equal, dtype=np.float64) / (len(source) - 1)

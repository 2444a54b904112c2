"""Guards over parts of the data: a candidate that is good on the whole must not be proven bad on texts of one length, label or language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hfaccel.artifact.contract import ProblemType, Task
from hfaccel.evaluate.agreement import Agreement
from hfaccel.evaluate.bounds import mean_lower_bound, mean_upper_bound
from hfaccel.evaluate.dataset import Dataset
from hfaccel.evaluate.gate import Loss, paired_loss
from hfaccel.evaluate.metrics import METRICS, Floats, Metric
from hfaccel.recipe.schema import AccuracySection

QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Slice:
    """Examples that have something in common.

    Attributes:
        name: what it is, for example ``length 12-40 characters``, ``label positive``, ``language de``.
        kind: what they have in common: length, label, or the value of a column.
        members: numbers of the examples, ascending.
    """

    name: str
    kind: Literal["length", "label", "column"]
    members: tuple[int, ...]

    def first(self, examples: int) -> Slice:
        """The part of it that lies in the first ``examples`` examples."""
        return Slice(self.name, self.kind, tuple(member for member in self.members if member < examples))


@dataclass(frozen=True)
class SliceLoss:
    """What a candidate loses on a slice.

    Attributes:
        name: of the slice.
        metric: of the values; ``agreement`` or ``cosine`` with the source (whose own value is 1) without labels.
        examples: how many examples of the slice were compared.
        source: value of the source model.
        candidate: value of the candidate.
        loss: relative to the source; positive is worse.
        lower_bound: of the loss, one-sided; all slices together are wrong in at most 5 %.
        upper_bound: of the loss, likewise.
        limit: of the loss; a lower bound above it fails the candidate.
    """

    name: str
    metric: str
    examples: int
    source: float
    candidate: float
    loss: float
    lower_bound: float
    upper_bound: float
    limit: float


def find_slices(dataset: Dataset, labels: Sequence[str], task: Task, problem_type: ProblemType | None) -> tuple[Slice, ...]:
    """Slices by length (quartiles of the data), by label (classification), and by the values of the slice column.

    Args:
        dataset: the examples.
        labels: label names in id order.
        task: decides whether examples have a label to be sliced by.
        problem_type: of classification tasks.
    """
    slices = _by_length(dataset)
    classes = task == "text-classification" and problem_type in ("single_label_classification", "multi_label_classification")
    if dataset.labelled and classes:
        groups: dict[str, list[int]] = {}
        for index, example in enumerate(dataset.examples):
            for label in example.label if isinstance(example.label, tuple) else (example.label,):
                known = isinstance(label, int) and label < len(labels)
                groups.setdefault(labels[label] if known else str(label), []).append(index)
        slices += _named("label", "label", groups)
    values: dict[str, list[int]] = {}
    for index, example in enumerate(dataset.examples):
        if example.slice is not None:
            values.setdefault(example.slice, []).append(index)
    return tuple(slices + _named(dataset.slice_column, "column", values))


def _named(prefix: str, kind: Literal["label", "column"], groups: Mapping[str, Sequence[int]]) -> list[Slice]:
    """A slice per group; a single group is no slice."""
    if len(groups) < 2:
        return []
    return [Slice(f"{prefix} {value}", kind, tuple(groups[value])) for value in sorted(groups)]


def _by_length(dataset: Dataset) -> list[Slice]:
    inputs = [example.model_input for example in dataset.examples]
    lengths = np.array([len(item) if isinstance(item, str) else sum(map(len, item)) for item in inputs])
    edges = np.unique(np.quantile(lengths, QUARTILES))
    bucket = np.searchsorted(edges, lengths, side="left")
    slices = []
    for number in np.unique(bucket):
        members = np.flatnonzero(bucket == number)
        low, high = lengths[members].min(), lengths[members].max()
        slices.append(Slice(f"length {low}-{high} characters", "length", tuple(members.tolist())))
    return slices if len(slices) > 1 else []


@dataclass(frozen=True)
class Scores:
    """What a metric compares.

    Attributes:
        metric: the metric.
        source: predictions of the source, one per example.
        candidate: predictions of the candidate, one per example.
        references: one per example.
        clusters: text numbers of each example, where examples share texts.
        same_outputs: whether all raw outputs are equal to the bit.
        largest_cost: what an example can cost at most.
    """

    metric: Metric
    source: Any
    candidate: Any
    references: Any
    clusters: Sequence[tuple[int, ...]] | None
    same_outputs: bool
    largest_cost: float = 1.0

    def loss(self, *, confidence: float, lower_confidence: float, resamples: int, seed: int) -> Loss:
        """The loss over these examples, as :func:`paired_loss` finds it."""
        return paired_loss(
            self.metric,
            self.source,
            self.candidate,
            self.references,
            confidence=confidence,
            lower_confidence=lower_confidence,
            clusters=self.clusters,
            resamples=resamples,
            seed=seed,
            same_outputs=self.same_outputs,
            largest_cost=self.largest_cost,
        )

    def part(self, item: Slice, metric: Metric) -> Scores:
        """The examples of a slice, by a metric."""
        source, candidate, references = (_taken(values, item) for values in (self.source, self.candidate, self.references))
        clusters = None if self.clusters is None else _taken(self.clusters, item)
        return Scores(metric, source, candidate, references, clusters, self.same_outputs, self.largest_cost)


def slice_losses(
    slices: Sequence[Slice],
    scores: Scores,
    *,
    problem_type: ProblemType | None,
    settings: AccuracySection,
    error: float,
    seed: int,
) -> tuple[SliceLoss, ...]:
    """Loss of each slice that has enough examples, with bounds that hold for all of them together (Bonferroni).

    Args:
        slices: over the examples.
        scores: of all examples; within one label the metric is accuracy, because other scores say nothing there.
        problem_type: of classification tasks.
        settings: the limits.
        error: how often any of the bounds may be wrong.
        seed: of the bootstrap.
    """
    large = [item for item in slices if len(item.members) >= settings.slice_examples]
    results = []
    for item in large:
        one_label = item.kind == "label" and problem_type == "single_label_classification"
        confidence = 1 - error / len(large)
        loss = scores.part(item, METRICS["accuracy"] if one_label else scores.metric).loss(
            confidence=confidence, lower_confidence=confidence, resamples=settings.resamples, seed=seed
        )
        values = (loss.source, loss.candidate, loss.loss, loss.lower_bound, loss.upper_bound)
        results.append(SliceLoss(item.name, loss.metric, loss.examples, *values, settings.slice_limit))
    return tuple(results)


def _taken(values: Any, item: Slice) -> Any:
    if isinstance(values, np.ndarray):
        return values[list(item.members)]
    return [values[member] for member in item.members]


def slice_agreements(
    slices: Sequence[Slice], dataset: Dataset, agreement: Agreement, *, settings: AccuracySection, error: float
) -> tuple[SliceLoss, ...]:
    """The same without labels: what is missing of full agreement with the source, or of a cosine of 1 for vectors.

    Its limit is as many times what the gate allows on the whole as the limit of the loss is of its budget.

    Args:
        slices: over the examples.
        dataset: what was compared.
        agreement: per example, or per distinct text where pairs are read one after the other.
        settings: the limits.
        error: how often any of the bounds may be wrong.
    """
    vectors = agreement.top1 is None
    values = agreement.cosine if agreement.top1 is None else agreement.top1
    if dataset.separate_pairs:
        values = _of_pairs(dataset, values)
    allowed = 1 - (settings.min_cosine if vectors else settings.min_same_order)
    limit = min(1.0, allowed * settings.slice_limit / settings.max_loss)
    large = [item for item in slices if len(item.members) >= settings.slice_examples]
    results = []
    for item in large:
        chosen, confidence = values[list(item.members)], 1 - error / len(large)
        mean, lower = mean_lower_bound(chosen, confidence=confidence, shares=not vectors)
        upper = mean_upper_bound(chosen, confidence=confidence, shares=not vectors)
        if agreement.identical:
            mean = lower = upper = 1.0
        name = "cosine" if vectors else "agreement"
        results.append(SliceLoss(item.name, name, len(chosen), 1.0, mean, 1 - mean, 1 - upper, 1 - lower, limit))
    return tuple(results)


def _of_pairs(dataset: Dataset, values: Floats) -> Floats:
    """The worse of an example's texts."""
    of_text = dict(zip(dataset.texts(), values, strict=True))
    pairs = [example.text if isinstance(example.text, tuple) else (example.text,) for example in dataset.examples]
    return np.array([min(of_text[text] for text in pair) for pair in pairs])

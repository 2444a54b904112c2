"""Metrics over predictions that are already post-processed per example. Pure numpy.

Each metric reduces an example to a row of statistics once; its value follows from the rows and a weight per example. A bootstrap
is then a matrix of weights (how often each example was drawn), evaluated without a Python loop over the resamples.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from hfaccel.artifact.contract import ProblemType, Task
from hfaccel.errors import SettingsError
from hfaccel.evaluate.answers import (
    bleu,
    bleu_counts,
    character_counts,
    chrf,
    longest_common_words,
    word_error_rate,
    word_errors,
)

MetricName = Literal[
    "accuracy", "f1", "f1_micro", "mcc", "spearman", "pearson", "exact_match", "qa_f1", "entity_f1", "wer", "bleu", "chrf", "rouge_l"
]  # fmt: skip
METRIC_NAMES: tuple[MetricName, ...] = get_args(MetricName)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: its name in settings and reports.
        tasks: tasks that it fits.
        statistics: predictions and references -> statistics [examples, k].
        combine: statistics [examples, k] and weights [resamples, examples] -> value per resample [resamples].
        discrete: right-or-wrong statistics, so that models may differ without differing on a small sample.
        higher_is_better: else it counts errors, and its loss is what it grows by, not a share of the source's value: a source
            with hardly any errors would make any other error a huge share.
    """

    name: str
    tasks: tuple[Task, ...]
    statistics: Callable[[Any, Any], Floats]
    combine: Callable[[Floats, Floats], Floats]
    discrete: bool = True
    higher_is_better: bool = True

    def compute(self, predictions: Any, references: Any, index: npt.NDArray[np.int64] | None = None) -> float:
        """The value over all examples, or over those that ``index`` names (repeated ones count again).

        Raises:
            ValueError: predictions and references differ in number, or are empty.
        """
        if len(predictions) != len(references) or len(references) == 0:
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        count = len(references)
        weights = np.ones(count) if index is None else np.bincount(index, minlength=count).astype(np.float64)
        return float(self.combine(self.statistics(predictions, references), weights[None, :])[0])


def default_metric(task: Task, problem_type: ProblemType | None) -> MetricName:
    """The metric that gates a task when the user names none.

    Raises:
        SettingsError: the task has no labels to compare with.
    """
    if task == "text-classification":
        if problem_type == "multi_label_classification":
            return "f1_micro"
        return "spearman" if problem_type == "regression" else "accuracy"
    names: dict[Task, MetricName] = {
        "token-classification": "entity_f1",
        "question-answering": "qa_f1",
        "sentence-similarity": "spearman",
        "text-ranking": "spearman",
        "text-generation": "rouge_l",
        "text2text-generation": "rouge_l",
        "automatic-speech-recognition": "wer",
    }
    if task not in names:
        raise SettingsError(f"{task} has no metric", hint="it is compared with the source without labels")
    return names[task]


def resolve_metric(name: MetricName | None, task: Task, problem_type: ProblemType | None) -> Metric:
    """The metric to use.

    Raises:
        SettingsError: the metric does not fit the task.
    """
    metric = METRICS[name or default_metric(task, problem_type)]
    correlation = metric.name in ("spearman", "pearson")
    fits = task in metric.tasks
    if fits and task == "text-classification":
        fits = correlation == (problem_type == "regression")
        if problem_type == "multi_label_classification":
            fits = fits and metric.name != "mcc"
    if not fits:
        kind = f"{task} ({problem_type})" if problem_type else task
        raise SettingsError(f"metric '{metric.name}' does not fit {kind}", hint=f"use {default_metric(task, problem_type)}")
    return metric


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Quotient, 0 where the denominator is 0."""
    result: Floats = np.divide(numerator, denominator, out=np.zeros_like(numerator, dtype=np.float64), where=denominator != 0)
    return result


def _weighted_mean(statistics: Floats, weights: Floats) -> Floats:
    return _ratio(weights @ statistics[:, 0], weights.sum(axis=1))


def _correct(predictions: Any, references: Any) -> Floats:
    same = (np.asarray(predictions) == np.asarray(references)).reshape(len(references), -1)
    correct: Floats = same.all(axis=1, keepdims=True).astype(np.float64)
    return correct


def _one_hot(predictions: Any, references: Any) -> tuple[Floats, Floats]:
    """Predictions and references as 0/1 [examples, classes], over the classes that occur; indicator matrices stay as they are."""
    predicted, expected = np.asarray(predictions), np.asarray(references)
    if predicted.ndim == 2:
        return predicted.astype(np.float64), expected.astype(np.float64)
    classes = np.unique(np.concatenate([predicted, expected]))
    return (predicted[:, None] == classes).astype(np.float64), (expected[:, None] == classes).astype(np.float64)


def _class_counts(predictions: Any, references: Any) -> Floats:
    """True positives, predicted and expected per class, side by side: [examples, 3 * classes]."""
    predicted, expected = _one_hot(predictions, references)
    return np.concatenate([predicted * expected, predicted, expected], axis=1)


def _macro_f1(statistics: Floats, weights: Floats) -> Floats:
    hits, predicted, expected = np.split(weights @ statistics, 3, axis=1)
    occurring = ((predicted + expected) > 0).sum(axis=1)
    return _ratio(_ratio(2 * hits, predicted + expected).sum(axis=1), occurring.astype(np.float64))


def _micro_counts(predictions: Any, references: Any) -> Floats:
    predicted, expected = _one_hot(predictions, references)
    hits = (predicted * expected).sum(axis=1)
    return np.stack([hits, predicted.sum(axis=1), expected.sum(axis=1)], axis=1)


def _micro_f1(statistics: Floats, weights: Floats) -> Floats:
    totals = weights @ statistics
    return _ratio(2 * totals[:, 0], totals[:, 1] + totals[:, 2])


def _matthews(statistics: Floats, weights: Floats) -> Floats:
    """Multi-class Matthews correlation (Gorodkin's R_K) from class counts."""
    hits, predicted, expected = np.split(weights @ statistics, 3, axis=1)
    total, correct = weights.sum(axis=1), hits.sum(axis=1)
    covariance = correct * total - (predicted * expected).sum(axis=1)
    spread = (total**2 - (predicted**2).sum(axis=1)) * (total**2 - (expected**2).sum(axis=1))
    return _ratio(covariance, np.sqrt(np.maximum(spread, 0)))


def _columns(predictions: Any, references: Any) -> Floats:
    return np.stack([np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)], axis=1)


def _correlation(left: Floats, right: Floats, weights: Floats) -> Floats:
    """Weighted Pearson correlation per resample; an undefined one (a constant side) counts as 0."""
    total = np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    left = left - (weights * left).sum(axis=1, keepdims=True) / total
    right = right - (weights * right).sum(axis=1, keepdims=True) / total
    covariance = (weights * left * right).sum(axis=1)
    spread = np.sqrt((weights * left**2).sum(axis=1) * (weights * right**2).sum(axis=1))
    return np.clip(_ratio(covariance, np.where(spread > 1e-12, spread, 0)), -1, 1)


def _pearson(statistics: Floats, weights: Floats) -> Floats:
    deviations = statistics - statistics.mean(axis=0)
    scaled = _ratio(deviations, np.broadcast_to(np.abs(deviations).max(axis=0), deviations.shape))
    return _correlation(scaled[None, :, 0], scaled[None, :, 1], weights)


def _spearman(statistics: Floats, weights: Floats) -> Floats:
    return _correlation(_weighted_ranks(statistics[:, 0], weights), _weighted_ranks(statistics[:, 1], weights), weights)


def _weighted_ranks(values: Floats, weights: Floats) -> Floats:
    """Average rank of each example in each resample, scaled to 0..1: [resamples, examples]; copies of an example tie."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    group_weights = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = np.cumsum(group_weights, axis=1) - group_weights / 2
    group_of_example = np.empty(len(values), dtype=np.int64)
    group_of_example[order] = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(values))))
    spread: Floats = ranks[:, group_of_example] / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    return spread


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, English articles and extra spaces (the SQuAD convention)."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def _exact_match(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> Floats:
    return _best_of_answers(predictions, references, lambda left, right: float(left == right))


def _answer_f1(predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> Floats:
    return _best_of_answers(predictions, references, _word_f1)


def _best_of_answers(
    predictions: Sequence[str], references: Sequence[tuple[str, ...]], score: Callable[[str, str], float]
) -> Floats:
    rows = [
        max(score(normalize_answer(prediction), normalize_answer(answer)) for answer in (answers or ("",)))
        for prediction, answers in zip(predictions, references, strict=True)
    ]
    return np.array(rows, dtype=np.float64)[:, None]


def _word_f1(prediction: str, answer: str) -> float:
    predicted, expected = prediction.split(), answer.split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def _entity_counts(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> Floats:
    """Entities found, predicted and expected per example (seqeval's reading of BIO tags)."""
    from seqeval.metrics.sequence_labeling import get_entities  # its import pulls scikit-learn

    rows = []
    for predicted_tags, expected_tags in zip(predictions, references, strict=True):
        predicted, expected = set(get_entities(list(predicted_tags))), set(get_entities(list(expected_tags)))
        rows.append([len(predicted & expected), len(predicted), len(expected)])
    return np.array(rows, dtype=np.float64)


_CLASSIFICATION: tuple[Task, ...] = ("text-classification",)
_SCORED: tuple[Task, ...] = ("text-classification", "sentence-similarity", "text-ranking")
_GENERATED: tuple[Task, ...] = ("text-generation", "text2text-generation")
_WRITTEN: tuple[Task, ...] = ("text2text-generation", "automatic-speech-recognition")
METRICS: Mapping[MetricName, Metric] = {
    "accuracy": Metric("accuracy", _CLASSIFICATION, _correct, _weighted_mean),
    "f1": Metric("f1", _CLASSIFICATION, _class_counts, _macro_f1),
    "f1_micro": Metric("f1_micro", _CLASSIFICATION, _micro_counts, _micro_f1),
    "mcc": Metric("mcc", _CLASSIFICATION, _class_counts, _matthews),
    "spearman": Metric("spearman", _SCORED, _columns, _spearman, discrete=False),
    "pearson": Metric("pearson", _SCORED, _columns, _pearson, discrete=False),
    "exact_match": Metric("exact_match", ("question-answering", *_GENERATED), _exact_match, _weighted_mean),
    "qa_f1": Metric("qa_f1", ("question-answering",), _answer_f1, _weighted_mean),
    "entity_f1": Metric("entity_f1", ("token-classification",), _entity_counts, _micro_f1),
    "wer": Metric("wer", _WRITTEN, word_errors, word_error_rate, higher_is_better=False),
    "bleu": Metric("bleu", _GENERATED, bleu_counts, bleu),
    "chrf": Metric("chrf", ("text-generation", *_WRITTEN), character_counts, chrf),
    "rouge_l": Metric("rouge_l", _GENERATED, longest_common_words, _weighted_mean),
}
EXPECTED_ACCURACY = Metric("expected_accuracy", (), lambda scores, _: scores[:, None], _weighted_mean)
"""Without labels: how many answers are right if the source's probabilities are; its predictions are those scores [examples]."""

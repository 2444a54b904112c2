"""From raw outputs per example to what metrics compare. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfaccel.artifact.contract import ProblemType, Task
from hfaccel.evaluate.agreement import RawOutput, cosine, vector_of
from hfaccel.evaluate.dataset import Dataset

WordIds = Sequence[int | None]


def predictions_from_outputs(
    task: Task,
    problem_type: ProblemType | None,
    labels: Sequence[str],
    dataset: Dataset,
    outputs: Sequence[RawOutput],
    *,
    word_ids: Sequence[WordIds] | None = None,
) -> tuple[Any, Any]:
    """Predictions and references, one per example.

    Args:
        task: classification, similarity, ranking or token classification; answers go through :func:`predictions_from_answers`.
        problem_type: of text-classification.
        labels: label names in id order.
        dataset: the examples.
        outputs: raw outputs per example; for sentence-similarity per text of ``dataset.texts()``.
        word_ids: per example the word of each token (None for special tokens); token-classification only.

    Raises:
        ValueError: the outputs do not fit the data in number, or the task has no predictions.
    """
    expected = len(dataset.texts()) if task == "sentence-similarity" else len(dataset.examples)
    if len(outputs) != expected:
        raise ValueError(f"{len(outputs)} outputs for {expected} inputs of {dataset.name}")
    return _predictions(task, problem_type, labels, dataset, outputs, word_ids), references_of(
        task, problem_type, labels, dataset
    )


def _predictions(
    task: Task,
    problem_type: ProblemType | None,
    labels: Sequence[str],
    dataset: Dataset,
    outputs: Sequence[RawOutput],
    word_ids: Sequence[WordIds] | None,
) -> Any:
    if task == "sentence-similarity":
        vectors = dict(zip(dataset.texts(), (vector_of(output) for output in outputs), strict=True))
        return np.array([cosine(vectors[example.text[0]], vectors[example.text[1]]) for example in dataset.examples])
    if task == "token-classification":
        if word_ids is None:
            raise ValueError("token-classification needs word_ids")
        return [
            tags_of_words(np.asarray(output["logits"]).argmax(axis=-1).tolist(), words, len(example.words or ()), labels)
            for output, words, example in zip(outputs, word_ids, dataset.examples, strict=True)
        ]
    if task not in ("text-classification", "text-ranking"):
        raise ValueError(f"{task} has no predictions to compare with labels")
    logits = np.stack([np.asarray(output["logits"], dtype=np.float64).ravel() for output in outputs])
    if task == "text-ranking":
        return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
    if problem_type == "regression":
        return logits[:, 0]
    return logits > 0 if problem_type == "multi_label_classification" else logits.argmax(axis=1)


def references_of(task: Task, problem_type: ProblemType | None, labels: Sequence[str], dataset: Dataset) -> Any:
    """The references in the form of the predictions; what stands there when the data is unlabelled has no meaning."""
    examples = dataset.examples
    if task in ("question-answering", "text2text-generation", "automatic-speech-recognition"):
        return [example.answers for example in examples]
    if not dataset.labelled:
        return [None] * len(examples)
    if task == "token-classification":
        return [tuple(example.label) for example in examples]
    if task == "text-classification" and problem_type == "multi_label_classification":
        indicator = np.zeros((len(examples), len(labels)), dtype=bool)
        for row, example in enumerate(examples):
            if isinstance(example.label, float):  # of a single label: its yes or no
                indicator[row, 0] = example.label > 0.5
                continue
            indicator[row, list(example.label) if isinstance(example.label, tuple) else [example.label]] = True
        return indicator
    numbers = task != "text-classification" or problem_type == "regression"
    return np.array([example.label for example in examples], dtype=np.float64 if numbers else np.int64)


def tags_of_words(label_ids: Sequence[int], word_ids: WordIds, words: int, labels: Sequence[str]) -> tuple[str, ...]:
    """One tag per word, of its first token; ``O`` for words that were cut off."""
    first: dict[int, str] = {}
    for label_id, word in zip(label_ids, word_ids, strict=True):
        if word is not None and word not in first:
            first[word] = labels[label_id]
    return tuple(first.get(word, "O") for word in range(words))


def word_ids_from_offsets(word_spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """The word of each token from character offsets; special tokens have an empty offset and no word."""
    result: list[int | None] = []
    for start, end in offsets:
        inside = (index for index, (first, last) in enumerate(word_spans) if start < last and end > first)
        result.append(next(inside, None) if end > start else None)
    return result


def predictions_from_answers(dataset: Dataset, answers: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Predictions and references of tasks whose answers are text, from answers that were already extracted (empty: no answer).

    Raises:
        ValueError: not one answer per example.
    """
    if len(answers) != len(dataset.examples):
        raise ValueError(f"{len(answers)} answers for {len(dataset.examples)} examples of {dataset.name}")
    return list(answers), [example.answers for example in dataset.examples]

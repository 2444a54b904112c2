"""Run one model (source or candidate, same code) over the evaluation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfaccel.evaluate.dataset import Dataset
from hfaccel.evaluate.predictions import predictions_from_answers, predictions_from_outputs, word_ids_from_offsets
from hfaccel.runtime.batching import pad
from hfaccel.runtime.model import Model
from hfaccel.runtime.tokenizer import Encoded

Outputs = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class Evaluation:
    """Raw outputs (aligned with ``dataset.texts()`` or the examples), predictions and references (aligned with the examples)."""

    outputs: Outputs
    predictions: Any
    references: Any


def evaluate(model: Model, dataset: Dataset) -> Evaluation:
    """Outputs, and predictions where the data has labels."""
    contract = model.contract
    encoded = encode_dataset(model, dataset)
    outputs = model.outputs(encoded)
    if not dataset.labelled:
        return Evaluation(outputs, [], [])
    if contract.task == "question-answering":
        answers = [model({"question": str(item.text), "context": str(item.context)})["answer"] for item in dataset.examples]
        return Evaluation(outputs, *predictions_from_answers(dataset, answers))
    word_ids = _word_ids(dataset, encoded) if contract.task == "token-classification" else None
    made = predictions_from_outputs(contract.task, contract.problem_type, contract.labels, dataset, outputs, word_ids=word_ids)
    return Evaluation(outputs, *made)


def join(first: Evaluation, second: Evaluation) -> Evaluation:
    """The evaluation of both parts of a data set, which share no text."""
    predictions, references = (
        np.concatenate([left, right]) if isinstance(left, np.ndarray) else [*left, *right]
        for left, right in ((first.predictions, second.predictions), (first.references, second.references))
    )
    return Evaluation(first.outputs + second.outputs, predictions, references)


def encode_dataset(model: Model, dataset: Dataset) -> list[Encoded]:
    """Token ids: of every distinct text for sentence-similarity, else of every example."""
    if model.contract.task == "sentence-similarity":
        return model.tokenizer.encode(dataset.texts())
    return model.tokenizer.encode([example.model_input for example in dataset.examples])


def _word_ids(dataset: Dataset, encoded: Sequence[Encoded]) -> list[list[int | None]]:
    """The tagged word of each token. Words are found by their characters: tagged words and the tokenizer's words differ."""
    return [
        word_ids_from_offsets(example.word_spans, item.offsets) for example, item in zip(dataset.examples, encoded, strict=True)
    ]


def smallest_batch_cosine(model: Model, encoded: Sequence[Encoded]) -> float:
    """Batch invariance: smallest cosine between the outputs of an example alone and in one padded batch with the others."""
    feeds = pad(encoded, model.contract.text)
    together = model.runner.run(feeds)
    smallest = 1.0
    for row, item in enumerate(encoded):
        alone = model.runner.run(pad([item], model.contract.text))
        for name, array in alone.items():
            batched = together[name][row]
            if array.ndim >= 2 and batched.ndim >= 1 and batched.shape != array[0].shape:
                start = 0 if model.contract.text.padding_side == "right" else batched.shape[0] - len(item.ids)
                batched = batched[start : start + len(item.ids)]
            smallest = min(smallest, _cosine(array[0], batched))
    return smallest


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    a, b = left.reshape(-1).astype(np.float64), right.reshape(-1).astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else 1.0

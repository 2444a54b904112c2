"""Fit a sentiment head on the frozen MiniLM encoder: a text classifier whose encoder weights are real and of full precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from reviews import Review
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

LABELS = ("NEGATIVE", "POSITIVE")
BATCH_SIZE = 32
# Share of tanh's range that one standard deviation takes: small enough for the pooler to act almost linearly.
WHITENED_DEVIATION = 0.5
# One CLS unit of MiniLM is constant; without a floor it would be divided by zero.
SMALLEST_DEVIATION = 0.02
LOGISTIC_C = 0.03

FloatArray = npt.NDArray[np.float32]


def write_sentiment_probe(encoder: Path, train: Sequence[Review], destination: Path) -> None:
    """Write a ``BertForSequenceClassification`` checkpoint: encoder kept, pooler = whitening, head = logistic regression."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    ids = dict(enumerate(LABELS))
    config = BertConfig.from_pretrained(
        encoder, num_labels=len(LABELS), id2label=ids, label2id={name: key for key, name in ids.items()}
    )
    model = BertForSequenceClassification.from_pretrained(encoder, config=config).eval()
    features = cls_features(model.bert, tokenizer, [review.text for review in train])
    mean, deviation = features.mean(axis=0), np.maximum(features.std(axis=0), SMALLEST_DEVIATION)
    weight, bias = np.diag(WHITENED_DEVIATION / deviation), -WHITENED_DEVIATION * mean / deviation
    pooled = np.tanh(features @ weight.T + bias)
    positive = [review.label == LABELS[1] for review in train]
    fitted = LogisticRegression(C=LOGISTIC_C, max_iter=400).fit(pooled, positive)
    # Two logits -z/2 and z/2 have the softmax that one logit z has as sigmoid.
    half = torch.tensor(fitted.coef_[0], dtype=torch.float32) / 2
    half_bias = torch.tensor(fitted.intercept_[0], dtype=torch.float32) / 2
    with torch.no_grad():
        model.bert.pooler.dense.weight.copy_(torch.tensor(weight))
        model.bert.pooler.dense.bias.copy_(torch.tensor(bias))
        model.classifier.weight.copy_(torch.stack([-half, half]))
        model.classifier.bias.copy_(torch.stack([-half_bias, half_bias]))
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def cls_features(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> FloatArray:
    """Last hidden state of the first token, ``[texts, hidden]``."""
    features = np.zeros((len(texts), encoder.config.hidden_size), dtype=np.float32)
    # Neighbours of similar length waste least on padding.
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        encoded = tokenizer([texts[row] for row in rows], padding=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            features[rows] = encoder(**encoded).last_hidden_state[:, 0].numpy()
    return features

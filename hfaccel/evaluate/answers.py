"""Statistics of written answers against reference answers, example by example, so that a bootstrap may weight the examples.

Word error rate: Levenshtein distance over words / words of the references (``jiwer``). BLEU: Papineni et al., ACL 2002, and chrF:
Popovic, WMT 2015, both with the tokenization and the settings of ``sacrebleu`` (Post, WMT 2018). ROUGE-L: Lin, 2004
(``rouge-score``). Each but ROUGE-L is a ratio of sums over all examples, not a mean over examples. All lie between 0 and 1 (a word error
rate may be above it).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
References = Sequence[tuple[str, ...]]
"""Accepted answers per example; none stands for the empty text."""

BLEU_ORDER = 4
CHRF_ORDER = 6
CHRF_BETA = 2.0
_APOSTROPHES = re.compile(r"(?<=\w)['\u2019](?=\w)")  # the typewriter's and the printer's


def normalize_transcript(text: str) -> str:
    """What a word error rate compares: Unicode NFKC, lower case, no punctuation, single spaces.

    An apostrophe inside a word goes (``don't``: ``dont``), any other punctuation or symbol becomes a space (``cold-hearted``: two
    words). Numbers and abbreviations stay as written: ``Mr.`` and ``mister`` differ.
    """
    joined = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text).lower())
    spaced = ("".join(" " if unicodedata.category(character)[0] in "PS" else character for character in joined)).split()
    return " ".join(spaced)


def word_errors(answers: Sequence[str], references: References) -> Floats:
    """Word errors (substitutions, deletions, insertions) and words of the reference [examples, 2]; of several the nearest."""
    return _best(answers, references, _word_errors, lambda row: -row[0] / max(row[1], 1.0))


def _word_errors(answer: str, reference: str) -> list[float]:
    import jiwer

    written, expected = normalize_transcript(answer), normalize_transcript(reference)
    if not written or not expected:
        return [float(len(written.split()) + len(expected.split())), float(len(expected.split()))]
    found = jiwer.process_words(expected, written)
    return [float(found.substitutions + found.deletions + found.insertions), float(len(expected.split()))]


def word_error_rate(statistics: Floats, weights: Floats) -> Floats:
    """Errors / words over the examples; errors themselves where there are no words [resamples]."""
    errors, words = (weights @ statistics).T
    return np.asarray(errors / np.maximum(words, 1.0), dtype=np.float64)


def bleu_counts(answers: Sequence[str], references: References) -> Floats:
    """Lengths of answer and reference, right n-grams and all n-grams of each order [examples, 2 + 2 * 4]."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(effective_order=True)
    rows = []
    for answer, accepted in zip(answers, references, strict=True):
        score = metric.sentence_score(answer, list(accepted or ("",)))
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, dtype=np.float64).reshape(len(rows), 2 + 2 * BLEU_ORDER)


def bleu(statistics: Floats, weights: Floats) -> Floats:
    """Corpus BLEU [resamples], 0 to 1. An order without a right n-gram counts as half of one, the next as a quarter (NIST smoothing)."""
    totals = weights @ statistics
    length, wanted = totals[:, 0], totals[:, 1]
    right, found = totals[:, 2 : 2 + BLEU_ORDER], totals[:, 2 + BLEU_ORDER :]
    halved = 2.0 ** -np.cumsum((right == 0) & (found > 0), axis=1)
    precisions = np.where(right > 0, right, halved) / np.maximum(found, 1.0)
    logarithms = np.log(precisions).mean(axis=1)
    brevity = np.minimum(0.0, 1 - wanted / np.maximum(length, 1.0))
    # Without any n-gram of the highest order there is no BLEU of a corpus.
    scored = right.any(axis=1) & (found[:, -1] > 0)
    result: Floats = np.where(scored, np.exp(logarithms + brevity), 0.0)
    return result


def character_counts(answers: Sequence[str], references: References) -> Floats:
    """Character n-grams of the answer, of the reference, and in both, per order [examples, 3 * 6]; of several the nearest."""
    return _best(answers, references, _character_counts, lambda row: float(chrf(np.array([row]), np.ones((1, 1)))[0]))


def _character_counts(answer: str, reference: str) -> list[float]:
    written, expected = _character_ngrams(answer), _character_ngrams(reference)
    row: list[float] = []
    for left, right in zip(written, expected, strict=True):
        both = sum((left & right).values())
        # As sacrebleu counts: what no reference could hold is not held against the answer.
        row += [float(sum(left.values()) if right else 0), float(sum(right.values())), float(both)]
    return row


def _character_ngrams(text: str) -> list[Counter[str]]:
    letters = "".join(text.split())
    starts = range(len(letters))
    return [
        Counter(letters[start : start + order] for start in starts[: max(0, len(letters) - order + 1)])
        for order in range(1, CHRF_ORDER + 1)
    ]


def chrf(statistics: Floats, weights: Floats) -> Floats:
    """Corpus chrF2 [resamples], 0 to 1: the F-score, recall weighing twice, of precision and recall averaged over the orders."""
    totals = (weights @ statistics).reshape(len(weights), CHRF_ORDER, 3)
    written, expected, both = totals[..., 0], totals[..., 1], totals[..., 2]
    counted = (written > 0) & (expected > 0)
    orders = np.maximum(counted.sum(axis=1), 1)
    precision = np.where(counted, both / np.maximum(written, 1.0), 0.0).sum(axis=1) / orders
    recall = np.where(counted, both / np.maximum(expected, 1.0), 0.0).sum(axis=1) / orders
    weight = CHRF_BETA**2
    below = weight * precision + recall
    result: Floats = np.divide((1 + weight) * precision * recall, below, out=np.zeros_like(below), where=below > 0)
    return result


def longest_common_words(answers: Sequence[str], references: References) -> Floats:
    """ROUGE-L F-score of each example [examples, 1]; of several references the best. Words of any script, unstemmed."""
    scorer = _rouge_scorer()

    def score(answer: str, reference: str) -> list[float]:
        return [float(scorer.score(reference, answer)["rougeL"].fmeasure)]

    return _best(answers, references, score, lambda row: row[0])


class _Words:
    """Runs of letters and digits. rouge-score's own tokenizer drops all that is not ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


def _best(
    answers: Sequence[str],
    references: References,
    row_of: Callable[[str, str], list[float]],
    worth: Callable[[list[float]], float],
) -> Floats:
    """Per example the row of the reference that is worth most."""
    rows = [
        max((row_of(answer, reference) for reference in (accepted or ("",))), key=worth)
        for answer, accepted in zip(answers, references, strict=True)
    ]
    return np.array(rows, dtype=np.float64)

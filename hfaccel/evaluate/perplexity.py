"""How much a language model lost: perplexity, divergence and equal next tokens against its source, over the same windows of text.

Both models read the same tokens, so differences are paired (Miller, "Adding Error Bars to Evals", arXiv:2411.00640, 2024), and texts
are the unit of every bound, not tokens: see :mod:`hfaccel.evaluate.clustered`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hfaccel.evaluate.clustered import clustered_mean
from hfaccel.evaluate.gate import Loss
from hfaccel.evaluate.judge import Reason, Verdict
from hfaccel.evaluate.metrics import Floats
from hfaccel.evaluate.sequential import TOTAL_ERROR
from hfaccel.recipe.schema import AccuracySection

Logits = npt.NDArray[Any]
Numbers = npt.NDArray[np.int64]

SHORTEST_WINDOW = 16
"""Windows that would score hardly any token after hardly any context are left out."""
ENOUGH_TEXTS = 30
"""Advice where a single text was given: from about so many on, Student's t costs next to nothing."""
_VALUES_PER_SLICE = 2**20
"""Logits that are turned into float64 at a time: 8 MiB, whatever the vocabulary."""


@dataclass(frozen=True)
class Window:
    """A piece of a tokenized text that the models read at once.

    Attributes:
        ids: its tokens, the context included.
        cluster: number of the text.
        first: index in ``ids`` of the first token that is scored; those before are context. At least 1.
    """

    ids: tuple[int, ...]
    cluster: int
    first: int = 1


@dataclass(frozen=True)
class WindowScores:
    """What one model says of one window.

    Attributes:
        nll: negative log likelihood of each scored token in nats [scored].
        top1: the token that the model holds for the most likely in its place [scored].
        cluster: number of the text.
    """

    nll: Floats
    top1: Numbers
    cluster: int


@dataclass(frozen=True)
class Divergence:
    """How far a candidate is from the source at some positions of one window.

    Attributes:
        kl: Kullback-Leibler divergence of the candidate from the source, KL(source || candidate), in nats [positions]; at least 0,
            not finite where logits are not.
        cosine: of both models' logits, each less its mean over the vocabulary, which no probability depends on [positions]; 0 where
            one of the two is constant. Entries that are not finite are left out of both.
    """

    kl: Floats
    cosine: Floats


@dataclass(frozen=True)
class LanguageLoss:
    """What a candidate loses against its source. Bounds are one-sided, at ``confidence``.

    Attributes:
        source_perplexity: exp of the mean negative log likelihood of the source.
        candidate_perplexity: the same of the candidate.
        loss: candidate / source - 1; positive is worse.
        lower_bound: of ``loss``; -1 where there is one text only.
        upper_bound: of ``loss``; infinite where there is one text only.
        kl_mean: mean Kullback-Leibler divergence from the source in nats.
        kl_upper_bound: of that mean.
        agreement_mean: share of positions where both hold the same token for the most likely.
        agreement_lower_bound: of that share.
        cosine_mean: mean cosine of the logits; see :class:`Divergence`.
        cosine_lower_bound: of that mean.
        tokens: how many were scored.
        windows: how many were read.
        documents: how many texts they come from.
        non_finite: at how many tokens at least a likelihood of either model or a divergence is not finite; the others alone are in
            the means.
        confidence: of each bound, for example 0.95.
    """

    source_perplexity: float
    candidate_perplexity: float
    loss: float
    lower_bound: float
    upper_bound: float
    kl_mean: float
    kl_upper_bound: float
    agreement_mean: float
    agreement_lower_bound: float
    cosine_mean: float
    cosine_lower_bound: float
    tokens: int
    windows: int
    documents: int
    non_finite: int
    confidence: float

    def as_loss(self) -> Loss:
        """The form that verdicts and reports show; its examples are texts."""
        return Loss(
            "perplexity",
            self.source_perplexity,
            self.candidate_perplexity,
            self.loss,
            self.lower_bound,
            self.upper_bound,
            self.documents,
            "documents",
        )


def cut_windows(texts_ids: Sequence[Sequence[int]], *, length: int, stride: int | None = None) -> list[Window]:
    """Cut tokenized texts into windows, each text for itself, so that every token but a text's or window's first is scored once.

    Args:
        texts_ids: tokens per text; its place in the sequence becomes the number of the text.
        length: most tokens of a window.
        stride: tokens from the start of a window to that of the next; what they share is context and not scored again. None:
            ``length``, so that they share nothing.

    Returns:
        The windows in order, without those that add fewer than :data:`SHORTEST_WINDOW` tokens.

    Raises:
        ValueError: a length or a stride that gives no windows.
    """
    stride = length if stride is None else stride
    if length < SHORTEST_WINDOW or not SHORTEST_WINDOW <= stride <= length:
        raise ValueError(
            f"windows of {length} tokens, {stride} apart: give a length of at least {SHORTEST_WINDOW} and a stride from "
            f"{SHORTEST_WINDOW} to the length"
        )
    found = []
    for cluster, ids in enumerate(texts_ids):
        for start in range(0, len(ids), stride):
            piece = tuple(int(token) for token in ids[start : start + length])
            shared = length - stride if start else 0
            if len(piece) - shared >= SHORTEST_WINDOW:
                found.append(Window(piece, cluster, max(1, shared)))
    return found


def score_window(logits: Logits, window: Window) -> WindowScores:
    """Score the tokens of a window by a model's logits.

    Args:
        logits: for each token those of the next one [tokens, vocabulary], any float type.
        window: what the model read.

    Raises:
        ValueError: the logits are not of this window.
    """
    if logits.ndim != 2 or len(logits) != len(window.ids) or not 0 <= min(window.ids) <= max(window.ids) < logits.shape[1]:
        raise ValueError(
            f"logits {logits.shape} for a window of {len(window.ids)} tokens of text {window.cluster} with ids up to "
            f"{max(window.ids)}: give [tokens, vocabulary] of the model that the tokenizer belongs to"
        )
    predicting, targets = logits[window.first - 1 : -1], np.array(window.ids[window.first :], dtype=np.int64)
    nll, top1 = np.empty(len(targets)), np.empty(len(targets), dtype=np.int64)
    for part in _slices(predicting):
        nll[part] = -_log_probabilities(predicting[part], targets[part])
        # Of the logits as they are: differences too small for a probability still decide what a model says.
        top1[part] = predicting[part].argmax(axis=1)
    return WindowScores(nll, top1, window.cluster)


def divergence(source_logits: Logits, candidate_logits: Logits) -> Divergence:
    """How far a candidate's logits are from the source's, position by position.

    Args:
        source_logits: of some positions of one window [positions, vocabulary], any float type.
        candidate_logits: of the same positions.

    Raises:
        ValueError: the shapes differ.
    """
    if source_logits.shape != candidate_logits.shape or source_logits.ndim != 2:
        raise ValueError(
            f"logits {candidate_logits.shape}, the source has {source_logits.shape}: give both [positions, vocabulary] of the same "
            "positions"
        )
    kl, cosine = np.empty(len(source_logits)), np.empty(len(source_logits))
    for part in _slices(source_logits):
        source, candidate = _log_softmax(source_logits[part]), _log_softmax(candidate_logits[part])
        probabilities = np.exp(source)
        with np.errstate(invalid="ignore"):
            # What the source holds for impossible adds nothing: p log p goes to 0 with p.
            terms = np.where(probabilities == 0, 0.0, probabilities * (source - candidate))
        kl[part] = np.maximum(terms.sum(axis=1), 0.0)
        cosine[part] = _centred_cosine(source, candidate)
    return Divergence(kl, cosine)


def perplexity(scores: Sequence[WindowScores]) -> float:
    """The exponential of the mean negative log likelihood over all scored tokens.

    Raises:
        ValueError: no token was scored.
    """
    if not sum(len(item.nll) for item in scores):
        raise ValueError(f"no scored tokens to take a perplexity of: give a text of at least {SHORTEST_WINDOW} tokens")
    return _exp(float(np.concatenate([item.nll for item in scores]).mean()))


def compare_scores(
    source: Sequence[WindowScores],
    candidate: Sequence[WindowScores],
    divergences: Sequence[Divergence],
    *,
    confidence: float = 1 - TOTAL_ERROR,
) -> LanguageLoss:
    """Compare two models over the same windows; the module's docstring says how bounds are found.

    Args:
        source: one per window.
        candidate: the same windows in the same order.
        divergences: one per window, at as many of its positions as the caller likes.
        confidence: of each one-sided bound.

    Raises:
        ValueError: what is to be compared differs in number or shape, or there is nothing.
    """
    _check_windows(source, candidate, divergences)
    clusters = np.concatenate([np.full(len(item.nll), item.cluster) for item in source])
    places = np.concatenate([np.full(len(item.kl), scores.cluster) for item, scores in zip(divergences, source, strict=True)])
    before, after = (np.concatenate([item.nll for item in scores]) for scores in (source, candidate))
    same = np.concatenate([first.top1 == second.top1 for first, second in zip(source, candidate, strict=True)])
    kl, cosine = np.concatenate([item.kl for item in divergences]), np.concatenate([item.cosine for item in divergences])
    finite, near = np.isfinite(before) & np.isfinite(after), np.isfinite(kl)
    bad = min(len(before), max(int((~finite).sum()), int((~near).sum())))
    documents = len(np.unique(clusters))
    counts = (len(before), len(source), documents, bad, confidence)
    if not (finite.any() and near.any()):
        return LanguageLoss(math.inf, math.inf, math.inf, -1.0, math.inf, math.inf, math.inf, 0.0, 0.0, 0.0, -1.0, *counts)
    identical = documents > 1 and not bad and same.all() and np.array_equal(before, after) and not kl.any()
    before, after, clusters, places = before[finite], after[finite], clusters[finite], places[near]
    lost = clustered_mean(after - before, clusters)
    agreeing = clustered_mean(same[finite].astype(np.float64), clusters)
    divergent, close = clustered_mean(kl[near], places), clustered_mean(cosine[near], places)
    return LanguageLoss(
        _exp(float(before.mean())),
        _exp(float(after.mean())),
        _exp(lost.mean) - 1,
        _exp(lost.mean - lost.margin(confidence)) - 1,
        _exp(lost.mean + lost.margin(confidence)) - 1,
        divergent.mean,
        divergent.mean + divergent.margin(confidence),
        agreeing.mean,
        1.0 if identical else agreeing.share_lower_bound(confidence),
        close.mean,
        max(-1.0, close.mean - close.margin(confidence)),
        *counts,
    )


def judge_language(loss: LanguageLoss, settings: AccuracySection) -> Verdict:
    """Whether the relative loss of perplexity is proven to be inside ``settings.max_loss``.

    One text proves nothing, not even where the models do not differ on it. A loss without a finite bound is not among the verdict's
    losses, because JSON has no infinity; :func:`explain_language` tells it.

    Args:
        loss: what was measured.
        settings: the limits.
    """
    passed = loss.non_finite == 0 and loss.upper_bound <= settings.max_loss
    reason: Reason | None = None if passed else "not-finite" if loss.non_finite else "loss-over-budget"
    shown = loss.as_loss()
    tellable = loss.non_finite == 0 and math.isfinite(loss.upper_bound)
    too_few = reason == "loss-over-budget" and loss.loss <= settings.max_loss
    return Verdict(
        passed=passed,
        decided=True,
        reason=reason,
        losses=(shown,) if tellable else (),
        slices=(),
        cosine_mean=loss.cosine_mean,
        cosine_lower_bound=loss.cosine_lower_bound,
        agreement_mean=loss.agreement_mean,
        agreement_lower_bound=loss.agreement_lower_bound,
        kl_mean=loss.kl_mean if math.isfinite(loss.kl_mean) else None,
        examples=loss.documents,
        examples_needed=shown.examples_needed(settings.max_loss, confidence=loss.confidence) if too_few else None,
        too_few_examples=too_few,
        looks=1,
        labelled=True,
    )


def explain_language(loss: LanguageLoss, settings: AccuracySection) -> str:
    """What :func:`judge_language` found, in words and numbers; where the texts were too few to tell, how many would do.

    Args:
        loss: what was measured.
        settings: the limits that it was judged by.
    """
    if loss.non_finite:
        return f"NaN or infinity in the logits at {loss.non_finite} of {loss.tokens} tokens or more"
    change = f"perplexity {loss.source_perplexity:.2f} -> {loss.candidate_perplexity:.2f}: loss {loss.loss:+.2%}"
    budget = f"budget {settings.max_loss:.2%}"
    if loss.documents == 1:
        return f"{change}, no bound from a single text, {budget}: give more texts, at least 2 and better {ENOUGH_TEXTS}"
    numbers = f"{change}, {100 * loss.confidence:g} % bound {loss.upper_bound:+.2%}, {budget}"
    verdict = judge_language(loss, settings)
    if not verdict.too_few_examples:
        return numbers
    seen = f"{numbers}; what was seen is within the limit, but {loss.documents} texts are too few to prove it: "
    needed = verdict.examples_needed
    if needed is None:
        return f"{seen}so close to the limit no practical number would decide"
    tokens = needed * loss.tokens // loss.documents
    above = f" (with accuracy.max_tokens above {settings.max_tokens})" if tokens > settings.max_tokens else ""
    return f"{seen}about {needed} texts would decide{above}"


def _check_windows(source: Sequence[WindowScores], candidate: Sequence[WindowScores], divergences: Sequence[Divergence]) -> None:
    counts = [len(source), len(candidate), len(divergences)]
    if len(set(counts)) != 1:
        raise ValueError(f"source, candidate and divergences of {counts} windows: give each one per window")
    for index, (first, second) in enumerate(zip(source, candidate, strict=True)):
        if first.cluster != second.cluster or first.nll.shape != second.nll.shape:
            raise ValueError(
                f"window {index}: {len(second.nll)} tokens of text {second.cluster}, the source scored {len(first.nll)} of text "
                f"{first.cluster}: score the same windows in the same order"
            )
    if not any(len(item.nll) for item in source) or not any(len(item.kl) for item in divergences):
        raise ValueError(f"no tokens to compare: give texts of at least {SHORTEST_WINDOW} tokens")


def _slices(logits: Logits) -> Iterator[slice]:
    """Rows of logits [rows, vocabulary], few enough at a time that float64 copies stay small."""
    rows = max(1, _VALUES_PER_SLICE // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _log_probabilities(logits: Logits, targets: npt.NDArray[np.int64]) -> Floats:
    """Of one token of each row. What :func:`_log_softmax` says; of float32 logits the exponentials are no finer than these, and fast."""
    exact = logits if logits.dtype == np.float32 else logits.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        largest = exact.max(axis=1, keepdims=True)
        total = np.exp(exact - largest).sum(axis=1, dtype=np.float64)
        chosen = np.take_along_axis(exact, targets[:, None], axis=1)[:, 0].astype(np.float64)
        result: Floats = chosen - largest[:, 0] - np.log(total)
    return result


def _log_softmax(logits: Logits) -> Floats:
    """Over the last axis, in float64; a row with NaN, with plus infinity or with nothing finite becomes NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        rows = logits.astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return rows


def _centred_cosine(source: Floats, candidate: Floats) -> Floats:
    finite = np.isfinite(source) & np.isfinite(candidate)
    left, right = _centred(source, finite), _centred(candidate, finite)
    lengths = np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    products = (left * right).sum(axis=1)
    result: Floats = np.clip(np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0), -1.0, 1.0)
    return result


def _centred(logits: Floats, finite: npt.NDArray[np.bool_]) -> Floats:
    """Less the mean of the finite entries of each row; 0 where an entry is not."""
    kept = np.where(finite, logits, 0.0)
    means = kept.sum(axis=1, keepdims=True) / np.maximum(finite.sum(axis=1, keepdims=True), 1)
    result: Floats = np.where(finite, kept - means, 0.0)
    return result


def _exp(value: float) -> float:
    """exp; infinite where a float cannot hold it."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))

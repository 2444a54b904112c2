"""Question answering: the best spans of a context, over all its windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfaccel.runtime.heads.activations import softmax
from hfaccel.runtime.tokenizer import Encoded

_MASKED_LOGIT = -10000.0


def best_spans(
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    windows: Sequence[Encoded],
    context: str,
    *,
    context_sequence: int = 1,
    top_k: int = 1,
    max_answer_len: int = 15,
    handle_impossible_answer: bool = False,
) -> list[dict[str, Any]]:
    """Answers of one question, best first; a span that several windows find counts once, with its best score.

    Args:
        start_logits: per window [sequence], padding removed.
        end_logits: per window [sequence], padding removed.
        windows: the tokenized windows.
        context: the text that the answer is cut out of; answers are widened to whole words.
        context_sequence: which text of the pair is the context (``sequence_ids``).
        top_k: most answers.
        max_answer_len: longest answer in tokens.
        handle_impossible_answer: let "no answer" (an empty string) compete.

    Returns:
        Dicts with score, start, end, answer; empty when the context has no tokens.
    """
    scores: dict[tuple[int, int], float] = {}
    no_answer = 1.0
    for starts, ends, window in zip(start_logits, end_logits, windows, strict=True):
        in_context = np.array([sequence == context_sequence for sequence in window.sequence_ids], bool)
        start, end = _probabilities(starts, in_context), _probabilities(ends, in_context)
        if in_context.size and not in_context[0]:
            no_answer = min(no_answer, float(start[0] * end[0]))
        for first, last, score in _window_spans(start * in_context, end * in_context, top_k, max_answer_len):
            span = _word_span(window, first, last, context_sequence)
            scores[span] = max(score, scores.get(span, 0.0))
    answers = [{"score": value, "start": a, "end": b, "answer": context[a:b]} for (a, b), value in scores.items()]
    if handle_impossible_answer:
        answers.append({"score": no_answer, "start": 0, "end": 0, "answer": ""})
    return sorted(answers, key=lambda answer: float(str(answer["score"])), reverse=True)[:top_k]


def _probabilities(logits: np.ndarray, in_context: np.ndarray) -> np.ndarray:
    """Softmax over the context and the first special token, whose probability means "no answer"; [sequence]."""
    allowed = in_context.copy()
    allowed[:1] = True
    return softmax(np.where(allowed, logits, _MASKED_LOGIT))


def _window_spans(start: np.ndarray, end: np.ndarray, top_k: int, max_answer_len: int) -> list[tuple[int, int, float]]:
    """The best (first token, last token, score) of one window, best first."""
    spans = np.tril(np.triu(np.outer(start, end)), max_answer_len - 1).ravel()
    count = min(top_k, spans.size)
    if not count:
        return []
    best = np.argpartition(-spans, count - 1)[:count]
    order = best[np.argsort(-spans[best], kind="stable")]
    found = ((*divmod(position, start.size), float(spans[position])) for position in order.tolist())
    return [item for item in found if item[2] > 0]


def _word_span(window: Encoded, first: int, last: int, context_sequence: int) -> tuple[int, int]:
    """Characters of the context from the first to the last token, widened to whole words."""
    start, end = window.offsets[first][0], window.offsets[last][1]
    first_word, last_word = window.word_ids[first], window.word_ids[last]
    for sequence, word, (left, right) in zip(window.sequence_ids, window.word_ids, window.offsets, strict=True):
        if sequence == context_sequence and word is not None:
            start = min(start, left) if word == first_word else start
            end = max(end, right) if word == last_word else end
    return start, end

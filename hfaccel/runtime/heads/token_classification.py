"""Token classification: labelled tokens, or entities grouped from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hfaccel.runtime.heads.activations import softmax
from hfaccel.runtime.tokenizer import Encoded, TextTokenizer

AggregationStrategy = Literal["none", "simple", "first", "average", "max"]
Join = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class _Piece:
    """A token, or a whole word once its tokens are merged. ``scores`` [labels] is empty for a merged word."""

    word: str
    scores: np.ndarray
    label: str
    score: float
    start: int
    end: int
    index: int
    is_subword: bool = False


def entities(
    logits: np.ndarray,
    encoded: Encoded,
    text: str,
    labels: Sequence[str],
    tokenizer: TextTokenizer,
    strategy: AggregationStrategy = "none",
    ignore_labels: Collection[str] = ("O",),
) -> list[dict[str, Any]]:
    """Answers of one text as the transformers pipeline gives them.

    Args:
        logits: [sequence, labels], padding removed.
        encoded: the tokenized text.
        text: the text that ``encoded`` was made of.
        labels: label names in id order.
        tokenizer: turns ids and pieces back to text.
        strategy: ``none`` gives tokens; ``simple`` groups neighbouring tokens of the same tag; ``first``, ``average`` and
            ``max`` first make the tokens of a word agree.
        ignore_labels: labels (of groups: tags) to leave out.

    Returns:
        Dicts with entity, score, index, word, start, end; of groups with entity_group, score, word, start, end.
    """
    pieces = list(_pieces(softmax(logits), encoded, text, labels, tokenizer))
    if strategy == "none":
        return [_token_answer(piece) for piece in pieces if piece.label not in ignore_labels]
    if strategy != "simple":
        pieces = [_merge_word(word, strategy, labels, tokenizer.join) for word in _runs(pieces, _continues_word)]
    groups = (_group(run, tokenizer.join) for run in _runs(pieces, _continues_entity))
    return [group for group in groups if group["entity_group"] not in ignore_labels]


def _pieces(scores: np.ndarray, encoded: Encoded, text: str, labels: Sequence[str], tokenizer: TextTokenizer) -> Iterator[_Piece]:
    marks_subwords, unknown_id = tokenizer.marks_subwords, tokenizer.unknown_id
    best = scores.argmax(axis=-1).tolist()
    for index, token_id in enumerate(encoded.ids.tolist()):
        if encoded.special_tokens_mask[index]:
            continue
        start, end = encoded.offsets[index]
        written = text[start:end]
        word = tokenizer.token(token_id)
        # Without a mark the best that can be said: no space before the token.
        no_space = start > 0 and " " not in text[start - 1 : start + 1]
        is_subword = len(word) != len(written) if marks_subwords else no_space
        if token_id == unknown_id:
            word, is_subword = written, False
        label = best[index]
        yield _Piece(word, scores[index], labels[label], float(scores[index, label]), start, end, index, is_subword)


def _runs(pieces: Sequence[_Piece], continues: Callable[[_Piece, _Piece], bool]) -> Iterator[list[_Piece]]:
    run: list[_Piece] = []
    for piece in pieces:
        if run and not continues(run[-1], piece):
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _continues_word(_previous: _Piece, piece: _Piece) -> bool:
    return piece.is_subword


def _continues_entity(previous: _Piece, piece: _Piece) -> bool:
    return _tag(piece.label) == _tag(previous.label) and not piece.label.startswith("B-")


def _tag(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def _merge_word(word: list[_Piece], strategy: AggregationStrategy, labels: Sequence[str], join: Join) -> _Piece:
    if strategy == "average":
        scores = np.mean([piece.scores for piece in word], axis=0)
        best = int(scores.argmax())
        label, score = labels[best], float(scores[best])
    else:
        chosen = word[0] if strategy == "first" else max(word, key=lambda piece: piece.score)
        label, score = chosen.label, chosen.score
    text = join([piece.word for piece in word])
    return _Piece(text, np.empty(0, np.float32), label, score, word[0].start, word[-1].end, word[0].index)


def _group(run: list[_Piece], join: Join) -> dict[str, Any]:
    return {
        "entity_group": run[0].label.split("-", 1)[-1],
        "score": float(np.mean([piece.score for piece in run])),
        "word": join([piece.word for piece in run]),
        "start": run[0].start,
        "end": run[-1].end,
    }


def _token_answer(piece: _Piece) -> dict[str, Any]:
    return {
        "entity": piece.label,
        "score": piece.score,
        "index": piece.index,
        "word": piece.word,
        "start": piece.start,
        "end": piece.end,
    }

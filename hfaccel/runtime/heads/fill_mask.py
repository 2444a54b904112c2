"""Fill mask: the most likely tokens for each mask of a text."""

from __future__ import annotations

from typing import Any

import numpy as np

from hfaccel.errors import DataError
from hfaccel.runtime.heads.activations import softmax
from hfaccel.runtime.tokenizer import Encoded, TextTokenizer


def fill_masks(
    logits: np.ndarray, encoded: Encoded, tokenizer: TextTokenizer, text: str, top_k: int = 5
) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
    """Answers of one text as the transformers pipeline gives them.

    Args:
        logits: [sequence, vocabulary], padding removed.
        encoded: the tokenized text.
        tokenizer: turns ids back to text.
        text: the text, for the error message.
        top_k: answers for a mask.

    Returns:
        Dicts with score, token, token_str, sequence, best first; a list of such lists when the text has several masks.

    Raises:
        DataError: the text has no mask.
    """
    settings = tokenizer.settings
    positions = np.flatnonzero(encoded.ids == (-1 if settings.mask_token_id is None else settings.mask_token_id))
    if not positions.size:
        raise DataError(
            f"the text has no mask token ({settings.mask_token})",
            where=f"text {text[:40]!r}",
            hint=f"write {settings.mask_token} where a word is to be filled in, within {settings.max_length} tokens",
        )
    single = positions.size == 1
    answers = [
        [
            _answer(encoded.ids, int(position), token, score, tokenizer, skip_special_tokens=single)
            for token, score in _top(softmax(logits[position]), top_k)
        ]
        for position in positions
    ]
    return answers[0] if single else answers


def _top(probabilities: np.ndarray, top_k: int) -> list[tuple[int, float]]:
    count = min(top_k, probabilities.size)
    best = np.argpartition(-probabilities, count - 1)[:count]
    order = best[np.argsort(-probabilities[best], kind="stable")]
    return [(token, float(probabilities[token])) for token in order.tolist()]


def _answer(
    ids: np.ndarray, position: int, token: int, score: float, tokenizer: TextTokenizer, *, skip_special_tokens: bool
) -> dict[str, Any]:
    filled = ids.tolist()
    filled[position] = token
    kept = [value for value in filled if value != tokenizer.settings.pad_token_id]
    sequence = tokenizer.decode(kept, skip_special_tokens=skip_special_tokens)
    return {"score": score, "token": token, "token_str": tokenizer.decode([token]), "sequence": sequence}

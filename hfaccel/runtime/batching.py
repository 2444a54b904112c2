"""Batches with little padding: which texts go together, and their arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfaccel.artifact.contract import TextSettings
from hfaccel.runtime.tokenizer import Encoded

MAX_TOKENS = 4096
"""Tokens of a batch: more does not run faster on a CPU, and activations grow with them."""


def plan_batches(
    lengths: Sequence[int], max_batch: int = 32, max_padding: float = 0.1, max_tokens: int = MAX_TOKENS
) -> list[list[int]]:
    """Sort by length and split, so that little is computed on padding.

    Args:
        lengths: tokens of each text.
        max_batch: most texts of a batch, at least 1.
        max_padding: most padding of a batch, as a share of its tokens (0 to 1).
        max_tokens: most tokens of a batch, padding included; a longer text is a batch of its own.

    Returns:
        Positions in ``lengths``, batch by batch, shortest texts first; every position exactly once.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        area = (len(current) + 1) * length
        if current and (len(current) >= max_batch or area > max_tokens or area - filled - length > max_padding * area):
            batches.append(current)
            current, filled = [], 0
        current.append(index)
        filled += length
    if current:
        batches.append(current)
    return batches


def pad(encoded: Sequence[Encoded], settings: TextSettings) -> dict[str, np.ndarray]:
    """Arrays of one batch: ``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 [batch, sequence].

    The sequence is as long as the longest text; shorter ones are padded on the side that ``settings`` names.
    """
    lengths = [item.ids.size for item in encoded]
    shape = (len(encoded), max(lengths, default=0))
    if len(set(lengths)) <= 1 and encoded:
        ids, type_ids = np.stack([item.ids for item in encoded]), np.stack([item.type_ids for item in encoded])
        return {"input_ids": ids, "attention_mask": np.ones(shape, np.int64), "token_type_ids": type_ids}
    ids = np.full(shape, settings.pad_token_id, np.int64)
    type_ids = np.full(shape, settings.pad_token_type_id, np.int64)
    mask = np.zeros(shape, np.int64)
    for row, (item, length) in enumerate(zip(encoded, lengths, strict=True)):
        place = slice(0, length) if settings.padding_side == "right" else slice(shape[1] - length, shape[1])
        ids[row, place] = item.ids
        type_ids[row, place] = item.type_ids
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": type_ids}

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfaccel.artifact.contract import TextSettings
from hfaccel.runtime.batching import pad, plan_batches
from hfaccel.runtime.tokenizer import Encoded


@given(
    st.lists(st.integers(0, 512), max_size=200),
    st.integers(1, 40),
    st.floats(0, 1, allow_nan=False),
)
def test_batches_are_a_permutation_with_little_padding(lengths: list[int], max_batch: int, max_padding: float) -> None:
    batches = plan_batches(lengths, max_batch, max_padding)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        own = [lengths[index] for index in batch]
        assert 1 <= len(batch) <= max_batch
        assert own == sorted(own)
        assert len(own) * max(own) - sum(own) <= max_padding * len(own) * max(own)


def test_equal_lengths_fill_the_batches() -> None:
    assert plan_batches([7] * 5, max_batch=2) == [[0, 1], [2, 3], [4]]
    assert plan_batches([]) == []


def encoded(*ids: int) -> Encoded:
    size = len(ids)
    array = np.array(ids, np.int64)
    return Encoded(array, np.ones(size, np.int64), (0,) * size, ((0, 1),) * size, (0,) * size, (0,) * size)


@pytest.mark.parametrize(
    ("side", "ids", "types", "mask"),
    [
        ("right", [[5, 6, 7], [8, 9, 9]], [[1, 1, 1], [1, 3, 3]], [[1, 1, 1], [1, 0, 0]]),
        ("left", [[5, 6, 7], [9, 9, 8]], [[1, 1, 1], [3, 3, 1]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_pad(side: str, ids: list[list[int]], types: list[list[int]], mask: list[list[int]]) -> None:
    settings = TextSettings(max_length=8, pad_token_id=9, pad_token_type_id=3, padding_side=side)  # type: ignore[arg-type]
    feeds = pad([encoded(5, 6, 7), encoded(8)], settings)
    assert {name: array.tolist() for name, array in feeds.items()} == {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
    }
    assert {array.dtype for array in feeds.values()} == {np.dtype(np.int64)}


def test_pad_of_equal_lengths_is_the_same() -> None:
    feeds = pad([encoded(5, 6), encoded(7, 8)], TextSettings(max_length=8, pad_token_id=0))
    assert feeds["input_ids"].tolist() == [[5, 6], [7, 8]]
    assert feeds["attention_mask"].tolist() == [[1, 1], [1, 1]]
    assert all(array.flags.writeable for array in feeds.values())


@given(st.lists(st.integers(1, 600), min_size=1, max_size=80))
def test_a_batch_has_no_more_tokens_than_memory_allows(lengths):
    batches = plan_batches(lengths, max_tokens=1024)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 1024

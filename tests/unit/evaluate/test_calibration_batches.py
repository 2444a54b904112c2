"""Which texts are calibrated on: what a tokenizer does not know says nothing about the model."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hfaccel.runtime.tokenizer import Encoded
from hfaccel.stages.calibrate import UNKNOWN_SHARE, mostly_known

UNKNOWN = 1


def encoded(ids: list[int]) -> Encoded:
    array, count = np.array(ids, dtype=np.int64), len(ids)
    return Encoded(array, np.zeros_like(array), (0,) * count, ((0, 0),) * count, (None,) * count, (None,) * count)


def test_texts_of_another_vocabulary_are_left_out_unless_there_are_no_others() -> None:
    known, strange = encoded([2, 7, 8, 9, 3]), encoded([2, UNKNOWN, UNKNOWN, UNKNOWN, 3])
    assert mostly_known([known, strange], UNKNOWN) == [known]
    assert mostly_known([strange, strange], UNKNOWN) == [strange, strange]
    assert mostly_known([known, strange], None) == [known, strange]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=1, max_size=6))
def test_what_is_left_is_known_or_everything(texts: list[list[int]]) -> None:
    items = [encoded(ids) for ids in texts]
    left = mostly_known(items, UNKNOWN)
    shares = [float(np.mean(item.ids == UNKNOWN)) for item in left]
    assert len(left) == len(items) or max(shares) <= UNKNOWN_SHARE
    assert left

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.errors import SettingsError, UsageError
from hfaccel.measure.workload import Point, make_feeds, make_texts, parse_workload

points = st.builds(Point, st.integers(1, 64), st.integers(1, 600))


def count_words(text: str) -> int:
    return len(text.split()) + 2


def test_a_point_is_written_as_batch_x_sequence():
    assert str(Point(batch=8, sequence=128)) == "8x128"


@given(st.lists(points, min_size=1, max_size=8, unique=True))
def test_what_is_written_is_read_back(grid):
    assert parse_workload(",".join(map(str, grid))) == tuple(grid)
    assert parse_workload([str(point) for point in grid]) == tuple(grid)


def test_spaces_capitals_and_repeats_are_taken():
    assert parse_workload(" 1X16, 1 x 128 ,1x16") == (Point(1, 16), Point(1, 128))


@pytest.mark.parametrize("bad", ["8", "x128", "8x", "0x16", "8x0", "8*128", "-1x16", "1x16x2", "1.5x16"])
def test_a_bad_point_is_named_with_an_example(bad):
    with pytest.raises(UsageError) as caught:
        parse_workload(f"1x16,{bad}")
    assert str(caught.value) == (
        f"workload: '{bad}' is not a point of a workload (write batch x sequence length, for example 1x16,1x128,8x128)"
    )


@pytest.mark.parametrize("empty", ["", " , ", [], [""]])
def test_an_empty_workload_is_refused(empty):
    with pytest.raises(UsageError, match="the workload is empty"):
        parse_workload(empty)


@settings(max_examples=30)
@given(points, st.integers(1, 1000), st.integers(0, 5))
def test_feeds_have_the_shape_and_valid_ids(point, vocabulary_size, seed):
    names = ["input_ids", "attention_mask", "token_type_ids"]
    feeds = make_feeds(point, names, vocabulary_size=vocabulary_size, seed=seed)
    assert list(feeds) == names
    assert all(value.dtype == np.int64 and value.shape == (point.batch, point.sequence) for value in feeds.values())
    assert feeds["input_ids"].min() >= 0
    assert feeds["input_ids"].max() < vocabulary_size
    assert (feeds["attention_mask"] == 1).all()
    assert (feeds["token_type_ids"] == 0).all()
    again = make_feeds(point, names, vocabulary_size=vocabulary_size, seed=seed)
    np.testing.assert_array_equal(feeds["input_ids"], again["input_ids"])


def test_only_the_inputs_that_the_graph_reads_are_made():
    assert list(make_feeds(Point(1, 4), ["input_ids"], vocabulary_size=9, seed=0)) == ["input_ids"]


def test_an_input_that_cannot_be_made_up_is_named():
    with pytest.raises(SettingsError, match="no way to make up values for the graph input 'pixel_values'"):
        make_feeds(Point(1, 4), ["input_ids", "pixel_values"], vocabulary_size=9, seed=0)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(3, 300), st.integers(0, 5))
def test_texts_are_distinct_and_about_as_long_as_asked(batch, sequence, seed):
    texts = make_texts(Point(batch, sequence), count_words, seed=seed)
    assert len(set(texts)) == len(texts) == batch
    assert texts == make_texts(Point(batch, sequence), count_words, seed=seed)
    assert all(sequence <= count_words(text) <= sequence + 1 for text in texts)


def test_texts_stay_distinct_when_there_are_more_than_words():
    texts = make_texts(Point(500, 1), count_words, seed=0)
    assert len(set(texts)) == 500


def test_a_tokenizer_that_splits_words_gets_fewer_of_them():
    (text,) = make_texts(Point(1, 50), lambda text: 2 + 2 * len(text.split()), seed=0)
    assert len(text.split()) == 24

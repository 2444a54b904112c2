"""How long two models write alike: hand-made continuations."""

from __future__ import annotations

import numpy as np
import pytest

from hfaccel.evaluate.greedy_paths import greedy_agreement


def test_shares_and_prefixes_are_counted_place_by_place() -> None:
    source = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]
    candidate = [[1, 2, 9, 4], [5, 6, 7, 8], [8, 9, 9, 9]]
    found = greedy_agreement(source, candidate, [0, 1, 2], steps=4)
    assert found.share == pytest.approx(10 / 12)
    assert found.prefix_mean == pytest.approx((2 + 4 + 0) / 3)
    assert 0 < found.share_lower_bound < found.share
    assert 0 <= found.prefix_lower_bound < found.prefix_mean
    assert (found.tokens, found.prompts, found.texts, found.steps) == (12, 3, 3, 4)


def test_what_the_source_wrote_counts_and_no_more() -> None:
    """An answer that ends early lacks the rest; one that goes on beyond the source's end gains nothing."""
    assert greedy_agreement([[1, 2, 3, 4]], [[1, 2]], [0], steps=4).share == 0.5
    longer = greedy_agreement([[1, 2]], [[1, 2, 3, 4]], [0], steps=4)
    assert (longer.share, longer.prefix_mean, longer.tokens) == (1.0, 2.0, 2)


def test_one_text_bounds_nothing_however_many_prompts_it_gives() -> None:
    rows = [[1, 2, 3]] * 8
    found = greedy_agreement(rows, rows, [0] * 8, steps=3)
    assert (found.share, found.share_lower_bound, found.prefix_lower_bound) == (1.0, 0.0, 0.0)


def test_equal_paths_do_not_prove_that_all_are() -> None:
    rows = [[number, 2, 3] for number in range(8)]
    found = greedy_agreement(rows, rows, range(8), steps=3)
    assert found.share == 1.0
    assert 0.5 < found.share_lower_bound < 1.0


def test_the_bound_covers_the_share_of_texts_not_seen() -> None:
    """Each text has its own rate of equal tokens; the bound of eight texts lies below the mean rate about 19 times of 20."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        rates = random.beta(4, 2, 8)
        same = random.random((8, 64)) < rates[:, None]
        found = greedy_agreement([[1] * 64] * 8, np.where(same, 1, 0).tolist(), range(8), steps=64)
        covered += found.share_lower_bound <= 4 / 6
    assert covered >= 180


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1"):
        greedy_agreement([[1], [2]], [[1]], [0, 1], steps=1)
    with pytest.raises(ValueError, match="none empty"):
        greedy_agreement([[]], [[1]], [0], steps=1)

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.evaluate.bounds import paired_lower_bound, paired_upper_bound, share_lower_bound, share_upper_bound
from hfaccel.evaluate.gate import paired_loss, round_up
from hfaccel.evaluate.metrics import METRICS
from hfaccel.evaluate.resampling import resample, units_of


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([0.95, 0.99, 0.9999]))
def test_bounds_of_a_share_equal_scipy(total: int, share: float, confidence: float) -> None:
    successes = round(share * total)
    # scipy's interval has two sides: at twice the error its ends are the one-sided bounds.
    want = scipy.stats.binomtest(successes, total).proportion_ci(2 * confidence - 1, method="exact")
    assert share_lower_bound(successes, total, confidence=confidence) == pytest.approx(want.low, abs=1e-9)
    assert share_upper_bound(successes, total, confidence=confidence) == pytest.approx(want.high, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(80, 5000))
def test_paired_bounds_enclose_the_difference_and_mirror_each_other(worse: int, better: int, total: int) -> None:
    lower = paired_lower_bound(worse, better, total, confidence=0.95)
    upper = paired_upper_bound(worse, better, total, confidence=0.95)
    assert lower < (worse - better) / total < upper
    assert upper == -paired_lower_bound(better, worse, total, confidence=0.95)
    assert paired_upper_bound(worse, better, total, confidence=0.99) > upper
    if better == 0:
        assert upper == pytest.approx(share_upper_bound(worse, total, confidence=0.95))


@pytest.mark.parametrize(("worse_share", "better_share"), [(0.01, 0.0), (0.02, 0.01), (0.06, 0.05), (0.13, 0.1)])
@pytest.mark.parametrize("total", [100, 300, 1500])
def test_the_paired_bound_misses_the_truth_in_at_most_5_percent(worse_share: float, better_share: float, total: int) -> None:
    generator = np.random.default_rng(total)
    drawn, times = np.unique(
        generator.multinomial(total, [worse_share, better_share, 1 - worse_share - better_share], size=4000)[:, :2],
        axis=0,
        return_counts=True,
    )
    truth = worse_share - better_share
    missed = [paired_upper_bound(int(worse), int(better), total, confidence=0.95) < truth for worse, better in drawn]
    assert (np.array(missed) * times).sum() / 4000 <= 0.06  # 5 % and three standard errors


def test_how_many_equal_answers_prove_a_budget_of_1_percent() -> None:
    """The rule of three: without a single difference a loss of 1 % is excluded by 299 examples of a perfect source.

    A source that is right in 90 % has less to lose, so the same relative budget is 0.9 % of the examples and needs 332.
    """

    def bound(examples: int, right: int) -> float:
        references = np.zeros(examples, dtype=np.int64)
        answers = (np.arange(examples) >= right).astype(np.int64)
        metric = METRICS["accuracy"]
        loss = paired_loss(
            metric, answers, answers.copy(), references, confidence=0.95, resamples=200, seed=0, same_outputs=False
        )
        return loss.upper_bound

    assert bound(298, 298) > 0.01 >= bound(299, 299)
    assert bound(330, 297) > 0.01 >= bound(340, 306)


def test_how_many_examples_would_decide() -> None:
    generator = np.random.default_rng(0)
    truth = np.zeros(300, dtype=np.int64)
    source, candidate = truth.copy(), truth.copy()
    candidate[:2], source[2:4] = 1, 1  # two worse, two better
    loss = paired_loss(METRICS["accuracy"], source, candidate, truth, confidence=0.95, resamples=200, seed=0)
    assert (loss.loss, loss.worse, loss.better) == (0, 2, 2)
    needed = loss.examples_needed(0.01, confidence=0.95)
    assert needed is not None
    times = needed // 300 + 1
    again = paired_loss(
        METRICS["accuracy"], np.tile(source, times), np.tile(candidate, times), np.tile(truth, times),
        confidence=0.95, resamples=200, seed=0,
    )  # fmt: skip
    assert loss.upper_bound > 0.01 > again.upper_bound
    gold = generator.normal(size=200)
    noisy = gold + generator.normal(size=200)
    other = paired_loss(METRICS["pearson"], gold, noisy, gold, confidence=0.95, resamples=200, seed=0)
    assert other.examples_needed(0.01, confidence=0.95) is None
    assert (round_up(1187), round_up(87), round_up(2e6)) == (1200, 87, None)


def test_the_bootstrap_bound_sees_skew() -> None:
    """Of 8 losses of one kind the percentile says at most 12.7; the exact bound is 14.4."""
    values = np.zeros(1000)
    values[:8] = 1
    resampled = resample(lambda weights: weights @ values, units_of(None, 1000), resamples=4000, seed=0)
    assert np.quantile(resampled.draws, 0.95) < 13.5 < resampled.upper_bound(0.95) < 15.5
    assert resampled.lower_bound(0.95) < 8 < resampled.upper_bound(0.95) < resampled.upper_bound(0.9999)

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score as seqeval_f1

from hfaccel.errors import SettingsError
from hfaccel.evaluate.metrics import METRICS, default_metric, resolve_metric

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_classification_metrics_equal_scikit_learn_on_all_and_on_drawn_examples(seed: int) -> None:
    generator = np.random.default_rng(seed)
    count = int(generator.integers(2, 60))
    predicted, expected = generator.integers(0, 4, count), generator.integers(0, 4, count)
    drawn = generator.integers(0, count, count)
    for index, left, right in ((None, predicted, expected), (drawn, predicted[drawn], expected[drawn])):
        want = {
            "accuracy": sklearn.metrics.accuracy_score(right, left),
            "f1": sklearn.metrics.f1_score(right, left, average="macro", zero_division=0),
            "f1_micro": sklearn.metrics.f1_score(right, left, average="micro"),
            "mcc": sklearn.metrics.matthews_corrcoef(right, left),
        }
        for name, value in want.items():
            assert METRICS[name].compute(predicted, expected, index) == pytest.approx(value, abs=1e-9)  # type: ignore[index]


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_correlations_equal_scipy_with_ties_and_repeated_draws(seed: int) -> None:
    generator = np.random.default_rng(seed)
    left = generator.normal(size=40).round(1)
    right = (left + generator.normal(size=40)).round(1)
    drawn = generator.integers(0, 40, 40)
    for index, first, second in ((None, left, right), (drawn, left[drawn], right[drawn])):
        assert METRICS["spearman"].compute(left, right, index) == pytest.approx(scipy.stats.spearmanr(first, second)[0], abs=1e-9)
        assert METRICS["pearson"].compute(left, right, index) == pytest.approx(scipy.stats.pearsonr(first, second)[0], abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_entity_f1_equals_seqeval(seed: int) -> None:
    generator = np.random.default_rng(seed)
    tags = np.array(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"])
    left = [tuple(tags[generator.integers(0, 5, 8)]) for _ in range(6)]
    right = [tuple(tags[generator.integers(0, 5, 8)]) for _ in range(6)]
    want = seqeval_f1([list(row) for row in right], [list(row) for row in left], zero_division=0)
    assert METRICS["entity_f1"].compute(left, right) == pytest.approx(want)


def test_answers_are_compared_without_case_articles_and_punctuation() -> None:
    predictions, references = ["The Eiffel tower!", "in 1999", ""], [("eiffel tower",), ("1998", "1999"), ()]
    assert METRICS["exact_match"].compute(predictions, references) == pytest.approx(2 / 3)
    assert METRICS["qa_f1"].compute(predictions, references) == pytest.approx((1 + 2 / 3 + 1) / 3)


def test_constant_predictions_correlate_with_nothing() -> None:
    assert METRICS["spearman"].compute(np.ones(5), np.arange(5)) == 0


def test_default_metrics_and_metrics_that_do_not_fit() -> None:
    assert default_metric("text-classification", "multi_label_classification") == "f1_micro"
    assert default_metric("token-classification", None) == "entity_f1"
    with pytest.raises(SettingsError) as caught:
        resolve_metric("spearman", "text-classification", "single_label_classification")
    expected = "metric 'spearman' does not fit text-classification (single_label_classification) (use accuracy)"
    assert str(caught.value) == expected

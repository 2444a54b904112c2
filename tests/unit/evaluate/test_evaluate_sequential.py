"""Seeded trials of the whole procedure: looks, bounds, decision. The budget is 1 %."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hfaccel.evaluate.gate import paired_loss
from hfaccel.evaluate.metrics import METRICS, MetricName
from hfaccel.evaluate.sequential import TOTAL_ERROR, Outcome, order_of, plan_looks

BUDGET = 0.01
Models = tuple[np.ndarray, np.ndarray, np.ndarray]


def classifiers(generator: np.random.Generator, count: int, loss: float, churn: float) -> Models:
    """A source that is right in 90 %, a candidate that loses ``loss`` of it; ``churn`` of all examples change either way besides."""
    truth = np.zeros(count, dtype=np.int64)
    source = (generator.random(count) > 0.9).astype(np.int64)
    changed = generator.random(count) < np.where(source == truth, (churn + loss * 0.9) / 0.9, churn / 0.1)
    return source, np.where(changed, 1 - source, source), truth


def regressors(generator: np.random.Generator, count: int, loss: float) -> Models:
    """Normal scores: a source of correlation 0.89 with the truth, and a candidate whose own is ``loss`` lower."""
    noise = 0.5
    wanted = (1 - loss) / np.sqrt(1 + noise**2)
    more = np.sqrt(max(1 / wanted**2 - 1 - noise**2, 1e-6))
    truth = generator.normal(size=count)
    source = truth + noise * generator.normal(size=count)
    return source, source + more * generator.normal(size=count), truth


def examine(name: MetricName, models: Models, seed: int, *, same_outputs: bool = False) -> tuple[Outcome, int]:
    source, candidate, truth = models
    for look in plan_looks(len(truth)):
        seen = slice(look.examples)
        loss = paired_loss(
            METRICS[name], source[seen], candidate[seen], truth[seen],
            confidence=1 - look.accept_error, lower_confidence=1 - look.refuse_error,
            resamples=200, seed=seed, same_outputs=same_outputs,
        )  # fmt: skip
        outcome = look.outcome(loss.lower_bound, loss.upper_bound, BUDGET)
        if outcome != "open":
            return outcome, look.examples
    raise AssertionError("the last look leaves nothing open")


def trials(
    name: MetricName, make: Callable[[np.random.Generator], Models], count: int, *, same_outputs: bool = False
) -> tuple[int, float]:
    """How many of ``count`` trials accept, and how many examples they looked at on average."""
    results = [examine(name, make(np.random.default_rng(seed)), seed, same_outputs=same_outputs) for seed in range(count)]
    return sum(outcome == "accepted" for outcome, _ in results), float(np.mean([examples for _, examples in results]))


@pytest.mark.parametrize("examples", [300, 1500, 5000])
@pytest.mark.parametrize("churn", [0.0, 0.01])
def test_three_times_the_budget_is_refused_in_at_least_95_of_100_trials(examples: int, churn: float) -> None:
    accepted, looked_at = trials("accuracy", lambda generator: classifiers(generator, examples, 0.03, churn), 100)
    assert accepted <= 5
    assert looked_at < examples or examples == 300
    accepted, _ = trials("pearson", lambda generator: regressors(generator, examples, 0.03), 100)
    assert accepted <= 5


@pytest.mark.parametrize("examples", [300, 1500, 5000])
def test_an_identical_candidate_is_accepted_in_100_of_100_trials(examples: int) -> None:
    def same(generator: np.random.Generator) -> Models:
        source, _, truth = classifiers(generator, examples, 0, 0)
        return source, source.copy(), truth

    accepted, looked_at = trials("accuracy", same, 100, same_outputs=True)
    assert accepted == 100
    assert looked_at == plan_looks(examples)[0].examples
    assert trials("pearson", same, 100, same_outputs=True)[0] == 100


@pytest.mark.parametrize("examples", [1500, 5000])
def test_equal_answers_of_models_that_differ_are_accepted_before_all_was_seen(examples: int) -> None:
    accepted, looked_at = trials("accuracy", lambda generator: classifiers(generator, examples, 0, 0), 100)
    assert accepted == 100
    assert looked_at <= examples / 2


def test_a_good_candidate_that_changes_answers_both_ways_is_accepted_early() -> None:
    accepted, looked_at = trials("accuracy", lambda generator: classifiers(generator, 5000, 0, 0.002), 100)
    assert accepted >= 95
    assert looked_at < 2500
    accepted, looked_at = trials("pearson", lambda generator: regressors(generator, 5000, 0.002), 20)
    assert accepted >= 19
    assert looked_at < 2500


@pytest.mark.parametrize(("examples", "churn"), [(300, 0.002), (1500, 0.0), (1500, 0.01), (5000, 0.002)])
def test_a_loss_of_just_the_budget_is_accepted_in_at_most_5_percent(examples: int, churn: float) -> None:
    accepted, _ = trials("accuracy", lambda generator: classifiers(generator, examples, BUDGET, churn), 600)
    assert accepted / 600 <= 0.077  # 5 % and three standard errors


@pytest.mark.parametrize(("name", "examples", "count"), [("pearson", 300, 200), ("spearman", 300, 200), ("pearson", 1500, 100)])
def test_a_correlation_that_loses_just_the_budget_is_accepted_in_at_most_5_percent(
    name: MetricName, examples: int, count: int
) -> None:
    accepted, _ = trials(name, lambda generator: regressors(generator, examples, BUDGET), count)
    assert accepted / count <= 0.05 + 3 * (0.05 * 0.95 / count) ** 0.5


def test_looks_grow_and_their_errors_add_up() -> None:
    assert [look.examples for look in plan_looks(399)] == [399]
    assert [look.examples for look in plan_looks(400)] == [200, 400]
    assert [look.examples for look in plan_looks(5000)] == [625, 1250, 2500, 5000]
    for total in (10, 400, 1500, 5000):
        looks = plan_looks(total)
        assert sum(look.accept_error for look in looks) == pytest.approx(TOTAL_ERROR)
        assert sum(look.refuse_error for look in looks) == pytest.approx(TOTAL_ERROR)
        assert looks[-1].accept_error > 0.85 * TOTAL_ERROR
        assert [look.last for look in looks] == [False] * (len(looks) - 1) + [True]


def test_examples_that_share_texts_are_looked_at_together() -> None:
    pairs = [(index // 3, 10_000 + index) for index in range(900)]  # three examples per text
    order, looks = order_of(pairs, 900, seed=0)
    assert sorted(order) == list(range(900))
    assert len(looks) == 3
    for look in looks:
        first = {pairs[index][0] for index in order[: look.examples]}
        rest = {pairs[index][0] for index in order[look.examples :]}
        assert not first & rest
    assert order_of(pairs, 900, seed=0)[0] == order != order_of(pairs, 900, seed=1)[0]


def test_data_that_hangs_together_is_looked_at_once() -> None:
    pairs = [(first, second) for first in range(40) for second in range(first)]
    order, looks = order_of(pairs, len(pairs), seed=0)
    assert order == list(range(len(pairs)))
    assert [(look.examples, look.last) for look in looks] == [(len(pairs), True)]

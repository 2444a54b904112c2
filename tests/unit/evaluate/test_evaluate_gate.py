from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.evaluate.agreement import compare_outputs
from hfaccel.evaluate.bounds import mean_lower_bound, mean_upper_bound
from hfaccel.evaluate.dataset import Dataset, Example
from hfaccel.evaluate.gate import Loss, paired_loss
from hfaccel.evaluate.judge import Verdict, judge
from hfaccel.evaluate.metrics import METRICS
from hfaccel.evaluate.predictions import predictions_from_outputs, tags_of_words, word_ids_from_offsets
from hfaccel.recipe.schema import AccuracySection

LIMITS = AccuracySection(
    max_loss=0.01, max_slice_loss=None, slice_examples=20, min_cosine=0.995, min_agreement=0.95, min_same_order=0.99, batch_invariance=0.99,
    max_examples=5000, resamples=400,
)  # fmt: skip


def classify(source: np.ndarray, candidate: np.ndarray, truth: np.ndarray | None) -> Verdict:
    labels = ("a", "b", "c")
    examples = tuple(Example(text=f"t{i}", label=None if truth is None else int(truth[i])) for i in range(len(source)))
    data = Dataset("d", examples, labelled=truth is not None, sha256="")
    outputs = [[{"logits": row} for row in logits] for logits in (source, candidate)]
    kind = "single_label_classification"
    predicted = [predictions_from_outputs("text-classification", kind, labels, data, rows)[0] for rows in outputs]  # type: ignore[arg-type]
    return judge(
        task="text-classification", problem_type="single_label_classification", labels=labels, dataset=data,
        source_outputs=outputs[0], candidate_outputs=outputs[1], source_predictions=predicted[0],
        candidate_predictions=predicted[1], settings=LIMITS, metric=None, seed=0,
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.booleans())
def test_identical_models_are_always_accepted(seed: int, count: int, labelled: bool) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, 3))
    verdict = classify(logits, logits.copy(), generator.integers(0, 3, count) if labelled else None)
    assert verdict.passed
    assert verdict.reason is None
    assert all(loss.loss == loss.upper_bound == 0 for loss in verdict.losses)


def test_few_examples_without_a_difference_do_not_prove_that_there_is_none() -> None:
    generator = np.random.default_rng(1)
    truth = generator.integers(0, 3, 100)
    logits = np.eye(3)[truth] * 4
    verdict = classify(logits, logits * 1.001, truth)
    assert verdict.reason == "loss-over-budget"
    assert verdict.losses[0].loss == 0
    assert verdict.losses[0].upper_bound == pytest.approx(1 - 0.05 ** (1 / 100))
    assert verdict.losses[0].method == "counts"


def entity_loss(count: int, lost: int, *, whole: bool) -> Loss:
    """Of sentences with three entities each, of which some lose one, or have another kind of each."""
    references = [["B-X", "O", "B-X", "O", "B-X"]] * count
    worse = [["B-Y", "O", "B-Y", "O", "B-Y"] if whole else ["O", "O", "B-X", "O", "B-X"]] * lost + references[lost:]
    return paired_loss(
        METRICS["entity_f1"], references, worse, references, confidence=0.95, resamples=500, seed=0, same_outputs=False
    )


def test_a_model_that_differs_in_fewer_examples_is_not_held_to_be_worse() -> None:
    bounds = [entity_loss(600, lost, whole=False).upper_bound for lost in range(9)]
    assert max(bounds) == pytest.approx(1 - 0.05 ** (1 / 600))  # what a sample of this size cannot see


def test_sentences_lost_as_a_whole_weigh_as_much_as_they_cost() -> None:
    part, whole = entity_loss(600, 4, whole=False), entity_loss(600, 4, whole=True)
    assert whole.upper_bound > 0.01 > part.upper_bound
    assert part.method == whole.method == "examples+exact"


@pytest.mark.parametrize("count", [150, 400])
@pytest.mark.parametrize("whole", [True, False])
def test_rare_losses_of_three_budgets_are_refused(count: int, whole: bool) -> None:
    share = 0.03 if whole else 0.09
    random = np.random.default_rng(3)
    refused = sum(entity_loss(count, int(random.binomial(count, share)), whole=whole).upper_bound > 0.01 for _ in range(100))
    assert refused >= 95


def test_outputs_that_are_not_finite_fail() -> None:
    logits = np.eye(3)
    broken = logits.copy()
    broken[1, 1] = np.nan
    verdict = classify(logits, broken, np.arange(3))
    assert (verdict.passed, verdict.reason) == (False, "not-finite")


@pytest.mark.parametrize(("sure", "reason"), [(3.0, "loss-over-budget"), (0.05, "agreement-under-minimum")])
def test_disagreement_without_labels_fails_however_sure_the_source_was(sure: float, reason: str) -> None:
    logits = sure * np.random.default_rng(0).normal(size=(400, 3))
    changed = logits.copy()
    changed[:40] = np.roll(changed[:40], 1, axis=1)
    verdict = classify(logits, changed, None)
    assert verdict.reason == reason
    assert verdict.agreement_mean == pytest.approx(0.9)
    assert verdict.to_json()["labelled"] is False
    assert verdict.to_json()["losses"][0]["labelled"] is False


def test_another_answer_costs_what_the_source_gave_away() -> None:
    source = np.log(np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.9, 0.05, 0.05]]))
    answers = np.array([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])  # the second one turned
    agreement = compare_outputs(
        "text-classification", [{"logits": row} for row in source], [{"logits": row} for row in answers],
        problem_type="single_label_classification",
    )  # fmt: skip
    assert agreement.expected is not None
    assert agreement.expected.source == pytest.approx([0.7, 0.4, 0.9])
    assert agreement.expected.candidate == pytest.approx([0.7, 0.35, 0.9])
    assert agreement.expected.worst == pytest.approx([0.1, 0.25, 0.05])


def test_labels_of_their_own_cost_what_each_yes_or_no_gave_away() -> None:
    source = np.log(np.array([0.9, 0.6, 0.2]) / np.array([0.1, 0.4, 0.8]))
    agreement = compare_outputs(
        "text-classification", [{"logits": source}], [{"logits": source * [1, -1, 1]}], problem_type="multi_label_classification"
    )
    assert agreement.expected is not None
    found = agreement.expected
    assert [found.source[0], found.candidate[0], found.worst[0]] == pytest.approx([2.3 / 3, 2.1 / 3, 0.7 / 3])


def test_answers_that_turn_where_the_source_is_of_two_minds_cost_little_and_others_are_refused() -> None:
    """Labels drawn from the source's own probabilities lose what was expected without them, up to chance."""
    generator = np.random.default_rng(4)
    logits = generator.normal(size=(4000, 3)) * 4
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = np.array([generator.choice(3, p=row) for row in probabilities])
    margin = np.diff(np.sort(probabilities, axis=1)[:, 1:], axis=1)[:, 0]
    swapped = logits[:, ::-1].copy()
    near, sure = np.argsort(margin)[:100], np.argsort(margin)[-100:]
    for turned, accepted in ((near, True), (sure, False)):
        candidate = logits.copy()
        candidate[turned] = swapped[turned]
        blind, sighted = classify(logits, candidate, None), classify(logits, candidate, truth)
        assert blind.passed is accepted
        assert blind.losses[0].loss == pytest.approx(sighted.losses[0].loss, abs=0.006)


def test_what_was_not_seen_costs_no_more_than_the_source_could_lose() -> None:
    """100 equal answers leave 3 % unseen, of which each costs up to what the surest answer of the source stands above the worst."""
    direction = np.random.default_rng(7).normal(size=(100, 3))
    for sure, most in ((0.01, 0.01), (8.0, 0.05)):
        verdict = classify(sure * direction, sure * direction * 1.001, None)
        assert verdict.agreement_mean == 1
        chances = np.exp(sure * direction) / np.exp(sure * direction).sum(axis=1, keepdims=True)
        cost = float((chances.max(axis=1) - chances.min(axis=1)).max()) / float(chances.max(axis=1).mean())
        assert verdict.losses[0].upper_bound == pytest.approx((1 - 0.05 ** (1 / 100)) * cost)
        assert verdict.losses[0].upper_bound < most


def test_three_times_the_budget_is_rejected_without_labels_too() -> None:
    generator = np.random.default_rng(0)
    logits, noise = generator.normal(size=(50_000, 3)) * 3, generator.normal(size=(50_000, 3))
    low, high = 0.0, 20.0
    for _ in range(20):  # the noise with which 3 % are lost on all of these texts, of which each trial draws some
        middle = (low + high) / 2
        low, high = (middle, high) if _expected_loss(logits, logits + middle * noise) < 0.03 else (low, middle)
    accepted = 0
    for _ in range(100):
        drawn = generator.choice(len(logits), 483, replace=False)
        accepted += classify(logits[drawn], (logits + high * noise)[drawn], None).passed
    assert accepted <= 5


def _expected_loss(source: np.ndarray, candidate: np.ndarray) -> float:
    chances = np.exp(source) / np.exp(source).sum(axis=1, keepdims=True)
    rows = np.arange(len(source))
    return float(1 - chances[rows, candidate.argmax(axis=1)].mean() / chances[rows, source.argmax(axis=1)].mean())


def test_pairs_of_shared_texts_give_a_wider_bound_than_independent_pairs() -> None:
    generator = np.random.default_rng(3)
    pairs = list(itertools.combinations(range(15), 2))
    noise = generator.normal(size=15)  # one noisy text spoils all its pairs
    truth = generator.normal(size=len(pairs))
    source = truth + 0.5 * generator.normal(size=len(pairs))
    candidate = source + 0.5 * np.array([noise[a] + noise[b] for a, b in pairs])
    metric = METRICS["spearman"]
    shared = paired_loss(metric, source, candidate, truth, confidence=0.95, clusters=pairs, resamples=1000, seed=0)
    alone = paired_loss(metric, source, candidate, truth, confidence=0.95, resamples=1000, seed=0)
    assert (shared.method, alone.method) == ("texts", "examples")
    assert shared.loss == alone.loss
    assert shared.upper_bound > alone.upper_bound > shared.loss > 0
    assert shared == paired_loss(metric, source, candidate, truth, confidence=0.95, clusters=pairs, resamples=1000, seed=0)


def test_many_small_groups_are_drawn_as_groups() -> None:
    truth = np.zeros(100, dtype=np.int64)
    candidate = (np.arange(100) < 10).astype(np.int64)
    clusters = [(index // 2,) for index in range(100)]
    loss = paired_loss(METRICS["accuracy"], truth, candidate, truth, confidence=0.95, clusters=clusters, resamples=300, seed=0)
    assert loss.method == "groups"


def test_bounds_of_means() -> None:
    assert mean_lower_bound(np.ones(299), confidence=0.95, shares=True)[1] > 0.99
    assert mean_lower_bound(np.ones(298), confidence=0.95, shares=True)[1] < 0.99
    assert mean_lower_bound(np.ones(5), confidence=0.95) == (1.0, 1.0)
    assert mean_lower_bound([0.5], confidence=0.95) == (0.5, -1.0)
    assert (
        mean_upper_bound([1, 1, 0], confidence=0.95, shares=True) < 1 == mean_upper_bound([1, 1, 1], confidence=0.95, shares=True)
    )


def test_similarity_uses_one_output_per_distinct_text() -> None:
    data = Dataset("d", (Example(("a", "b"), 1.0), Example(("a", "c"), 0.0)), labelled=True, sha256="", separate_pairs=True)
    assert data.texts() == ("a", "b", "c")
    outputs = [{"sentence_embedding": np.array(vector)} for vector in ([1.0, 0.0], [2.0, 0.0], [0.0, 1.0])]
    predictions, references = predictions_from_outputs("sentence-similarity", None, (), data, outputs)
    assert predictions.tolist() == [1, 0]
    assert references.tolist() == [1, 0]


def test_the_first_token_of_a_word_gives_its_tag() -> None:
    words = word_ids_from_offsets([(0, 4), (5, 9), (10, 12)], [(0, 0), (0, 2), (2, 4), (5, 9), (0, 0)])
    assert words == [None, 0, 0, 1, None]
    assert tags_of_words([0, 1, 0, 0, 1], words, 3, ("O", "B-PER")) == ("B-PER", "O", "O")


def test_single_numbers_agree_by_their_order() -> None:
    source = [{"logits": np.array([float(value)])} for value in (0, 1, 2)]
    candidate = [{"logits": np.array([float(value)])} for value in (0, 20, 10)]
    agreement = compare_outputs("text-ranking", source, candidate)
    assert agreement.top1 is not None
    assert agreement.top1.tolist() == [1, 0.5, 0.5]
    assert agreement.kl is None

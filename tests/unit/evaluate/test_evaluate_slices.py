from __future__ import annotations

import json

import numpy as np
import pytest

from hfaccel.artifact.contract import Task
from hfaccel.evaluate.dataset import Dataset, Example
from hfaccel.evaluate.explain import explain
from hfaccel.evaluate.judge import Verdict, judge
from hfaccel.evaluate.slices import find_slices
from hfaccel.recipe.schema import AccuracySection

LIMITS = AccuracySection(
    max_loss=0.01, max_slice_loss=None, slice_examples=20, min_cosine=0.995, min_agreement=0.95, min_same_order=0.99, batch_invariance=0.99,
    max_examples=5000, resamples=400,
)  # fmt: skip
LABELS = ("negative", "positive")


def reviews(count: int, languages: tuple[str, ...] = (), *, labelled: bool = True) -> Dataset:
    examples = tuple(
        Example(
            f"text {index} " + "x" * (index * 7 % 50),
            index % 2 if labelled else None,
            slice=languages[index // 2 % len(languages)] if languages else None,
        )
        for index in range(count)
    )
    return Dataset("reviews", examples, labelled, "", slice_column="language")


def verdict_of(data: Dataset, wrong: np.ndarray, limits: AccuracySection = LIMITS) -> Verdict:
    """Of a source that is always right, and a candidate that is not where ``wrong`` [examples]."""
    truth = np.arange(len(data.examples)) % 2
    answers = np.where(wrong, 1 - truth, truth)
    return judge(
        task="text-classification", problem_type="single_label_classification", labels=LABELS, dataset=data,
        source_outputs=[{"logits": row} for row in 3 * np.eye(2)[truth]],
        candidate_outputs=[{"logits": row} for row in 3.1 * np.eye(2)[answers]],
        source_predictions=truth, candidate_predictions=answers, settings=limits, metric=None, seed=0,
    )  # fmt: skip


def test_data_is_sliced_by_length_label_and_language() -> None:
    data = reviews(400, ("de", "en"))
    slices = find_slices(data, LABELS, "text-classification", "single_label_classification")
    assert [item.name for item in slices if item.kind != "length"] == [
        "label negative", "label positive", "language de", "language en",
    ]  # fmt: skip
    lengths = [item for item in slices if item.kind == "length"]
    assert len(lengths) == 4
    assert sorted(member for item in lengths for member in item.members) == list(range(400))
    assert all(item.name.startswith("length ") and item.name.endswith(" characters") for item in lengths)
    assert slices[0].first(10).members == tuple(member for member in slices[0].members if member < 10)


def test_data_of_one_kind_has_no_slices() -> None:
    data = Dataset("d", tuple(Example(f"text {index:03}", slice="de") for index in range(60)), False, "")
    assert find_slices(data, (), "feature-extraction", None) == ()


def test_a_candidate_that_spoils_one_language_is_refused_though_the_whole_is_inside_the_budget() -> None:
    others = tuple(f"language{number}" for number in range(18))
    data = reviews(20_000, ("de", "th", *others))
    hurt = np.array([example.slice == "th" for example in data.examples])
    wrong = hurt & (np.arange(len(hurt)) % 7 == 0)  # 14 % of the Thai texts, 0.7 % of all
    verdict = verdict_of(data, wrong)
    assert verdict.losses[0].upper_bound < LIMITS.max_loss
    assert verdict.reason == "slice-loss-over-budget"
    assert not verdict.too_few_examples
    detail = explain(verdict, LIMITS)
    assert detail.startswith("language th: accuracy 1.0000 -> 0.857")
    assert detail.endswith("a slice may lose 3.00%")
    shown = {item["name"]: item for item in json.loads(json.dumps(verdict.to_json()))["slices"]}
    assert shown["language th"]["examples"] == 1000
    assert shown["language th"]["lower_bound"] > 0.03 >= shown["language de"]["upper_bound"]
    assert shown["language de"]["loss"] == 0
    lenient = LIMITS.model_copy(update={"max_slice_loss": 0.2})
    assert verdict_of(data, wrong, lenient).passed


def test_a_slice_is_held_against_a_candidate_only_when_it_is_proven_to_be_hurt() -> None:
    data = reviews(4000, ("de", *["en"] * 79))
    wrong = np.zeros(4000, dtype=bool)
    wrong[np.flatnonzero([example.slice == "de" for example in data.examples])[:3]] = True  # 3 of 50: 6 %, but few
    verdict = verdict_of(data, wrong)
    german = next(item for item in verdict.slices if item.name == "language de")
    assert german.loss > german.limit > german.lower_bound
    assert verdict.passed


def test_slices_hurt_by_chance_fail_at_most_5_percent_of_good_candidates() -> None:
    data = reviews(1000, tuple("abcdefghij"))
    failed = 0
    for seed in range(60):
        verdict = verdict_of(data, np.random.default_rng(seed).random(1000) < 0.03)  # every slice loses just what it may
        failed += any(item.lower_bound > item.limit for item in verdict.slices)
    assert failed <= 7  # 3 of 60 are 5 %; 7 are less likely than 1 %


@pytest.mark.parametrize("task", ["feature-extraction", "text-classification"])
def test_without_labels_slices_are_compared_with_the_source(task: Task) -> None:
    data = reviews(8000, tuple("abcdefghijklmnopqrstuvwxyz"), labelled=False)
    generator = np.random.default_rng(0)
    source = generator.normal(size=(8000, 8))
    source[:, 0] += 30
    candidate = source.copy()
    hurt = np.array([example.slice == "q" for example in data.examples])
    if task == "feature-extraction":
        candidate[hurt, 1] += 9  # a cosine of about 0.96
    else:
        spoiled = np.flatnonzero(hurt)[::8]
        candidate[spoiled, 0] -= 60
    name = "last_hidden_state" if task == "feature-extraction" else "logits"
    verdict = judge(
        task=task, problem_type=None if task == "feature-extraction" else "single_label_classification", labels=(), dataset=data,
        source_outputs=[{name: row[None] if name == "last_hidden_state" else row} for row in source],
        candidate_outputs=[{name: row[None] if name == "last_hidden_state" else row} for row in candidate],
        source_predictions=[], candidate_predictions=[], settings=LIMITS, metric=None, seed=0,
    )  # fmt: skip
    assert verdict.reason == "slice-loss-over-budget"
    assert explain(verdict, LIMITS).startswith(
        f"language q: {'cosine' if task == 'feature-extraction' else 'expected_accuracy'} 1.0000 -> "
    )
    assert [item.name for item in verdict.slices if item.lower_bound > item.limit] == ["language q"]


def test_a_refusal_for_too_few_examples_says_how_many_would_do() -> None:
    wrong = np.zeros(250, dtype=bool)
    verdict = verdict_of(reviews(250), wrong)
    assert (verdict.reason, verdict.too_few_examples, verdict.examples_needed) == ("loss-over-budget", True, 300)
    assert explain(verdict, LIMITS) == (
        "accuracy 1.0000 -> 1.0000: loss +0.00%, 95 % bound +1.19%, budget 1.00%; what was seen is within the limit, but 250 "
        "examples are too few to prove it: about 300 examples would decide"
    )
    wrong[0] = True
    few = LIMITS.model_copy(update={"max_examples": 500})
    text = explain(verdict_of(reviews(250), wrong, few), few)
    assert text.endswith("examples would decide (with accuracy.max_examples above 500)")
    wrong[:10] = True
    verdict = verdict_of(reviews(250), wrong)
    assert not verdict.too_few_examples
    assert explain(verdict, LIMITS).endswith("budget 1.00%")


def test_a_refusal_without_labels_says_how_many_examples_would_do() -> None:
    verdict = verdict_of(reviews(200, labelled=False), np.zeros(200, dtype=bool))
    assert (verdict.reason, verdict.too_few_examples) == ("loss-over-budget", True)
    sure = 1 / (1 + np.exp(-3))  # of the source: it expects to be right so often, and another answer to be wrong so often
    assert verdict.examples_needed == pytest.approx(299 * (sure - (1 - sure)) / sure, abs=10)

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax, rel_entr, softmax

from hfaccel.evaluate.perplexity import (
    SHORTEST_WINDOW,
    Divergence,
    LanguageLoss,
    Window,
    WindowScores,
    compare_scores,
    cut_windows,
    divergence,
    explain_language,
    judge_language,
    perplexity,
    score_window,
)
from hfaccel.recipe.schema import AccuracySection

LIMITS = AccuracySection(
    max_loss=0.01, max_slice_loss=None, slice_examples=20, min_cosine=0.995, min_agreement=0.95, min_same_order=0.99, batch_invariance=0.99,
    max_examples=5000, resamples=400,
)  # fmt: skip
TOKENS, VOCABULARY = 20, 7
LOGITS = arrays(np.float64, (TOKENS, VOCABULARY), elements=st.floats(-50, 50))
IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=TOKENS, max_size=TOKENS)


# Windows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(16, 80), st.integers(16, 80))
def test_windows_score_each_token_at_most_once_and_leave_out_only_short_tails(
    lengths: list[int], length: int, stride: int
) -> None:
    stride = min(stride, length)
    texts = [list(range(count)) for count in lengths]
    found = cut_windows(texts, length=length, stride=stride)
    for number, text in enumerate(texts):
        own = [window for window in found if window.cluster == number]
        scored = [token for window in own for token in window.ids[window.first :]]
        assert len(scored) == len(set(scored))
        assert all(len(window.ids) <= length and window.first >= 1 for window in own)
        # Left out: the first token of each window without context, and a tail.
        unscored = set(text) - set(scored) - {window.ids[0] for window in own}
        assert unscored == set(text[len(text) - len(unscored) :])
        assert len(unscored) < SHORTEST_WINDOW


def test_windows_by_hand() -> None:
    text = list(range(52))
    assert [(window.ids[0], len(window.ids), window.first) for window in cut_windows([text], length=20)] == [
        (0, 20, 1),
        (20, 20, 1),
    ]
    assert [(window.ids[0], len(window.ids), window.first) for window in cut_windows([[], text], length=20, stride=16)] == [
        (0, 20, 1),
        (16, 20, 4),
        (32, 20, 4),
    ]


@pytest.mark.parametrize(("length", "stride"), [(8, None), (32, 33), (32, 0)])
def test_windows_refuse_a_length_that_gives_none(length: int, stride: int | None) -> None:
    with pytest.raises(ValueError, match="give a length"):
        cut_windows([[1] * 50], length=length, stride=stride)


# Scores


@settings(max_examples=60, deadline=None)
@given(LOGITS, IDS, st.integers(1, TOKENS - 1), st.floats(-1e4, 1e4))
def test_scores_equal_scipy_and_do_not_see_a_shift(
    logits: npt.NDArray[np.float64], ids: list[int], first: int, shift: float
) -> None:
    window = Window(tuple(ids), 3, first)
    scores = score_window(logits, window)
    want = [-log_softmax(logits[place - 1])[ids[place]] for place in range(first, TOKENS)]
    assert scores.nll == pytest.approx(want, abs=1e-9)
    assert scores.cluster == 3
    assert (logits[np.arange(first - 1, TOKENS - 1), scores.top1] == logits[first - 1 : -1].max(axis=1)).all()
    assert score_window(logits + shift, window).nll == pytest.approx(want, abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(LOGITS, LOGITS, st.floats(-1e4, 1e4))
def test_divergence_equals_scipy(source: npt.NDArray[np.float64], candidate: npt.NDArray[np.float64], shift: float) -> None:
    found = divergence(source, candidate)
    want = rel_entr(softmax(source, axis=1), softmax(candidate, axis=1)).sum(axis=1)
    assert (found.kl >= 0).all()
    assert found.kl == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert (np.abs(found.cosine) <= 1).all()
    same = divergence(source, source + shift)
    assert same.kl == pytest.approx(np.zeros(TOKENS), abs=1e-8)
    assert not divergence(source, source).kl.any()
    varied = source.std(axis=1) > 1e-3
    assert same.cosine[varied] == pytest.approx(np.ones(varied.sum()), abs=1e-6)


def test_a_large_vocabulary_goes_in_slices_and_half_precision_is_read() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (20, 256_000)).astype(np.float16)
    ids = tuple(int(token) for token in generator.integers(0, 256_000, 20))
    want = [-log_softmax(logits[place - 1].astype(np.float64))[ids[place]] for place in range(1, 20)]
    assert score_window(logits, Window(ids, 0)).nll == pytest.approx(want, abs=1e-10)


def test_a_masked_token_adds_nothing_and_one_that_only_the_candidate_masks_is_not_finite() -> None:
    source = np.array([[1.0, 2.0, -np.inf], [1.0, 2.0, 3.0]])
    found = divergence(source, np.array([[1.0, 2.0, 5.0], [1.0, 2.0, -np.inf]]))
    assert 0 < found.kl[0] < np.inf
    assert found.kl[1] == np.inf
    assert divergence(source, source).kl.tolist() == [0.0, 0.0]
    assert np.isfinite(found.cosine).all()


def test_logits_of_another_window_are_refused() -> None:
    with pytest.raises(ValueError, match="give \\[tokens, vocabulary\\]"):
        score_window(np.zeros((19, 7)), Window((0,) * 20, 0))
    with pytest.raises(ValueError, match="ids up to 7"):
        score_window(np.zeros((20, 7)), Window((7,) * 20, 0))
    with pytest.raises(ValueError, match="the source has"):
        divergence(np.zeros((19, 7)), np.zeros((20, 7)))
    with pytest.raises(ValueError, match="no scored tokens"):
        perplexity([])


# Comparison


def drawn_windows(
    generator: np.random.Generator, loss: float, *, texts: int = 20, spread: float = 0.02, noise: float = 0.3
) -> tuple[list[WindowScores], list[WindowScores], list[Divergence]]:
    """Source and candidate whose perplexity is higher by ``loss``; texts differ in length and in how much they lose."""
    source, candidate, divergences = [], [], []
    for cluster in range(texts):
        tokens = int(np.clip(generator.lognormal(5, 0.6), 20, 600))
        before = generator.gamma(1.2, 2.8, tokens)
        differences = math.log1p(loss) + generator.normal(0, spread) + generator.normal(0, noise, tokens)
        top1 = generator.integers(0, 100, tokens)
        source.append(WindowScores(before, top1, cluster))
        candidate.append(WindowScores(before + differences, np.where(generator.random(tokens) < 0.9, top1, -1), cluster))
        divergences.append(Divergence(generator.gamma(1, 0.01, tokens), np.full(tokens, 0.999)))
    return source, candidate, divergences


def identical_windows(generator: np.random.Generator, texts: int) -> LanguageLoss:
    source, _, divergences = drawn_windows(generator, 0.0, texts=texts)
    nothing = [Divergence(np.zeros_like(item.kl), np.ones_like(item.cosine)) for item in divergences]
    return compare_scores(source, source, nothing)


def test_the_figures_of_a_comparison_by_hand() -> None:
    one, two = np.full(20, 2.0), np.full(30, 3.0)
    source = [WindowScores(one, np.zeros(20, dtype=np.int64), 0), WindowScores(two, np.zeros(30, dtype=np.int64), 1)]
    candidate = [WindowScores(one + 0.1, np.zeros(20, dtype=np.int64), 0), WindowScores(two, np.ones(30, dtype=np.int64), 1)]
    divergences = [Divergence(np.full(2, 0.25), np.full(2, 0.5)), Divergence(np.full(2, 0.75), np.ones(2))]
    loss = compare_scores(source, candidate, divergences)
    assert loss.source_perplexity == pytest.approx(math.exp(2.6)) == perplexity(source)
    assert loss.candidate_perplexity == pytest.approx(math.exp(2.64))
    assert loss.loss == pytest.approx(math.expm1(0.04))
    # Without the one text the mean difference is 0, without the other 0.1; t with one degree of freedom is 6.31.
    error = math.sqrt((0.04**2 + 0.06**2) / 2)
    assert loss.upper_bound == pytest.approx(math.expm1(0.04 + 6.3138 * error), rel=1e-3)
    assert loss.lower_bound == pytest.approx(math.expm1(0.04 - 6.3138 * error), rel=1e-3)
    assert (loss.kl_mean, loss.agreement_mean, loss.cosine_mean) == pytest.approx((0.5, 0.4, 0.75))
    assert loss.kl_upper_bound > loss.kl_mean
    assert loss.agreement_lower_bound < 0.4
    assert (loss.tokens, loss.windows, loss.documents, loss.non_finite) == (50, 2, 2, 0)


def test_what_does_not_belong_together_is_refused() -> None:
    source, candidate, divergences = drawn_windows(np.random.default_rng(0), 0.0, texts=3)
    with pytest.raises(ValueError, match="one per window"):
        compare_scores(source, candidate[:2], divergences)
    with pytest.raises(ValueError, match="same windows in the same order"):
        compare_scores(source, candidate[::-1], divergences)
    with pytest.raises(ValueError, match="no tokens to compare"):
        compare_scores([], [], [])


@pytest.mark.parametrize("texts", [5, 12, 60])
def test_the_bound_covers_the_true_loss(texts: int) -> None:
    """Coverage of the one-sided 95 % bound where tokens of a text lose together and texts differ in length."""
    generator = np.random.default_rng(texts)
    covered = [compare_scores(*drawn_windows(generator, 0.02, texts=texts)).upper_bound >= 0.02 for _ in range(400)]
    assert np.mean(covered) >= 0.92  # 95 % less three standard errors


def test_bounds_over_tokens_would_be_too_sure_of_themselves() -> None:
    """What the clusters are for: the same data as if each token was a text of its own."""
    generator = np.random.default_rng(1)
    covered = []
    for _ in range(200):
        source, candidate, _ = drawn_windows(generator, 0.02, texts=12)
        differences = np.concatenate([after.nll - before.nll for before, after in zip(source, candidate, strict=True)])
        bound = differences.mean() + 1.645 * differences.std(ddof=1) / math.sqrt(len(differences))
        covered.append(math.expm1(bound) >= 0.02)
    assert np.mean(covered) < 0.9


def test_a_text_that_holds_most_tokens_does_not_make_the_bound_narrow() -> None:
    generator = np.random.default_rng(2)
    covered = []
    for _ in range(300):
        source, candidate, divergences = drawn_windows(generator, 0.0, texts=8)
        moved = 0.02 * generator.normal()
        longest = np.full(20_000, 3.0)
        source.append(WindowScores(longest, np.zeros(20_000, dtype=np.int64), 8))
        candidate.append(WindowScores(longest + moved, np.zeros(20_000, dtype=np.int64), 8))
        divergences.append(Divergence(np.zeros(1), np.ones(1)))
        covered.append(compare_scores(source, candidate, divergences).upper_bound >= 0)
    assert np.mean(covered) >= 0.9


# The gate


def test_a_loss_of_three_budgets_is_refused() -> None:
    generator = np.random.default_rng(3)
    verdicts = [judge_language(compare_scores(*drawn_windows(generator, 0.03)), LIMITS) for _ in range(100)]
    assert sum(not verdict.passed and verdict.reason == "loss-over-budget" for verdict in verdicts) >= 95


def test_an_identical_candidate_passes() -> None:
    generator = np.random.default_rng(4)
    for texts in range(2, 102):
        loss = identical_windows(generator, texts)
        assert (loss.loss, loss.upper_bound, loss.kl_mean, loss.agreement_lower_bound) == (0.0, 0.0, 0.0, 1.0)
        assert judge_language(loss, LIMITS).passed


def test_a_small_loss_passes_where_there_is_text_enough() -> None:
    generator = np.random.default_rng(5)
    verdicts = [
        judge_language(compare_scores(*drawn_windows(generator, 0.001, texts=100, spread=0.005)), LIMITS) for _ in range(50)
    ]
    assert sum(verdict.passed for verdict in verdicts) >= 45
    losses = verdicts[0].losses
    assert [(item.metric, item.method, item.examples) for item in losses] == [("perplexity", "documents", 100)]
    json.dumps(verdicts[0].to_json(), allow_nan=False)


def test_few_texts_are_told_how_many_would_do() -> None:
    loss = compare_scores(*drawn_windows(np.random.default_rng(6), 0.0, texts=4))
    verdict = judge_language(loss, LIMITS)
    assert not verdict.passed
    assert verdict.too_few_examples
    assert verdict.examples_needed is not None
    assert verdict.examples_needed > 4
    advice = f"4 texts are too few to prove it: about {verdict.examples_needed} texts would decide"
    read = verdict.examples_needed * loss.tokens // 4
    assert explain_language(loss, LIMITS.model_copy(update={"max_tokens": read})).endswith(advice)
    limited = explain_language(loss, LIMITS.model_copy(update={"max_tokens": read - 1}))
    assert limited.endswith(f"{advice} (with accuracy.max_tokens above {read - 1})")


def test_one_text_gives_no_pass_even_without_a_difference() -> None:
    loss = identical_windows(np.random.default_rng(7), 1)
    verdict = judge_language(loss, LIMITS)
    assert (loss.lower_bound, loss.upper_bound, loss.agreement_lower_bound) == (-1.0, math.inf, 0.0)
    assert (verdict.passed, verdict.reason, verdict.losses, verdict.too_few_examples) == (False, "loss-over-budget", (), True)
    assert explain_language(loss, LIMITS).endswith(
        "no bound from a single text, budget 1.00%: give more texts, at least 2 and better 30"
    )
    json.dumps(verdict.to_json(), allow_nan=False)


def test_equal_tokens_do_not_prove_that_all_are_equal() -> None:
    source, candidate, divergences = drawn_windows(np.random.default_rng(8), 0.0)
    agreeing = [replace(after, top1=before.top1) for before, after in zip(source, candidate, strict=True)]
    loss = compare_scores(source, agreeing, divergences)
    assert loss.agreement_mean == 1.0
    # About 3 of so many tokens may differ, a little more for 20 texts.
    assert 1 - 5 / loss.tokens < loss.agreement_lower_bound < 1 - 3 / loss.tokens


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_is_not_finite_never_passes(value: float, everywhere: bool) -> None:
    source, _, divergences = drawn_windows(np.random.default_rng(9), 0.0)
    candidate = [replace(item, nll=item.nll.copy()) for item in source]
    for item in candidate if everywhere else candidate[:1]:
        item.nll[:] = value
    loss = compare_scores(source, candidate, divergences)
    verdict = judge_language(loss, LIMITS)
    assert (verdict.passed, verdict.reason, verdict.losses) == (False, "not-finite", ())
    assert f"NaN or infinity in the logits at {loss.non_finite} of {loss.tokens}" in explain_language(loss, LIMITS)
    json.dumps(verdict.to_json(), allow_nan=False)


def test_nan_logits_reach_the_gate() -> None:
    ids = tuple(range(16))
    good, bad = np.zeros((16, 20)), np.full((16, 20), np.nan)
    source = [score_window(good, Window(ids, number)) for number in range(2)]
    candidate = [score_window(bad, Window(ids, number)) for number in range(2)]
    loss = compare_scores(source, candidate, [divergence(good[:-1], bad[:-1])] * 2)
    assert (loss.non_finite, judge_language(loss, LIMITS).reason) == (30, "not-finite")


def test_words_of_a_large_loss() -> None:
    source, candidate, divergences = drawn_windows(np.random.default_rng(10), 0.36)
    loss = replace(compare_scores(source, candidate, divergences), source_perplexity=30.88, candidate_perplexity=42.06)
    text = explain_language(replace(loss, loss=0.3621, upper_bound=0.3804), LIMITS)
    assert text == "perplexity 30.88 -> 42.06: loss +36.21%, 95 % bound +38.04%, budget 1.00%"

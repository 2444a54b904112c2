from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hfaccel.errors import UsageError
from hfaccel.runtime.generation.sampling import (
    SamplingSettings,
    apply_temperature,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_generators,
    penalize_repetition,
)

SEEN = [[3, 3, 7, 150], [1, 2, 9, 9]]
SEEDS = st.integers(0, 10_000)


def random_logits(seed: int, rows: int = 2, vocabulary: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 4, (rows, vocabulary)).astype(np.float32)


def theirs(processors: list[Any], logits: np.ndarray) -> np.ndarray:
    result: np.ndarray = LogitsProcessorList(processors)(torch.tensor(SEEN), torch.tensor(logits)).numpy()
    return result


@given(SEEDS, st.sampled_from([0.5, 1.0, 1.1, 2.0]))
def test_repetition_penalty_is_that_of_transformers(seed: int, penalty: float) -> None:
    logits = random_logits(seed)
    expected = theirs([RepetitionPenaltyLogitsProcessor(penalty)], logits)
    np.testing.assert_allclose(penalize_repetition(logits, SEEN, penalty), expected, rtol=1e-6)


@given(SEEDS, st.floats(0.1, 3.0))
def test_temperature_is_that_of_transformers(seed: int, temperature: float) -> None:
    logits = random_logits(seed)
    np.testing.assert_allclose(
        apply_temperature(logits, temperature), theirs([TemperatureLogitsWarper(temperature)], logits), rtol=1e-6
    )


@given(SEEDS, st.integers(1, 250))
def test_top_k_is_that_of_transformers(seed: int, top_k: int) -> None:
    logits = random_logits(seed).round()  # rounded, so that some are level
    np.testing.assert_array_equal(keep_top_k(logits, top_k), theirs([TopKLogitsWarper(top_k)], logits))


@given(SEEDS, st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.95, 0.999]))
def test_top_p_is_that_of_transformers(seed: int, top_p: float) -> None:
    logits = random_logits(seed)
    np.testing.assert_array_equal(keep_top_p(logits, top_p), theirs([TopPLogitsWarper(top_p)], logits))


@given(SEEDS, st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
def test_min_p_is_that_of_transformers(seed: int, min_p: float) -> None:
    logits = random_logits(seed)
    np.testing.assert_array_equal(keep_min_p(logits, min_p), theirs([MinPLogitsWarper(min_p)], logits))


@given(SEEDS)
def test_all_filters_in_a_row_leave_what_transformers_leaves(seed: int) -> None:
    logits = random_logits(seed)
    order = [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(1.7),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.05),
    ]
    kept = np.isfinite(theirs(order, logits))
    settings = SamplingSettings(
        do_sample=True, repetition_penalty=1.3, temperature=1.7, top_k=40, top_p=0.9, min_p=0.05, seed=seed
    )
    generators = make_generators(seed, 2)
    drawn = np.stack([choose(logits, SEEN, settings, generators) for _ in range(50)])
    assert kept[0, drawn[:, 0]].all()
    assert kept[1, drawn[:, 1]].all()


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2, 1e-30]], dtype=np.float32))
    generators = make_generators(5, 1)
    settings = SamplingSettings(do_sample=True)
    drawn = [int(choose(logits, [[]], settings, generators)[0]) for _ in range(4000)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2, 0], atol=0.03)


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits = np.array([[3.0, 2.0, -1.0], [-1.0, -1.5, -4.0]], dtype=np.float32)
    assert choose(logits, [[], []], SamplingSettings(), []).tolist() == [0, 0]
    assert choose(logits, [[0], [0]], SamplingSettings(repetition_penalty=2.0), []).tolist() == [1, 1]
    assert logits[0, 0] == 3.0


@given(SEEDS, st.integers(0, 5))
def test_a_row_draws_the_same_whatever_its_neighbours(seed: int, row: int) -> None:
    settings = SamplingSettings(do_sample=True, temperature=2.0, seed=seed)
    logits = random_logits(seed, rows=6)
    together = choose(logits, [[]] * 6, settings, make_generators(seed, 6))
    other = random_logits(seed + 1, rows=6)
    other[row] = logits[row]
    assert choose(other, [[]] * 6, settings, make_generators(seed, 6))[row] == together[row]
    alone = choose(logits[row : row + 1], [[]], settings, [make_generators(seed, row + 1)[row]])
    assert alone[0] == together[row]


def test_rows_draw_differently_and_no_seed_draws_anew() -> None:
    first, second = (generator.random() for generator in make_generators(1, 2))
    assert first != second
    assert make_generators(None, 1)[0].random() != make_generators(None, 1)[0].random()


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"temperature": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"stop": ("",)},
        {"stop": (5,)},
    ],
    ids=str,
)
def test_settings_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"^(\w+): must be .*, not .* \(.*\)$") as caught:
        SamplingSettings(**options)
    assert caught.value.where == next(iter(options))
    assert caught.value.hint

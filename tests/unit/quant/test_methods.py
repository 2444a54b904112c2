"""The ways to round in blocks: none is worse than rounding to the nearest by the error that it is there to lower."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.quant.awq import chosen_scale, clipped
from hfaccel.quant.clipping import clipped_to_nearest
from hfaccel.quant.descent import improved, regularized
from hfaccel.quant.methods import MOMENT_ROUNDINGS
from hfaccel.quant.weight_only import BlockwiseWeight, quantize_weight
from hfaccel.recipe.contradictions import contradictions
from hfaccel.recipe.schema import Rung

METHODS = sorted(MOMENT_ROUNDINGS)


def rung(**fields: Any) -> Rung:
    four_bits = {"weight_only_bits": 4, "block_size": 32, "symmetric": False}
    made = Rung(**{"name": "four", "scheme": "weight-only", "graph": "optimized", **four_bits, **fields})
    assert contradictions(made) == ()
    return made


def case(channels: int, seed: int, outputs: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight [in, out], the moments of its activation, and more of that activation; channels move together, some are large."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(max(4, channels // 6), channels)) * np.exp(random.normal(size=channels))
    x = random.normal(size=(1600, len(mixing))) @ mixing + 0.1 * random.normal(size=(1600, channels))
    return random.normal(size=(channels, outputs)).astype(np.float32), x[:800].T @ x[:800] / 800, x[800:]


def cost(weight: np.ndarray, made: BlockwiseWeight, moments: np.ndarray) -> np.ndarray:
    """What rounding costs each output channel."""
    difference = made.dequantized(len(weight)) - weight
    return np.asarray(np.einsum("io,ij,jo->o", difference, regularized(moments, len(weight)), difference, optimize=True))


@given(st.integers(20, 140), st.integers(0, 2**32 - 1), st.sampled_from((16, 32, 64)), st.sampled_from(("awq", "auto-round")))
@settings(max_examples=20, deadline=None)
def test_the_error_that_is_minimized_is_no_larger_than_of_the_nearest(channels: int, seed: int, size: int, method: str) -> None:
    weight, moments, _ = case(channels, seed)
    wanted = rung(block_size=size)
    made = MOMENT_ROUNDINGS[method](weight, moments, bits=4, block_size=size)
    nearest = quantize_weight(weight, wanted)
    if method == "awq":  # it looks at the channels one by one
        moments = np.diag(np.diag(moments))
    assert cost(weight, made, moments).sum() <= 1.001 * cost(weight, nearest, moments).sum()


@given(st.integers(20, 140), st.integers(0, 2**32 - 1), st.sampled_from((16, 32, 64)), st.sampled_from(METHODS), st.booleans())
@settings(max_examples=25, deadline=None)
def test_descent_improves_whatever_it_starts_from(channels: int, seed: int, size: int, method: str, symmetric: bool) -> None:
    weight, moments, _ = case(channels, seed)
    if symmetric:
        start = quantize_weight(weight, rung(block_size=size, symmetric=True))
    else:
        start = MOMENT_ROUNDINGS[method](weight, moments, bits=4, block_size=size)
    before = cost(weight, start, moments)
    after = cost(weight, improved(start, weight, moments), moments)
    assert (after <= before * (1 + 1e-3) + 1e-6).all()
    if symmetric:
        assert after.sum() < 0.8 * before.sum()


@given(st.integers(100, 160), st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None)
def test_quant_ease_serves_unseen_activations_better_than_gptq(channels: int, seed: int) -> None:
    weight, moments, unseen = case(channels, seed, outputs=64)

    def error(method: str) -> float:
        made = MOMENT_ROUNDINGS[method](weight, moments, bits=4, block_size=32)
        return float(np.square(unseen @ (made.dequantized(channels) - weight)).mean())

    assert error("quant-ease") < error("gptq")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [4, 8])
@given(channels=st.integers(1, 80), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=8, deadline=None)
def test_levels_fit_and_nothing_is_infinite(method: str, bits: int, channels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    weight = (random.normal(size=(channels, 5)) * 10.0 ** random.integers(-6, 6)).astype(np.float32)
    weight[:, 2], weight[0] = 0, 0
    for moments in (np.zeros((channels, channels)), np.ones((channels, channels))):  # never active; all channels alike
        made = MOMENT_ROUNDINGS[method](weight, moments, bits=bits, block_size=16)
        assert made.zero_points is not None
        assert max(made.levels.max(), made.zero_points.max()) < 2**bits
        rounded = made.dequantized(channels)
        assert np.isfinite(rounded).all()
        assert not rounded[:, 2].any()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_weight_is_rounded_to_the_same_bytes(method: str) -> None:
    weight, moments, _ = case(96, 3)
    first, second = (MOMENT_ROUNDINGS[method](weight, moments, bits=4, block_size=32) for _ in range(2))
    assert first.packed.tobytes() == second.packed.tobytes()
    assert first.scales.tobytes() == second.scales.tobytes()


@pytest.mark.parametrize("method", ["quant-ease", "awq", "auto-round"])
def test_what_lies_on_the_grid_is_kept(method: str) -> None:
    levels = np.random.default_rng(0).integers(0, 16, (64, 8))
    levels[::32], levels[1::32] = 0, 15
    weight = ((levels - 7) * 0.25).astype(np.float32)
    made = MOMENT_ROUNDINGS[method](weight, np.eye(64), bits=4, block_size=32)
    np.testing.assert_allclose(made.dequantized(64), weight, atol=1e-5)


@given(st.integers(1, 150), st.integers(0, 2**32 - 1), st.sampled_from((16, 32, 64)))
@settings(max_examples=25, deadline=None)
def test_half_quadratic_blocks_are_never_further_from_the_weight(channels: int, seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    weight = (random.standard_t(3, size=(channels, 7)) * 10.0 ** random.integers(-5, 5)).astype(np.float32)

    def squares(method: str) -> np.ndarray:
        made = quantize_weight(weight, rung(block_size=size, method=method))
        padded = np.zeros((-(-channels // size) * size, 7))
        padded[:channels] = made.dequantized(channels).astype(np.float64) - weight
        return np.asarray(np.square(padded).reshape(-1, size, 7).sum(axis=1))

    nearest, solved = squares("rtn"), squares("hqq")
    assert (solved <= nearest * (1 + 1e-4) + 1e-30).all()


def test_half_quadratic_is_closer_where_weights_have_heavy_tails() -> None:
    weight = np.random.default_rng(0).standard_t(3, size=(256, 40)).astype(np.float32)
    errors = [
        np.square(quantize_weight(weight, rung(method=method)).dequantized(256) - weight).mean() for method in ("rtn", "hqq")
    ]
    assert errors[1] < 0.97 * errors[0]


def test_clipping_follows_what_inputs_are_worth() -> None:
    """One large weight that nothing ever meets must not coarsen the others of its block."""
    weight = np.random.default_rng(0).uniform(-1, 1, (32, 4)).astype(np.float32)
    weight[5] = 1.3
    worth = np.ones(32)
    worth[5] = 1e-6
    careful = clipped_to_nearest(weight, worth, bits=4, block_size=32).dequantized(32) - weight
    careless = clipped_to_nearest(weight, 100 * (1.0 - worth), bits=4, block_size=32).dequantized(32) - weight
    others = np.arange(32) != 5
    assert np.square(careful[others]).sum() <= np.square(careless[others]).sum()
    assert np.abs(careful[5]).min() > 0.05


def test_a_large_channel_gets_a_scale_and_equal_ones_do_not() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(64, 64)).astype(np.float32)
    each = np.arange(64)
    moments = np.eye(64)
    moments[7, 7] = moments[40, 40] = 3000.0
    scale = chosen_scale([weight], moments, each, rung(), clipped)
    assert scale is not None
    assert scale[[7, 40]].min() > 2 * np.delete(scale, [7, 40]).max()
    assert chosen_scale([weight], np.eye(64), each, rung(), clipped) is None


def test_heads_that_share_a_value_share_its_scale() -> None:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    spread = np.tile(np.arange(32), 2)
    moments = np.diag(np.where(np.arange(64) % 32 == 3, 3000.0, 1.0))
    scale = chosen_scale([weight], moments, spread, rung(), clipped)
    assert scale is not None
    assert scale.shape == (32,)
    assert scale.argmax() == 3

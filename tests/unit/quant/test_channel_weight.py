"""Weights with one scale per channel: rounded as closely as their format allows, and exact in kernels that add in 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.quant.channel_weight import ChannelWeight, largest_pairs, weight_scales
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import DOMAIN, new_initializer, save_graph
from hfaccel.runtime.session import GraphSession

FORMATS = [WeightFormat(), WeightFormat(7), WeightFormat(sums_in_16_bits=True)]


def random_weight(inputs: int, outputs: int, seed: int) -> np.ndarray:
    """Weights of any size, with tails, and a channel without any."""
    random = np.random.default_rng(seed)
    weight = random.standard_t(3, size=(inputs, outputs)) * 10.0 ** random.integers(-6, 6)
    weight[:, 0] = 0
    return weight.astype(np.float32)


@pytest.mark.parametrize("weights", FORMATS, ids=str)
@given(st.integers(1, 61), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_weight_is_rounded_within_half_a_step(
    weights: WeightFormat, inputs: int, outputs: int, seed: int, per_channel: bool
) -> None:
    weight = random_weight(inputs, outputs, seed)
    stored = ChannelWeight.nearest(weight, weights, per_channel=per_channel)
    assert stored.scales.shape == ((outputs,) if per_channel else ())
    assert (np.abs(stored.dequantized() - weight) <= stored.scales * 0.501).all()
    assert np.abs(stored.levels.astype(int)).max() <= 2 ** (weights.bits - 1) - 1


@given(st.integers(1, 61), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
@settings(max_examples=100, deadline=None)
def test_no_pair_exceeds_what_16_bits_hold(inputs: int, outputs: int, seed: int, per_channel: bool) -> None:
    weight = random_weight(inputs, outputs, seed)
    bounded = WeightFormat(sums_in_16_bits=True)
    stored = ChannelWeight.nearest(weight, bounded, per_channel=per_channel)
    levels = stored.levels.astype(int)
    for first, second in zip(levels[::2], levels[1::2], strict=False):
        for low, high in ((0, 0), (0, 255), (255, 0), (255, 255)):
            assert (np.abs(low * first + high * second) <= 2**15 - 1).all()
    assert (stored.scales >= weight_scales(weight, per_channel=per_channel)).all()
    # No coarser than it must be: the steps of 7 bits would do as well.
    assert (stored.scales <= weight_scales(weight, WeightFormat(7), per_channel=per_channel) * 1.01).all()


def test_large_weights_of_different_signs_or_apart_cost_no_precision() -> None:
    weight = np.array([[1.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(weight_scales(weight, WeightFormat(sums_in_16_bits=True)), 1 / 127, rtol=1e-6)
    assert largest_pairs(weight).tolist() == [[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]]


@pytest.mark.parametrize("inputs", [4, 63, 64, 65, 66, 67, 257])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33])
def test_the_kernel_is_exact_with_the_largest_activations(inputs: int, tokens: int, tmp_path: Path) -> None:
    """Every token has 255 where some channel's weights are positive, or negative, and 0 elsewhere: nothing adds up to more."""
    outputs = 24
    random = np.random.default_rng(inputs)
    weight = np.sign(random.normal(size=(inputs, outputs))) * random.uniform(0.6, 1, size=(inputs, outputs))
    stored = ChannelWeight.nearest(weight.astype(np.float32), WeightFormat(sums_in_16_bits=True))
    wanted = [stored.levels[:, token % outputs] * (1 if token % 3 else -1) > 0 for token in range(tokens)]
    integers = np.array(wanted, dtype=np.uint8) * np.uint8(255)
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20, DOMAIN: 1}, name="one"), ir_version=9)
    value = onnx_ir.val("x", onnx_ir.DataType.UINT8, ["tokens", inputs])
    one, ones = (new_initializer(model, f"ones{size}", np.ones(size, np.float32)) for size in ((), (outputs,)))
    product = onnx_ir.node(
        "MatMulIntegerToFloat",
        [value, new_initializer(model, "levels", stored.levels), one, ones, new_initializer(model, "zero", np.uint8(0))],
        domain=DOMAIN,
        name="product",
    )
    product.outputs[0].name, product.outputs[0].type = "y", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    model.graph.append(product)
    model.graph.inputs.append(value)
    model.graph.outputs.extend(product.outputs)
    found = GraphSession(save_graph(model, tmp_path)).run({"x": integers})["y"]
    np.testing.assert_array_equal(found, integers.astype(np.int64) @ stored.levels.astype(np.int64))

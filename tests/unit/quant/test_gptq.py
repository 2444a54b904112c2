"""The method gptq: products change less than with rounding to the nearest, on activations whose channels move together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.quant.build import build_candidate
from hfaccel.quant.channel_weight import LARGEST_PAIR, ChannelWeight, largest_pairs
from hfaccel.quant.gptq import compensated, compensated_channels
from hfaccel.quant.moments import MOST_BYTES, grouped, second_moments
from hfaccel.quant.observed import CalibrationData
from hfaccel.quant.weight_only import quantize_weight
from hfaccel.recipe.contradictions import contradictions
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import load_graph, new_initializer, save_graph


def rung(**fields: Any) -> Rung:
    four_bits = {"weight_only_bits": 4, "block_size": 32, "symmetric": False, "method": "gptq"}
    made = Rung(**{"name": "four", "scheme": "weight-only", "graph": "optimized", **four_bits, **fields})
    assert contradictions(made) == ()
    return made


def activations(tokens: int, channels: int, random: np.random.Generator) -> np.ndarray:
    """[tokens, channels] that move together, as those of a network do."""
    causes = random.normal(size=(tokens, max(4, channels // 6)))
    return np.asarray(causes @ random.normal(size=(causes.shape[1], channels)) + 0.1 * random.normal(size=(tokens, channels)))


def product_error(exact: np.ndarray, rounded: np.ndarray, x: np.ndarray) -> float:
    return float(np.square(x @ (rounded - exact)).mean() / np.square(x @ exact).mean())


@given(st.integers(40, 160), st.integers(0, 2**32 - 1), st.sampled_from((16, 32, 64)))
@settings(max_examples=20, deadline=None)
def test_products_change_less_than_with_rounding_to_the_nearest(channels: int, seed: int, block_size: int) -> None:
    random = np.random.default_rng(seed)
    x = activations(2000, channels, random)
    weight = random.normal(size=(channels, 48)).astype(np.float32)
    nearest = quantize_weight(weight, rung(method="k-quant", block_size=block_size)).dequantized(channels)
    made = compensated(weight, x[:1000].T @ x[:1000] / 1000, bits=4, block_size=block_size)
    # judged on activations that it has not seen
    assert product_error(weight, made.dequantized(channels), x[1000:]) < 0.7 * product_error(weight, nearest, x[1000:])


@given(st.integers(40, 160), st.integers(0, 2**32 - 1), st.sampled_from(((4, 32), (8, 64), (8, 0))))
@settings(max_examples=20, deadline=None)
def test_without_zero_points_products_change_less_too(channels: int, seed: int, form: tuple[int, int]) -> None:
    bits, block_size = form[0], form[1] or channels  # 0: a scale per channel
    random = np.random.default_rng(seed)
    x = activations(2000, channels, random)
    weight = random.normal(size=(channels, 48)).astype(np.float32)
    made = compensated(weight, x[:1000].T @ x[:1000] / 1000, bits=bits, block_size=block_size, symmetric=True)
    assert made.zero_points is None
    own = rung(method="rtn", symmetric=True, weight_only_bits=bits, block_size=form[1] or 256)
    nearest = quantize_weight(weight, own).dequantized(channels)
    assert product_error(weight, made.dequantized(channels), x[1000:]) < 0.7 * product_error(weight, nearest, x[1000:])


@given(st.integers(40, 161), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_sums_that_must_fit_into_16_bits_do_and_products_change_less_all_the_same(channels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = activations(2000, channels, random)
    weight = random.normal(size=(channels, 48)).astype(np.float32)
    bounded = WeightFormat(sums_in_16_bits=True)
    made = compensated_channels(weight, x[:1000].T @ x[:1000] / 1000, bounded)
    levels = made.levels[:, 0].T.astype(np.int16) - 128
    assert largest_pairs(levels).max() <= LARGEST_PAIR
    nearest = ChannelWeight.nearest(weight, bounded).dequantized()
    assert product_error(weight, made.dequantized(channels), x[1000:]) < 0.7 * product_error(weight, nearest, x[1000:])


@given(st.integers(1, 80), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_levels_and_zero_points_fit_into_their_bits(channels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    weight = (random.normal(size=(channels, 5)) * 10.0 ** random.integers(-6, 6)).astype(np.float32)
    made = compensated(weight, np.zeros((channels, channels)), bits=4, block_size=16)  # channels that were never active
    assert made.zero_points is not None
    assert made.levels.max() <= 15
    assert made.zero_points.max() <= 15
    assert np.isfinite(made.dequantized(channels)).all()


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4))
@settings(max_examples=20, deadline=None)
def test_without_zero_points_all_sixteen_levels_are_used(seed: int, scale: float) -> None:
    """Weights that were made from 4 bits, -8 to 7 times a scale of either sign, as llama.cpp's Q4_0 and many int4 trainings do."""
    random = np.random.default_rng(seed)
    levels = random.integers(-8, 8, (64, 8))
    levels[::32] = -8
    weight = (levels * scale * random.choice((-1, 1), 8)).astype(np.float32)
    made = compensated(weight, np.eye(64), bits=4, block_size=32, symmetric=True)
    np.testing.assert_allclose(made.dequantized(64), weight, rtol=1e-5)


def test_what_lies_on_the_grid_is_kept() -> None:
    levels = np.random.default_rng(0).integers(0, 16, (64, 8))
    levels[::32], levels[1::32] = 0, 15
    weight = ((levels - 7) * 0.25).astype(np.float32)
    made = compensated(weight, np.eye(64), bits=4, block_size=32)
    np.testing.assert_allclose(made.dequantized(64), weight, atol=1e-6)


def two_products(folder: Path) -> Path:
    """ids-shaped input -> values [batch, sequence, 64] -> product_0 -> product_1; named as a decoder's weights are."""
    random = np.random.default_rng(1)
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["batch", "sequence", 64]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    graph = onnx_ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="products")
    model = onnx_ir.Model(graph, ir_version=10)
    last = x
    for number, name in enumerate(("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.up_proj.weight")):
        weight = new_initializer(model, name, random.normal(size=(64, 64)).astype(np.float32) / 8)
        node = onnx_ir.node("MatMul", [last, weight], name=f"product_{number}")
        node.outputs[0].name = f"product_{number}_value"
        graph.append(node)
        last = node.outputs[0]
    last.shape, last.type = onnx_ir.Shape(["batch", "sequence", 64]), onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.outputs.append(last)
    folder.mkdir()
    return save_graph(model, folder)


@pytest.fixture
def batches() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(2)
    x = activations(60, 64, random).reshape(3, 20, 64).astype(np.float32)
    mask = np.ones((3, 20), dtype=np.int64)
    mask[1, 12:] = 0
    x[1, 12:] = 1e3  # padding
    return [{"x": x, "attention_mask": mask}]


def test_moments_leave_padding_out(tmp_path: Path, batches: list[dict[str, np.ndarray]]) -> None:
    model = load_graph(two_products(tmp_path / "graph"))
    found = second_moments(model, ["product_0_value"], batches, workdir=tmp_path / "work")
    weight = model.graph.initializers["model.layers.0.self_attn.o_proj.weight"].const_value
    assert weight is not None
    rows = batches[0]["x"][batches[0]["attention_mask"].astype(bool)] @ weight.numpy()
    np.testing.assert_allclose(found["product_0_value"], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_parts_named_by_the_rung_have_eight_bits(tmp_path: Path, batches: list[dict[str, np.ndarray]]) -> None:
    graph = two_products(tmp_path / "graph")
    (tmp_path / "out").mkdir()
    wanted = rung(eight_bit=("attention",))
    built = build_candidate(wanted, graph, CalibrationData(batches, {}), weights=WeightFormat(), folder=tmp_path / "out")
    bits = {node.name: node.attributes.get_int("bits") for node in load_graph(built.path).graph if node.op_type == "MatMulNBits"}
    assert bits == {"product_0": 8, "product_1": 4}


def test_without_calibration_the_rung_asks_for_it() -> None:
    assert rung().needs_calibration


def test_groups_hold_what_memory_allows_in_order() -> None:
    width = int((MOST_BYTES / 4 / 2.5) ** 0.5)  # two fit
    names = [f"value_{number}" for number in range(5)]
    assert list(grouped(dict.fromkeys(names, width))) == [names[:2], names[2:4], names[4:]]
    assert list(grouped({"huge": 10 * width, "small": 1})) == [["huge"], ["small"]]

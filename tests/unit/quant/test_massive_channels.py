"""Channels far larger than the others are computed on their own: no answer changes in float, and little is lost in 8 bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.quant.calibration import ActivationStatistics
from hfaccel.quant.massive_channels import find_massive_channels, split_massive_channels
from hfaccel.quant.moments import second_moments
from hfaccel.quant.weight_only import store_in_blocks
from hfaccel.recipe.schema import Rung
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import new_initializer, save_graph
from hfaccel.runtime.session import GraphSession

CHANNELS, OUTPUTS = 128, 32
MASSIVE = {5: 900.0, 70: -2500.0}


def one_product(weight: np.ndarray) -> onnx_ir.Model:
    model = onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="one"), ir_version=9)
    value = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["batch", "sequence", CHANNELS])
    product = onnx_ir.node("MatMul", [value, new_initializer(model, "mlp.down_proj.weight", weight)], name="down")
    product.outputs[0].name, product.outputs[0].type = "product", value.type
    result = onnx_ir.node("Neg", product.outputs, outputs=[onnx_ir.val("y", onnx_ir.DataType.FLOAT, None)])
    model.graph.extend([product, result])
    model.graph.inputs.append(value)
    model.graph.outputs.extend(result.outputs)
    return model


def some_tokens(seed: int, massive: dict[int, float]) -> np.ndarray:
    """Of which only the first of each text has massive channels."""
    values = np.random.default_rng(seed).normal(size=(2, 9, CHANNELS)).astype(np.float32)
    for channel, value in massive.items():
        values[:, 0, channel] = value
    return values


def statistics_of(values: np.ndarray) -> dict[str, ActivationStatistics]:
    seen = ActivationStatistics.empty(CHANNELS)
    seen.update(values.reshape(-1, CHANNELS), histogram=False)
    return {"x": seen}


def split(values: np.ndarray, weight: np.ndarray, *, ratio: float = 20.0) -> tuple[onnx_ir.Model, tuple[str, ...]]:
    model = one_product(weight)
    names = split_massive_channels(model, find_massive_channels(model, statistics_of(values), ratio, ["down"]))
    drop_unused(model)
    return model, names


def answers(model: onnx_ir.Model, values: np.ndarray, folder: Path) -> np.ndarray:
    folder.mkdir()
    return GraphSession(save_graph(model, folder)).run({"x": values})["y"]


def in_eight_bits(model: onnx_ir.Model) -> onnx_ir.Model:
    store_in_blocks(Rung(name="eight", scheme="weight-only", graph="fused", block_size=64), model, ["down"])
    drop_unused(model)
    return model


@given(st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_exactly_the_massive_channels_are_split_off_and_no_answer_changes(seed: int) -> None:
    import tempfile

    weight = np.random.default_rng(seed).normal(size=(CHANNELS, OUTPUTS)).astype(np.float32)
    values = some_tokens(seed, MASSIVE)
    model, names = split(values, weight)
    [small] = [node for node in model.graph if node.name in names]
    assert small.inputs[1] is not None
    assert small.inputs[1].const_value is not None
    np.testing.assert_array_equal(small.inputs[1].const_value.numpy(), weight[sorted(MASSIVE)])
    with tempfile.TemporaryDirectory() as folder:
        found, wanted = (answers(made, values, Path(folder) / what) for what, made in (("a", model), ("b", one_product(weight))))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_rounding_them_would_do_most_of_the_harm(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).normal(size=(CHANNELS, OUTPUTS)).astype(np.float32)
    values = some_tokens(1, MASSIVE)
    exact = answers(one_product(weight), values, tmp_path / "exact")
    whole = answers(in_eight_bits(one_product(weight)), values, tmp_path / "whole")
    parted = answers(in_eight_bits(split(values, weight)[0]), values, tmp_path / "parted")
    assert np.abs(parted - exact)[:, 0].max() < np.abs(whole - exact)[:, 0].max() / 20


@pytest.mark.parametrize(
    "massive",
    [{}, {3: 15.0}, dict.fromkeys(range(70), 900.0)],
    ids=["none", "somewhat larger", "so many that they are how channels are"],
)
def test_what_does_not_stand_out_stays_whole(massive: dict[int, float]) -> None:
    weight = np.ones((CHANNELS, OUTPUTS), dtype=np.float32)
    model, names = split(some_tokens(2, massive), weight)
    assert names == ()
    assert [node.op_type for node in model.graph] == ["MatMul", "Neg"]


def test_moments_see_them_no_larger_than_others(tmp_path: Path) -> None:
    weight = np.random.default_rng(3).normal(size=(CHANNELS, OUTPUTS)).astype(np.float32)
    values, model = some_tokens(3, MASSIVE), one_product(weight)
    [massive] = find_massive_channels(model, statistics_of(values), 20.0, ["down"]).values()
    feeds = [{"x": values, "attention_mask": np.ones(values.shape[:2], dtype=np.int64)}]
    seen = second_moments(model, ["x"], feeds, workdir=tmp_path, massive={"x": massive})["x"]
    plain = second_moments(model, ["x"], feeds, workdir=tmp_path)["x"]
    ordinary = np.setdiff1d(np.arange(CHANNELS), sorted(MASSIVE))
    np.testing.assert_array_equal(seen[np.ix_(ordinary, ordinary)], plain[np.ix_(ordinary, ordinary)])
    assert np.diag(plain).max() > 1000 * np.median(np.diag(plain))
    assert 0 < seen[sorted(MASSIVE), sorted(MASSIVE)].max() <= massive.limit**2

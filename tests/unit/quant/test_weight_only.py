"""The scheme weight-only: what the kernel computes is near the float product, row by row, and the trials of a search predict it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.artifact.contract import SessionSettings
from hfaccel.errors import RecipeError
from hfaccel.quant.build import BuiltCandidate, build_candidate, prepare_graph, switched_graph
from hfaccel.quant.observed import CalibrationData
from hfaccel.quant.weight_only import BlockwiseWeight, quantize_weight
from hfaccel.recipe.contradictions import contradictions
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import load_graph, new_initializer, save_graph
from hfaccel.runtime.engines import open_graph
from hfaccel.runtime.session import GraphSession

NOTHING = CalibrationData([], {})
EXACT_ANYWHERE = WeightFormat(sums_in_16_bits=True)
"""For the scheme per-token: signed weights saturate where these tests may run."""
SHAPES = st.tuples(st.integers(16, 300), st.integers(64, 90))  # at least 1024 values: smaller weights are left alone
BLOCKS = st.sampled_from((16, 32, 64, 128, 256))
BITS = st.sampled_from((4, 8))
SEEDS = st.integers(0, 2**32 - 1)


def rung(**fields: Any) -> Rung:
    made = Rung(**{"name": "blocks", "scheme": "weight-only", "graph": "optimized", **fields})
    assert contradictions(made) == ()
    return made


def product_graph(weights: Sequence[np.ndarray], folder: Path) -> Path:
    """x [rows, in] @ W0, then tanh(...) @ W for each further weight; MatMuls are named product_0, product_1 ..."""
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["rows", len(weights[0])]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    graph = onnx_ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="products")
    model = onnx_ir.Model(graph, ir_version=10)
    last, known = x, dict[int, onnx_ir.Value]()
    for number, array in enumerate(weights):
        if id(array) not in known:
            known[id(array)] = new_initializer(model, f"weight_{number}", array)
        nodes = [onnx_ir.node("Tanh", [last], name=f"tanh_{number}")] if number else []
        operand = nodes[0].outputs[0] if nodes else last
        nodes.append(onnx_ir.node("MatMul", [operand, known[id(array)]], name=f"product_{number}"))
        for node in nodes:
            node.outputs[0].name = f"{node.name}_value"
        graph.extend(nodes)
        last = nodes[-1].outputs[0]
    last.shape = onnx_ir.Shape(["rows", weights[-1].shape[1]])
    last.type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.outputs.append(last)
    folder.mkdir(parents=True, exist_ok=True)
    return save_graph(model, folder)


def build(made: Rung, graph: Path, folder: Path) -> BuiltCandidate:
    folder.mkdir(parents=True)
    return build_candidate(made, graph, NOTHING, weights=EXACT_ANYWHERE, folder=folder)


def answer(path: Path, **feeds: np.ndarray) -> np.ndarray:
    return next(iter(GraphSession(path).run(feeds).values()))


def compute(made: Rung, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The product x @ weight as the kernel of a rung computes it."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        return answer(build(made, product_graph([weight], folder / "float"), folder / "out").path, x=x)


def operators(path: Path) -> dict[str, str]:
    return {node.name or "": node.op_type for node in load_graph(path).graph}


def error_bound(weight: np.ndarray, blocks: BlockwiseWeight, block_size: int, x: np.ndarray) -> np.ndarray:
    """[rows, out]: rounding moves a weight by at most its block's step, an activation by half the step of its row's block."""
    inputs = len(weight)
    steps = np.repeat(np.abs(blocks.scales), block_size, axis=1)[:, :inputs].T  # [in, out]
    padded = np.zeros((len(x), blocks.scales.shape[1] * block_size))
    padded[:, :inputs] = np.abs(x)
    largest = padded.reshape(len(x), -1, block_size).max(axis=2)
    moved = np.repeat(largest / 127 / 2, block_size, axis=1)[:, :inputs]
    return np.asarray((np.abs(x) @ steps + moved @ (np.abs(weight) + steps)) * 1.001 + 1e-6)


@given(SEEDS, SHAPES, BLOCKS, BITS, st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_error_stays_below_what_the_steps_of_the_blocks_allow(
    seed: int, shape: tuple[int, int], block_size: int, bits: int, symmetric: bool
) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=shape).astype(np.float32)
    x = random.normal(size=(random.integers(1, 6), shape[0])).astype(np.float32)
    x *= random.choice([1, 100], size=x.shape, p=[0.99, 0.01]).astype(np.float32)
    made = rung(block_size=block_size, weight_only_bits=bits, symmetric=symmetric)
    exact = x.astype(np.float64) @ weight
    bound = error_bound(weight, quantize_weight(weight, made), block_size, x)
    assert (np.abs(compute(made, weight, x) - exact) <= bound).all()


@given(SEEDS, SHAPES, BLOCKS)
@settings(max_examples=15, deadline=None)
def test_a_loud_token_does_not_disturb_the_others(seed: int, shape: tuple[int, int], block_size: int) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=shape).astype(np.float32)
    x = random.normal(size=(7, shape[0])).astype(np.float32)
    x[3] *= 10_000
    made = rung(block_size=block_size)
    together = compute(made, weight, x)
    for row in range(len(x)):
        alone = compute(made, weight, x[row : row + 1])[0]
        np.testing.assert_allclose(together[row], alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max())


@given(SEEDS, SHAPES, BLOCKS, BITS, st.sampled_from(("rtn", "k-quant", "no zero points")))
@settings(max_examples=25, deadline=None)
def test_what_is_stored_is_what_the_kernel_reads(
    seed: int, shape: tuple[int, int], block_size: int, bits: int, method: str
) -> None:
    """Rows of the unit matrix are exact in 8 bit, so their product is the weight as the kernel sees it."""
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    fields = {"symmetric": True} if method == "no zero points" else {"symmetric": False, "method": method}
    made = rung(block_size=block_size, weight_only_bits=bits, **fields)
    seen = compute(made, weight, np.eye(shape[0], dtype=np.float32))
    np.testing.assert_allclose(seen, quantize_weight(weight, made).dequantized(shape[0]), atol=1e-5)


@given(SEEDS, SHAPES, BLOCKS, BITS, st.floats(-1, 1))
@settings(max_examples=25, deadline=None)
def test_no_block_is_farther_from_the_weight_with_k_quant(
    seed: int, shape: tuple[int, int], block_size: int, bits: int, shift: float
) -> None:
    """Shifted weights have blocks of one sign, and some of one value, where the search alone goes astray."""
    random = np.random.default_rng(seed)
    weight = (random.normal(size=shape) / 4 + shift).astype(np.float32)
    weight[:, :5] = shift

    def errors(method: str) -> np.ndarray:
        made = rung(block_size=block_size, weight_only_bits=bits, symmetric=False, method=method)
        difference = np.zeros((-(-shape[0] // block_size) * block_size, shape[1]))
        difference[: shape[0]] = quantize_weight(weight, made).dequantized(shape[0]) - weight
        return np.asarray(np.square(difference).reshape(-1, block_size, shape[1]).sum(axis=1))

    searched = errors("k-quant")
    assert np.isfinite(searched).all()
    assert (searched <= errors("rtn") * 1.001 + 1e-9).all()


@pytest.mark.parametrize(
    "fields",
    [{}, {"weight_only_bits": 4, "block_size": 32}, {"symmetric": False, "block_size": 256}, {"scheme": "per-token"}],
    ids=str,
)
@pytest.mark.parametrize("inputs", [96, 200, 256])
def test_trials_of_a_search_predict_the_kernel(inputs: int, fields: Mapping[str, Any], tmp_path: Path) -> None:
    random = np.random.default_rng(inputs)
    weights = [(random.normal(size=shape) / 8).astype(np.float32) for shape in ((inputs, 200), (200, 64), (64, 32))]
    x = random.normal(size=(50, inputs)).astype(np.float32)
    x[:, 7] *= 30
    graph, made = product_graph(weights, tmp_path / "float"), rung(**fields)
    prepared = prepare_graph(made, graph, NOTHING, scratch=tmp_path / "scratch")
    switched = switched_graph(made, prepared, weights=EXACT_ANYWHERE, workdir=tmp_path / "switched")
    exact = answer(graph, x=x)
    np.testing.assert_allclose(next(iter(switched.run({"x": x}).values())), exact, atol=1e-5)
    switched.switch_on(prepared.matmuls)
    predicted = next(iter(switched.run({"x": x}).values()))
    real = answer(build(made, graph, tmp_path / "out").path, x=x)
    # A level that falls on the other side of a half somewhere moves a little of what comes after it.
    assert np.linalg.norm(predicted - real) < 0.1 * np.linalg.norm(real - exact)
    assert np.linalg.norm(real - exact) < 0.3 * np.linalg.norm(exact)


@given(SEEDS, SHAPES, BLOCKS, BITS, st.booleans())
@settings(max_examples=15, deadline=None)
def test_a_trial_of_one_product_is_the_kernel_but_for_the_order_of_summation(
    seed: int, shape: tuple[int, int], block_size: int, bits: int, symmetric: bool
) -> None:
    random = np.random.default_rng(seed)
    weight = random.normal(size=shape).astype(np.float32)
    x = random.normal(size=(5, shape[0])).astype(np.float32)
    x[2] = 0
    made = rung(block_size=block_size, weight_only_bits=bits, symmetric=symmetric)
    with TemporaryDirectory() as name:
        folder = Path(name)
        prepared = prepare_graph(made, product_graph([weight], folder / "float"), NOTHING, scratch=folder / "scratch")
        switched = switched_graph(made, prepared, weights=WeightFormat(), workdir=folder / "switched")
        switched.switch_on(("product_0",))
        predicted = next(iter(switched.run({"x": x}).values()))
    real = compute(made, weight, x)
    # A value within rounding of a half may become either level: at most a few of the many products of an answer.
    np.testing.assert_allclose(predicted, real, atol=2e-3 * np.abs(real).max())
    assert np.median(np.abs(predicted - real)) < 1e-5 * np.abs(real).max()


def test_names_stay_and_what_was_named_stays_in_float(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    shared = random.normal(size=(64, 64)).astype(np.float32)
    weights = [random.normal(size=(100, 64)).astype(np.float32), shared, shared, random.normal(size=(64, 8)).astype(np.float32)]
    graph = product_graph(weights, tmp_path / "float")
    built = build(rung(float_matmuls=("product_0",)), graph, tmp_path / "out")
    assert built.quantized == ("product_1", "product_2")  # the weight of product_3 is small
    assert built.kept_float == (("product_0", 0.0),)
    expected = {"product_0": "MatMul", "product_1": "MatMulNBits", "product_2": "MatMulNBits", "product_3": "MatMul"}
    assert {name: operator for name, operator in operators(built.path).items() if name.startswith("product")} == expected
    stored = {name: value.const_value for name, value in load_graph(built.path).graph.initializers.items()}
    assert set(stored) == {"weight_0", "weight_1_blocks", "weight_1_block_scales", "weight_3"}  # the shared one is there once
    assert built.path.stat().st_size < 50_000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx"]
    again = build(rung(float_matmuls=("product_0",)), graph, tmp_path / "again")
    assert again.path.read_bytes() == built.path.read_bytes()


def test_a_matmul_that_is_not_there_is_refused(tmp_path: Path) -> None:
    graph = product_graph([np.ones((64, 64), dtype=np.float32)], tmp_path / "float")
    with pytest.raises(RecipeError) as caught:
        build(rung(float_matmuls=("product_9",)), graph, tmp_path / "out")
    assert str(caught.value).startswith("quantize.ladder, blocks: float_matmuls: the graph has no MatMul 'product_9' (the recipe")


def test_the_weights_of_a_large_graph_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfaccel.quant.weight_only.EXTERNAL_DATA_FROM_BYTES", 1000)
    weight = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    built = build(rung(), product_graph([weight], tmp_path / "float"), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.onnx", "model.onnx.data"]
    x = np.eye(256, dtype=np.float32)
    np.testing.assert_allclose(answer(built.path, x=x), weight, atol=0.05)


def lookup_graph(table: np.ndarray, folder: Path, *, also_read: bool) -> Path:
    """Rows of a table by ids [batch, sequence]; if ``also_read``, times the table transposed, as a tied head has it."""
    ids = onnx_ir.Value(name="ids", shape=onnx_ir.Shape(["batch", "sequence"]), type=onnx_ir.TensorType(onnx_ir.DataType.INT64))
    graph = onnx_ir.Graph([ids], [], nodes=[], opset_imports={"": 20}, name="lookup")
    model = onnx_ir.Model(graph, ir_version=10)
    rows = new_initializer(model, "table", table)
    nodes = [onnx_ir.node("Gather", [rows, ids], name="lookup")]
    if also_read:
        nodes.append(onnx_ir.node("Transpose", [rows], name="transposed"))
        nodes.append(onnx_ir.node("MatMul", [nodes[0].outputs[0], nodes[1].outputs[0]], name="head"))
    for node in nodes:
        node.outputs[0].name = f"{node.name}_value"
    graph.extend(nodes)
    last = nodes[-1].outputs[0]
    last.shape, last.type = onnx_ir.Shape(["batch", "sequence", None]), onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.outputs.append(last)
    folder.mkdir()
    return save_graph(model, folder)


@pytest.mark.parametrize("channels", [64, 96, 256])
@pytest.mark.parametrize("fields", [{}, {"symmetric": False}, {"weight_only_bits": 4, "symmetric": False, "method": "k-quant"}])
def test_tables_are_looked_up_in_8_bit(channels: int, fields: Mapping[str, Any], tmp_path: Path) -> None:
    table = np.random.default_rng(channels).normal(size=(300, channels)).astype(np.float32)
    table[7] *= 1000  # a row of its own scales
    graph = lookup_graph(table, tmp_path / "float", also_read=False)
    built = build(rung(quantize_embeddings=True, **fields), graph, tmp_path / "out")
    assert operators(built.path) == {"lookup": "GatherBlockQuantized"}
    ids = np.arange(300).reshape(3, 100)
    found = answer(built.path, ids=ids)
    steps = np.abs(table).max(axis=1, keepdims=True) / 100
    assert (np.abs(found.reshape(300, channels) - table) <= steps).all()
    assert built.path.stat().st_size < 0.35 * table.nbytes + 1000
    kept = build(rung(**fields), graph, tmp_path / "kept")
    assert operators(kept.path) == {"lookup": "Gather"}


@pytest.mark.parametrize(("channels", "also_read"), [(64, True), (100, False)])
def test_a_table_stays_that_something_else_reads_or_that_has_no_whole_blocks(
    channels: int, also_read: bool, tmp_path: Path
) -> None:
    table = np.random.default_rng(0).normal(size=(50, channels)).astype(np.float32)
    graph = lookup_graph(table, tmp_path / "float", also_read=also_read)
    built = build(rung(quantize_embeddings=True), graph, tmp_path / "out")
    assert operators(built.path)["lookup"] == "Gather"


def test_smoothing_may_come_before(tmp_path: Path) -> None:
    """The scale of one activation moves into the weight, exactly, and then the weight is quantized."""
    from hfaccel.quant.calibration import ActivationStatistics

    random = np.random.default_rng(0)
    weight = random.normal(size=(128, 64)).astype(np.float32)
    x = random.normal(size=(20, 128)).astype(np.float32)
    x[:, 5] *= 100
    graph = product_graph([weight], tmp_path / "float")
    statistics = {"x": ActivationStatistics(np.minimum(x.min(axis=0), 0), np.maximum(x.max(axis=0), 0))}
    (tmp_path / "out").mkdir()
    built = build_candidate(
        rung(smooth=0.5), graph, CalibrationData([], statistics), weights=WeightFormat(), folder=tmp_path / "out"
    )
    assert operators(built.path) == {"x_smoothed": "Mul", "product_0": "MatMulNBits"}
    exact = x @ weight
    assert np.linalg.norm(answer(built.path, x=x) - exact) < 0.02 * np.linalg.norm(exact)


def test_logging_of_the_process_is_left_alone() -> None:
    code = """
import logging, numpy
from hfaccel.quant.weight_only import quantize_weight
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
rung = Rung(name="blocks", scheme="weight-only", graph="optimized", symmetric=False, method="k-quant")
quantize_weight(numpy.ones((64, 64), dtype=numpy.float32), rung)
assert (logging.root.handlers, logging.root.level) == ([], logging.WARNING)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


@pytest.mark.parametrize("bits", [4, 8])
def test_openvino_reads_the_graph(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(200, 96)).astype(np.float32), random.normal(size=(5, 200)).astype(np.float32)
    made = rung(engine="openvino", weight_only_bits=bits)
    built = build(made, product_graph([weight], tmp_path / "float"), tmp_path / "out")
    there = next(iter(open_graph(built.path, SessionSettings(engine="openvino")).run({"x": x}).values()))
    here = answer(built.path, x=x)
    assert np.linalg.norm(there - here) < 0.03 * np.linalg.norm(here)
    table = random.normal(size=(300, 96)).astype(np.float32)
    lookup = build(
        rung(engine="openvino", quantize_embeddings=True),
        lookup_graph(table, tmp_path / "lookup", also_read=False),
        tmp_path / "table",
    )
    found = next(iter(open_graph(lookup.path, SessionSettings(engine="openvino")).run({"ids": np.arange(300)[None]}).values()))
    np.testing.assert_allclose(found[0], table, atol=0.05)

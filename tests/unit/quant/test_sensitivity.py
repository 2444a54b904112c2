"""Ranking MatMuls by sensitivity, on a real graph of sixty of them in which any one can be made fragile through its range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.quant.calibration import Feeds
from hfaccel.quant.sensitivity import (
    Sums,
    blocks_of,
    blocks_to_open,
    divergence,
    rank_by_sensitivity,
    squared_error,
)
from hfaccel.quant.switches import EightBitTrips, SwitchedGraph
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import new_initializer

LAYERS, PER_LAYER, HIDDEN = 10, 6, 16
NAMES = tuple(f"layer_{layer}_matmul_{number}" for layer in range(LAYERS) for number in range(PER_LAYER))
LAYER_OF = {name: index // PER_LAYER for index, name in enumerate(NAMES)}
ORDINARY = (-6.0, 6.0)


def residual_graph() -> onnx_ir.Model:
    """Sixty steps of h + tanh(h W) / 4 over h = one-hot(ids) E, each MatMul with an activation of its own."""
    random = np.random.default_rng(0)
    ids, mask = (
        onnx_ir.Value(name=name, shape=onnx_ir.Shape(["batch", "sequence"]), type=onnx_ir.TensorType(onnx_ir.DataType.INT64))
        for name in ("input_ids", "attention_mask")
    )
    graph = onnx_ir.Graph([ids, mask], [], nodes=[], opset_imports={"": 20}, name="residual")
    model = onnx_ir.Model(graph, ir_version=10)
    table = new_initializer(model, "table", random.normal(size=(50, HIDDEN)).astype(np.float32))
    quarter = new_initializer(model, "quarter", np.array(0.25, dtype=np.float32))

    def add(operator: str, inputs: list[onnx_ir.Value], name: str) -> onnx_ir.Value:
        node = onnx_ir.node(operator, inputs, name=name)
        node.outputs[0].name = f"{name}_value"
        graph.append(node)
        return node.outputs[0]

    hidden = add("Gather", [table, ids], "embedding")
    for name in NAMES:
        weight = new_initializer(model, f"{name}_weight", random.normal(size=(HIDDEN, HIDDEN)).astype(np.float32) / 4)
        moved = add("Tanh", [add("MatMul", [hidden, weight], name)], f"{name}_tanh")
        hidden = add("Add", [hidden, add("Mul", [moved, quarter], f"{name}_part")], f"{name}_sum")
    hidden.shape, hidden.type = onnx_ir.Shape(["batch", "sequence", HIDDEN]), onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph.outputs.append(hidden)
    return model


def activation_of(name: str) -> str:
    index = NAMES.index(name)
    return f"{NAMES[index - 1]}_sum_value" if index else "embedding_value"


class CountingGraph(SwitchedGraph):
    """Notes what was quantized in each run, and can be made to break down after so many."""

    runs: list[tuple[int, frozenset[str]]]
    lifetime: int
    switched: frozenset[str]

    def switch_on(self, names: Sequence[str]) -> None:
        self.switched = frozenset(names)
        super().switch_on(names)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if len(self.runs) == self.lifetime:
            raise InterruptedError("killed")
        self.runs.append((int(feeds["input_ids"][0, 0]), self.switched))
        return super().run(feeds)


@pytest.fixture(scope="module")
def model() -> onnx_ir.Model:
    return residual_graph()


def graph_with(
    model: onnx_ir.Model, folder: Path, fragile: Mapping[str, float], names: Sequence[str] = NAMES, lifetime: int = 10_000
) -> CountingGraph:
    """The graph in 8 bit with ordinary ranges, and for the fragile MatMuls ranges so many times too wide."""
    ranges = {activation_of(name): tuple(bound * fragile.get(name, 1.0) for bound in ORDINARY) for name in names}
    graph = CountingGraph(model, names, EightBitTrips(ranges, WeightFormat(), per_channel=True), workdir=folder)
    graph.runs, graph.lifetime = [], lifetime
    return graph


def texts(seed: int, length: int = 7) -> Feeds:
    """Two texts, the second shorter; the first id is the seed, so that runs can be told apart."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 50, (2, length))
    ids[0, 0] = seed
    mask = np.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Notes(dict[tuple[int, frozenset[str]], Sums]):
    """A ledger in memory, which refuses to write anything down twice."""

    def known_error(self, batch: int, quantized: Sequence[str]) -> Sums | None:
        return self.get((batch, frozenset(quantized)))

    def add_error(self, batch: int, quantized: Sequence[str], sums: Sums) -> None:
        assert (batch, frozenset(quantized)) not in self
        self[batch, frozenset(quantized)] = sums


@settings(max_examples=12, deadline=None)
@given(fragile=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([30.0, 200.0]), min_size=1, max_size=4))
def test_planted_fragile_matmuls_come_first_wherever_they_are(
    model: onnx_ir.Model, tmp_path_factory: pytest.TempPathFactory, fragile: dict[str, float]
) -> None:
    graph = graph_with(model, tmp_path_factory.mktemp("graph"), fragile)
    ranking = rank_by_sensitivity(graph, [texts(1)], blocks=blocks_of(NAMES, LAYER_OF))
    assert {name for name, _ in ranking[: len(fragile)]} == set(fragile)
    assert sorted(name for name, _ in ranking) == sorted(NAMES)
    errors = [error for _, error in ranking]
    assert errors == sorted(errors, reverse=True)
    assert errors[len(fragile) - 1] > 10 * errors[len(fragile)]  # measured alone, not with its block


@pytest.mark.parametrize(
    "fragile",
    [(13, 16), (3, 57), (0, 59), (30, 31, 44)],
    ids=["two in one block", "one each in two blocks", "the first and the last", "two and one"],
)
@pytest.mark.parametrize("known", [True, False], ids=["layers known", "layers unknown"])
def test_only_the_blocks_with_fragile_matmuls_are_looked_into(
    model: onnx_ir.Model, tmp_path: Path, fragile: tuple[int, ...], known: bool
) -> None:
    planted = {NAMES[index]: 300.0 for index in fragile}
    graph = graph_with(model, tmp_path, planted)
    blocks = blocks_of(NAMES, LAYER_OF if known else {})
    ranking = rank_by_sensitivity(graph, [texts(1)], blocks=blocks)
    assert {name for name, _ in ranking[: len(planted)]} == set(planted)
    opened = [block for block in blocks if planted.keys() & set(block)]
    assert len(graph.runs) == 2 + len(blocks) + sum(len(block) for block in opened)  # 2: in float, once a level
    each = graph_with(model, tmp_path / "each", planted)
    exact = rank_by_sensitivity(each, [texts(1)], blocks=[(name,) for name in NAMES])
    assert len(each.runs) == 1 + len(NAMES)
    assert ranking[: len(planted)] == exact[: len(planted)]  # the same order and the same errors as one by one


def test_a_fragile_matmul_is_found_beside_one_that_is_far_worse(model: onnx_ir.Model, tmp_path: Path) -> None:
    graph = graph_with(model, tmp_path, {NAMES[8]: 2000.0, NAMES[40]: 20.0})
    ranking = rank_by_sensitivity(graph, [texts(1)], blocks=blocks_of(NAMES, LAYER_OF))
    assert [name for name, _ in ranking[:2]] == [NAMES[8], NAMES[40]]
    assert ranking[0][1] > 20 * ranking[1][1]  # all other blocks together hold less than the harmless share
    assert ranking[1][1] > 20 * ranking[2][1]


def test_harmless_matmuls_share_the_error_of_their_block(model: onnx_ir.Model, tmp_path: Path) -> None:
    notes = Notes()
    graph = graph_with(model, tmp_path, {NAMES[20]: 300.0})
    ranking = dict(rank_by_sensitivity(graph, [texts(1)], blocks=blocks_of(NAMES, LAYER_OF), ledger=notes))
    last = NAMES[-PER_LAYER:]
    moved, relative_to = notes[0, frozenset(last)]
    for name in last:
        assert ranking[name] == pytest.approx(moved / relative_to / PER_LAYER)
        assert (0, frozenset({name})) not in notes


def test_a_small_graph_is_ranked_one_by_one(model: onnx_ir.Model, tmp_path: Path) -> None:
    graph = graph_with(model, tmp_path, {NAMES[20]: 300.0}, names=NAMES[:36])
    ranking = rank_by_sensitivity(graph, [texts(1)])
    assert ranking[0][0] == NAMES[20]
    assert [names for _, names in graph.runs] == [frozenset(), *(frozenset({name}) for name in NAMES[:36])]


def test_batches_are_taken_one_at_a_time_and_count_together(model: onnx_ir.Model, tmp_path: Path) -> None:
    class Stream:
        """Lets go of a batch when the next one is asked for."""

        def __iter__(self):
            yield texts(1)
            yield texts(2, length=11)

    names = NAMES[:8]
    notes = Notes()
    graph = graph_with(model, tmp_path, {}, names=names)
    ranking = dict(rank_by_sensitivity(graph, Stream(), ledger=notes))
    assert [seed for seed, _ in graph.runs] == [1] * 9 + [2] * 9  # one batch is done with before the next
    for name in names:
        first, second = (notes[batch, frozenset({name})] for batch in (0, 1))
        assert ranking[name] == pytest.approx((first[0] + second[0]) / (first[1] + second[1]))
    assert graph.switched == frozenset()


@pytest.mark.parametrize("runs", [0, 1, 4, 11, 13, 20, 10_000])
def test_a_ranking_that_runs_out_of_time_ranks_by_what_it_has(fragile_in_two_blocks: CountingGraph, runs: int) -> None:
    graph, notes = fragile_in_two_blocks, Notes()
    graph.runs, graph.lifetime = [], 10_000
    blocks = blocks_of(NAMES, LAYER_OF)

    def out_of_time() -> bool:
        return len(graph.runs) >= runs

    ranking = rank_by_sensitivity(graph, [texts(1)], blocks=blocks, ledger=notes, out_of_time=out_of_time)
    assert len(graph.runs) <= runs + 1  # asked before a pair of runs, the reference being one of them
    assert sorted(name for name, _ in ranking) == sorted(NAMES)
    errors = [error for _, error in ranking]
    assert errors == sorted(errors, reverse=True)
    measured = {name: error for name, error in ranking if (0, frozenset({name})) in notes}
    for name, error in measured.items():
        moved, relative_to = notes[0, frozenset({name})]
        assert error == moved / relative_to
    if runs == 11:  # every block, and none of the MatMuls inside: both bad blocks come first, their members alike
        assert {name for name, _ in ranking[: 2 * PER_LAYER]} == {*NAMES[6:12], *NAMES[48:54]}
    if runs == 10_000:
        assert ranking == rank_by_sensitivity(graph, [texts(1)], blocks=blocks)


def test_an_iterator_is_refused_because_it_would_be_spent(model: onnx_ir.Model, tmp_path: Path) -> None:
    graph = graph_with(model, tmp_path, {}, names=NAMES[:2])
    with pytest.raises(TypeError, match="gone through twice: give a list or another iterable, not an iterator"):
        rank_by_sensitivity(graph, (texts(seed) for seed in range(2)))


def test_what_stands_at_padding_does_not_count(model: onnx_ir.Model, tmp_path: Path) -> None:
    feeds = texts(1)
    other = {**feeds, "input_ids": np.where(feeds["attention_mask"] == 1, feeds["input_ids"], 49)}
    assert (other["input_ids"] != feeds["input_ids"]).any()
    graph = graph_with(model, tmp_path, {}, names=NAMES[:8])
    assert rank_by_sensitivity(graph, [feeds]) == rank_by_sensitivity(graph, [other])


@pytest.fixture(scope="module")
def fragile_in_two_blocks(model: onnx_ir.Model, tmp_path_factory: pytest.TempPathFactory) -> CountingGraph:
    return graph_with(model, tmp_path_factory.mktemp("graph"), {NAMES[8]: 300.0, NAMES[50]: 300.0})


@pytest.mark.parametrize("lifetime", [0, 1, 5, 11, 12, 17, 22, 30, 33, 40, 44])
def test_a_killed_ranking_makes_only_the_runs_that_miss(fragile_in_two_blocks: CountingGraph, lifetime: int) -> None:
    graph, notes = fragile_in_two_blocks, Notes()

    def rank(ledger: Notes | None, lifetime: int = 1000) -> tuple[list[tuple[str, float]], list[tuple[int, frozenset[str]]]]:
        graph.runs, graph.lifetime = [], lifetime
        return rank_by_sensitivity(graph, [texts(1), texts(2)], blocks=blocks_of(NAMES, LAYER_OF), ledger=ledger), graph.runs

    expected, whole = rank(None)
    assert len(whole) > lifetime
    with pytest.raises(InterruptedError):
        rank(notes, lifetime)
    before = graph.runs
    ranking, after = rank(notes)
    assert ranking == expected
    measured = [run for run in before + after if run[1]]
    assert sorted(measured, key=repr) == sorted((run for run in whole if run[1]), key=repr)  # each exactly once
    assert rank(notes, lifetime=0) == (expected, [])  # nothing misses: nothing runs, not even in float


@given(st.integers(49, 400), st.integers(1, 40))
def test_blocks_hold_every_matmul_once_and_none_is_out_of_proportion(count: int, per_layer: int) -> None:
    names = [f"matmul_{number}" for number in range(count)]
    layers = {name: number // per_layer for number, name in enumerate(names) if number % 5 or number > count // 2}
    blocks = blocks_of(names, layers)
    assert sorted(name for block in blocks for name in block) == sorted(names)
    assert max(map(len, blocks)) <= 2 * round(count**0.5)
    for block in blocks:
        assert len({layers.get(name) for name in block}) == 1
        assert list(block) == sorted(block, key=names.index)


def test_blocks_are_layers_and_beside_them_runs_of_about_the_square_root() -> None:
    encoder = {**LAYER_OF, "pooler": None}
    assert blocks_of([*NAMES, "pooler"], encoder) == [
        *(NAMES[layer * PER_LAYER : (layer + 1) * PER_LAYER] for layer in range(LAYERS)),
        ("pooler",),
    ]
    assert [len(block) for block in blocks_of(NAMES)] == [8] * 7 + [4]
    shared = dict.fromkeys(NAMES, 0)  # all layers share their weights, so that all are layer 0
    assert blocks_of(NAMES, shared) == blocks_of(NAMES)
    assert blocks_of(NAMES[:48], LAYER_OF) == [(name,) for name in NAMES[:48]]


@given(st.lists(st.one_of(st.floats(0, 1), st.floats(0, 1e-6), st.just(1e30)), min_size=1, max_size=40))
def test_blocks_left_out_are_harmless(errors: list[float]) -> None:
    opened = blocks_to_open(errors)
    left_out = [error for index, error in enumerate(errors) if index not in opened]
    assert sum(left_out) <= 0.05 * sum(errors) * (1 + 1e-9)
    assert all(error <= 4 * median(errors) for error in left_out)
    assert [errors[index] for index in opened] == sorted((errors[index] for index in opened), reverse=True)
    assert max(left_out, default=0.0) <= min((errors[index] for index in opened), default=1e30)


def test_of_blocks_that_are_alike_most_are_opened_and_of_nothing_none() -> None:
    assert len(blocks_to_open([1.0] * 40)) == 38
    assert blocks_to_open([0.0] * 40) == []
    assert blocks_to_open([0.0, 5.0, 1e-9, 0.0, 0.0]) == [1, 2]


def test_squared_error_is_relative_to_the_reference() -> None:
    moved, relative_to = squared_error(np.array([[3.0, 4.0]], np.float32), np.array([[3.0, 3.0]], np.float32))
    assert (moved, relative_to) == (1.0, 25.0)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(2, 9), st.floats(-100, 100))
def test_divergence_is_that_of_probabilities(seed: int, rows: int, labels: int, shift: float) -> None:
    random = np.random.default_rng(seed)
    reference, actual = random.normal(size=(2, rows, labels)) * 5
    p, q = (np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True) for logits in (reference, actual))
    moved, relative_to = divergence(reference, actual)
    assert moved == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-6, abs=1e-9)
    assert relative_to == rows
    assert divergence(reference, reference + shift)[0] == pytest.approx(0, abs=1e-9)  # squared error would see a difference


def test_ranking_by_divergence_finds_the_fragile_one(model: onnx_ir.Model, tmp_path: Path) -> None:
    graph = graph_with(model, tmp_path, {NAMES[33]: 300.0})
    ranking = rank_by_sensitivity(graph, [texts(1)], distance=divergence)
    assert ranking[0][0] == NAMES[33]
    assert ranking[0][1] > 100 * ranking[1][1]


def test_answers_that_are_not_finite_are_the_worst(model: onnx_ir.Model, tmp_path: Path) -> None:
    def broken(reference: np.ndarray, actual: np.ndarray) -> Sums:
        moved, relative_to = squared_error(reference, actual)
        return (float("nan") if moved > 0.1 else moved), relative_to

    graph = graph_with(model, tmp_path, {NAMES[33]: 2000.0})
    ranking = rank_by_sensitivity(graph, [texts(1)], distance=broken)
    assert ranking[0] == (NAMES[33], 1e30)
    assert ranking[1][1] < 1

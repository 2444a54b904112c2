"""Attention fused into one operator a layer answers as the source does, whatever is padded; other masks are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir
import pytest

from hfaccel.api import SilentProgress
from hfaccel.pipeline import compile_model
from hfaccel.quant.build import build_candidate, prepare_graph, switched_graph
from hfaccel.quant.calibration import observe
from hfaccel.quant.observed import CalibrationData, covers, gather_statistics
from hfaccel.quant.smooth import scale_values, smooth_activations
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.request import CompileRequest
from hfaccel.rewrites.fuse_attention import fuse_attention
from hfaccel.rewrites.graphs import load_graph, operator_counts, save_graph
from hfaccel.rewrites.mask_always import mask_always
from hfaccel.rewrites.plain_attention import spell_out_attention
from hfaccel.rewrites.unpack_projections import unpack_projections
from hfaccel.runtime.openvino_session import OpenVinoSession
from hfaccel.runtime.session import GraphSession

FUSED = ["bert", "distilbert", "xlm-roberta", "albert", "mpnet"]
NOTHING = ("fuse.enabled=false", "quantize.enabled=false")


@pytest.fixture(scope="module")
def optimized(make_architecture: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of the optimized graph of an architecture."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            output = tmp_path_factory.mktemp("optimized") / model_type
            compile_model(
                CompileRequest(model=str(make_architecture(model_type)), output=output, overrides=NOTHING), SilentProgress()
            )
            made[model_type] = output / "model.onnx"
        return made[model_type]

    return make


def fused(graph: Path, folder: Path) -> tuple[Path, int]:
    model = load_graph(graph)
    count = fuse_attention(model)
    folder.mkdir()
    return save_graph(model, folder), count


def feeds_of(graph: GraphSession, mask: np.ndarray) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(mask.size).integers(5, 90, mask.shape)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: given[name] for name in graph.input_names}


MASKS = {
    "one text": np.ones((1, 7), dtype=np.int64),
    "texts of one length": np.ones((3, 9), dtype=np.int64),
    "padding behind": np.tril(np.ones((5, 5), dtype=np.int64)),
    "padding before": np.triu(np.ones((5, 5), dtype=np.int64)),
    "a hole": np.array([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("model_type", FUSED)
def test_answers_stay_what_they_were(model_type: str, optimized: Callable[[str], Path], tmp_path: Path) -> None:
    before = optimized(model_type)
    after, count = fused(before, tmp_path / "fused")
    counts = operator_counts(load_graph(after))
    assert count == counts["If"] == counts["MultiHeadAttention"] / 2 > 0
    assert "Softmax" not in counts
    old, new = GraphSession(before), GraphSession(after)
    for what, mask in MASKS.items():
        wanted, found = (graph.run(feeds_of(graph, mask)) for graph in (old, new))
        for name, values in wanted.items():
            there = mask == 1 if values.ndim == 3 and values.shape[:2] == mask.shape else np.ones(len(values), dtype=bool)
            np.testing.assert_allclose(found[name][there], values[there], atol=1e-5, err_msg=f"{what}: {name}")


@pytest.mark.parametrize("model_type", FUSED)
def test_an_engine_that_cannot_choose_reads_the_mask_always(
    model_type: str, optimized: Callable[[str], Path], tmp_path: Path
) -> None:
    graph, count = fused(optimized(model_type), tmp_path / "fused")
    model = load_graph(graph)
    assert mask_always(model) == count
    (tmp_path / "masked").mkdir()
    masked = save_graph(model, tmp_path / "masked")
    counts = operator_counts(load_graph(masked))
    assert counts["MultiHeadAttention"] == count
    assert not {"If", "ReduceMin"} & set(counts)
    old, new = GraphSession(graph), GraphSession(masked)
    for what, mask in MASKS.items():
        wanted, found = (next(iter(session.run(feeds_of(session, mask)).values())) for session in (old, new))
        there = mask == 1 if wanted.ndim == 3 and wanted.shape[:2] == mask.shape else np.ones(len(wanted), dtype=bool)
        np.testing.assert_allclose(found[there], wanted[there], atol=1e-5, err_msg=what)
    assert mask_always(model) == 0


def same_answers(first: Path, second: Path, *, within: float) -> None:
    old, new = GraphSession(first), GraphSession(second)
    for what, mask in MASKS.items():
        wanted, found = (next(iter(session.run(feeds_of(session, mask)).values())) for session in (old, new))
        there = mask == 1 if wanted.ndim == 3 and wanted.shape[:2] == mask.shape else np.ones(len(wanted), dtype=bool)
        difference = np.linalg.norm(found[there] - wanted[there])
        assert difference <= within * np.linalg.norm(wanted[there]), what


def masked(graph: Path, folder: Path, *rewrites: Callable[[onnx_ir.Model], int]) -> tuple[Path, list[int]]:
    """The graph, whose attention always reads its mask, after rewrites that each say how many changes they made."""
    model = load_graph(graph)
    mask_always(model)
    changes = [rewrite(model) for rewrite in rewrites]
    folder.mkdir()
    return save_graph(model, folder), changes


@pytest.mark.parametrize("model_type", FUSED)
def test_attention_can_be_written_in_standard_operators(
    model_type: str, optimized: Callable[[str], Path], tmp_path: Path
) -> None:
    graph, count = fused(optimized(model_type), tmp_path / "fused")
    plain, changes = masked(graph, tmp_path / "plain", spell_out_attention, spell_out_attention)
    assert changes == [count, 0]
    assert {node.domain for node in load_graph(plain).graph} == {""}
    assert operator_counts(load_graph(plain))["Softmax"] == count
    same_answers(graph, plain, within=1e-5)


@pytest.mark.parametrize("model_type", FUSED)
def test_projections_can_be_unpacked_again(model_type: str, optimized: Callable[[str], Path], tmp_path: Path) -> None:
    graph, _ = fused(optimized(model_type), tmp_path / "fused")
    apart, changes = masked(graph, tmp_path / "apart", unpack_projections, unpack_projections)
    packed = sum((node.name or "").endswith("packed_split") for node in load_graph(graph).graph)
    assert changes == [packed, 0]
    before, after = (operator_counts(load_graph(path)) for path in (graph, apart))
    assert after.get("Split", 0) == before["Split"] - packed  # the head of question answering cuts its two logits apart
    assert after["MatMul"] == before["MatMul"] + 2 * packed > before["MatMul"]
    same_answers(graph, apart, within=1e-5)


def test_a_part_that_others_read_whole_stays_packed(optimized: Callable[[str], Path], tmp_path: Path) -> None:
    graph, _ = fused(optimized("bert"), tmp_path / "fused")
    model = load_graph(graph)
    splits = [node for node in model.graph if node.op_type == "Split"]
    whole = splits[0].inputs[0]
    assert whole is not None
    model.graph.insert_after(splits[0], onnx_ir.node("Neg", [whole], name="other"))
    assert unpack_projections(model) == len(splits) - 1


@pytest.mark.parametrize("model_type", FUSED)
def test_scores_of_eight_bits_are_products_of_eight_bits_and_stay_near(
    model_type: str, optimized: Callable[[str], Path], tmp_path: Path
) -> None:
    graph, count = fused(optimized(model_type), tmp_path / "fused")
    batch = feeds_of(GraphSession(graph), MASKS["padding behind"])
    calibration = CalibrationData([batch], gather_statistics(graph, [batch], tmp_path / "statistics"))
    paths = {}
    for scores in (False, True):
        rung = Rung(name="one", scheme="static", graph="fused", engine="openvino", eight_bit_scores=scores)
        folder = tmp_path / f"scores-{scores}"
        folder.mkdir()
        built = build_candidate(rung, graph, calibration, weights=WeightFormat(sums_in_16_bits=True), folder=folder)
        paths[scores] = built.path
        # Of a packed product each part is one here, but it stays one product for whoever returns some to float.
        assert not any(name.endswith("_0") for name in built.quantized)
    model = load_graph(paths[True])
    scores_of = [node for node in model.graph if node.op_type == "MatMul" and (node.name or "").endswith("_products")]
    assert len(scores_of) == count
    for node in scores_of:
        for value in node.inputs:
            back = value.producer().inputs[0].producer().inputs[0].producer()  # type: ignore[union-attr]  # Transpose, Reshape
            assert back is not None
            assert back.op_type == "DequantizeLinear"
    onnx_ir.to_proto(model)
    same_answers(paths[False], paths[True], within=0.03)


def test_the_engine_of_scores_of_eight_bits_reads_them_as_they_are_written(
    optimized: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    graph, _ = fused(optimized("bert"), tmp_path / "fused")
    batch = feeds_of(GraphSession(graph), MASKS["padding behind"])
    calibration = CalibrationData([batch], gather_statistics(graph, [batch], tmp_path / "statistics"))
    rung = Rung(name="one", scheme="static", graph="fused", engine="openvino", eight_bit_scores=True)
    (tmp_path / "out").mkdir()
    built = build_candidate(rung, graph, calibration, weights=WeightFormat(sums_in_16_bits=True), folder=tmp_path / "out")
    theirs, ours = OpenVinoSession(built.path, rung.session()), GraphSession(built.path)
    for what, mask in MASKS.items():
        wanted, found = (next(iter(session.run(feeds_of(ours, mask)).values())) for session in (ours, theirs))
        assert np.linalg.norm(found - wanted) <= 0.02 * np.linalg.norm(wanted), what


def test_a_packed_product_in_float_is_unpacked_as_well(optimized: Callable[[str], Path], tmp_path: Path) -> None:
    graph, _ = fused(optimized("bert"), tmp_path / "fused")
    batch = feeds_of(GraphSession(graph), MASKS["padding behind"])
    calibration = CalibrationData([batch], gather_statistics(graph, [batch], tmp_path / "statistics"))
    first = next(node.inputs[0].producer().name for node in load_graph(graph).graph if node.op_type == "Split")  # type: ignore[union-attr]
    name = (first or "").removesuffix("_add")
    rung = Rung(name="one", scheme="static", graph="fused", engine="openvino", eight_bit_scores=True, float_matmuls=(name,))
    (tmp_path / "out").mkdir()
    built = build_candidate(rung, graph, calibration, weights=WeightFormat(), folder=tmp_path / "out")
    model = load_graph(built.path)
    kept = [node for node in model.graph if node.op_type == "MatMul" and (node.name or "").startswith(f"{name}_")]
    assert len(kept) == 3
    assert all(node.inputs[1] is not None and node.inputs[1].const_value is not None for node in kept)
    assert "Split" not in operator_counts(model)


@pytest.mark.parametrize("model_type", ["modernbert", "deberta-v2"])
def test_attention_of_another_kind_is_left_alone(model_type: str, optimized: Callable[[str], Path], tmp_path: Path) -> None:
    before = optimized(model_type)
    after, count = fused(before, tmp_path / "fused")
    assert count == 0
    assert operator_counts(load_graph(after)) == operator_counts(load_graph(before))


def biases_of(model: onnx_ir.Model) -> list[tuple[onnx_ir.Node, onnx_ir.Value]]:
    """Of MPNet the addition of each layer that adds the bias of positions to the scores, and the bias."""
    found = []
    for node in model.graph:
        sides = [value for value in node.inputs if value is not None] if node.op_type == "Add" else []
        producers = [value.producer() for value in sides]
        if any(producer is not None and producer.op_type == "Expand" for producer in producers):
            place = next(
                index for index, producer in enumerate(producers) if producer is not None and producer.op_type == "Expand"
            )
            found.append((node, sides[place]))
    return found


def test_a_bias_of_positions_is_one_for_all_texts(optimized: Callable[[str], Path], tmp_path: Path) -> None:
    graph, count = fused(optimized("mpnet"), tmp_path / "fused")
    model = load_graph(graph)
    attentions = [node for node in model.graph.all_nodes() if node.op_type == "MultiHeadAttention"]
    biases = {node.inputs[-1] for node in attentions}
    assert len(attentions) == 2 * count
    assert all(len(node.inputs) == 6 for node in attentions)
    assert [list(bias.shape[:2]) for bias in biases if bias is not None and bias.shape is not None] == [[1, 4]]
    assert all(bias is not None and bias.producer().op_type != "Expand" for bias in biases)  # type: ignore[union-attr]


@pytest.mark.parametrize("change", ["two biases", "a bias of each text", "no mask"])
def test_what_the_operator_cannot_add_is_left_alone(change: str, optimized: Callable[[str], Path]) -> None:
    model = load_graph(optimized("mpnet"))
    found = biases_of(model)
    assert len(found) == 2
    for number, (add, bias) in enumerate(found):
        repeated = bias.producer()
        assert repeated is not None
        if change == "two biases":
            more = onnx_ir.node("Add", [add.outputs[0], bias], name=f"more_{number}")
            reader = add.outputs[0].consumers()[0]
            model.graph.insert_after(add, more)
            reader.replace_input_with(list(reader.inputs).index(add.outputs[0]), more.outputs[0])
        elif change == "a bias of each text":
            own = onnx_ir.node("Neg", [bias], name=f"own_{number}")
            own.outputs[0].shape = onnx_ir.Shape(["batch", *list(bias.shape or [])[1:]])
            model.graph.insert_before(add, own)
            add.replace_input_with(list(add.inputs).index(bias), own.outputs[0])
        else:
            summed = add.outputs[0].consumers()[0]
            reader = summed.outputs[0].consumers()[0]
            reader.replace_input_with(0, add.outputs[0])
    assert fuse_attention(model) == 0


def test_a_mask_of_another_kind_is_left_alone(optimized: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever adds something to the score of a token that counts is no mask of the padding."""
    model = load_graph(optimized("bert"))
    for node in list(model.graph):
        if node.op_type == "Softmax":
            scores = node.inputs[0]
            assert scores is not None
            add = scores.producer()
            assert add is not None
            mask = next(value for value in add.inputs if value is not None and value.producer().op_type != "MatMul")  # type: ignore[union-attr]
            slope = onnx_ir.Value(name=f"{node.name}_slope", const_value=onnx_ir.tensor(np.float32(-0.5)))
            model.graph.register_initializer(slope)
            biased = onnx_ir.node("Add", [mask, slope], name=f"{node.name}_biased")
            biased.outputs[0].name = f"{node.name}_biased_value"
            model.graph.insert_before(add, biased)
            add.replace_input_with(list(add.inputs).index(mask), biased.outputs[0])
    assert fuse_attention(model) == 0


@pytest.mark.parametrize("scheme", ["dynamic", "static", "per-token", "weight-only"])
def test_a_fused_graph_is_quantized_and_searched_as_any_other(
    scheme: str, optimized: Callable[[str], Path], tmp_path: Path
) -> None:
    graph, _ = fused(optimized("bert"), tmp_path / "fused")
    session = GraphSession(graph)
    batch = feeds_of(session, MASKS["padding behind"])
    rung = Rung(name="one", scheme=scheme, graph="fused", smooth=0.5, outlier_neurons=2)  # type: ignore[arg-type]
    calibration = CalibrationData([batch], gather_statistics(graph, [batch], tmp_path / "statistics"))
    weights, folder = WeightFormat(sums_in_16_bits=True), tmp_path / "out"
    folder.mkdir()
    built = build_candidate(rung, graph, calibration, weights=weights, folder=folder)
    onnx_ir.to_proto(load_graph(built.path))
    assert operator_counts(load_graph(built.path))["MultiHeadAttention"] > 0
    prepared = prepare_graph(rung, graph, calibration, scratch=tmp_path / "scratch")
    switched = switched_graph(rung, prepared, weights=weights, workdir=tmp_path / "switched")
    exact = next(iter(session.run(batch).values()))
    np.testing.assert_allclose(next(iter(switched.run(batch).values())), exact, atol=1e-4)
    switched.switch_on(prepared.matmuls)
    predicted, found = (next(iter(graph.run(batch).values())) for graph in (switched, GraphSession(built.path)))
    assert np.linalg.norm(predicted - found) < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("maker", ["If", "MultiHeadAttention"])
@pytest.mark.parametrize("model_type", FUSED)
def test_what_attention_gives_is_smoothed_in_the_weights_of_its_values(
    model_type: str, maker: str, optimized: Callable[[str], Path], tmp_path: Path
) -> None:
    graph, _ = fused(optimized(model_type), tmp_path / "fused")
    batch = feeds_of(GraphSession(graph), MASKS["padding behind"])
    statistics = gather_statistics(graph, [batch], tmp_path / "statistics")
    model = load_graph(graph)
    if maker == "MultiHeadAttention":
        mask_always(model)
    # Not that of a last layer whose head asks for one token: that is picked first.
    attended = [node.outputs[0] for node in model.graph if node.op_type == maker and node.outputs[0].name in statistics]
    assert attended
    plain = [statistics[value.name or ""].range("minmax") for value in attended]
    smooth_activations(model, statistics, 0.5, names=list(statistics))
    assert {reader.op_type for value in attended for reader in value.consumers()} == {"MatMul"}  # and no Mul
    names = [value.name or "" for value in attended]
    observed = observe(model, names, [batch], workdir=tmp_path / "observed")
    for name, before in zip(names, plain, strict=True):
        np.testing.assert_allclose(statistics[name].range("minmax"), observed[name].range("minmax"), rtol=1e-3)
        assert not np.allclose(statistics[name].range("minmax"), before, rtol=1e-2)
    (tmp_path / "smoothed").mkdir()
    smoothed = GraphSession(save_graph(model, tmp_path / "smoothed"))
    for what, mask in MASKS.items():
        wanted, found = (next(iter(session.run(feeds_of(session, mask)).values())) for session in (GraphSession(graph), smoothed))
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=what)


def test_values_that_others_read_are_left_as_they_are(optimized: Callable[[str], Path], tmp_path: Path) -> None:
    graph, _ = fused(optimized("bert"), tmp_path / "fused")
    model = load_graph(graph)
    first = next(node for node in model.graph if node.op_type == "If")
    value = next(node.inputs[2] for node in first.attributes["then_branch"].as_graph())
    assert value is not None
    factor = np.full(value.shape[2] if value.shape is not None else 0, 2.0, dtype=np.float32)
    model.graph.insert_after(first, other := onnx_ir.node("Neg", [value], name="other"))
    assert not scale_values(model, first.outputs[0], factor)
    assert not scale_values(model, other.outputs[0], factor)
    model.graph.remove(other, safe=True)
    assert scale_values(model, first.outputs[0], factor)


def test_what_calibration_found_in_the_fused_graph_serves_the_one_before(
    optimized: Callable[[str], Path], tmp_path: Path
) -> None:
    before = optimized("bert")
    after, _ = fused(before, tmp_path / "fused")
    batch = feeds_of(GraphSession(before), MASKS["padding behind"])
    found = [gather_statistics(graph, [batch], tmp_path / "statistics") for graph in (before, after)]
    assert covers(found[1], before)
    assert not covers(found[0], after)  # queries and keys are seen where attention is fused
    assert {name for name in found[1].keys() - found[0].keys() if "packed_part" not in name} == set()
    for name, statistics in found[0].items():
        np.testing.assert_allclose(found[1][name].range("minmax"), statistics.range("minmax"), atol=1e-4)
    assert not covers(dict(list(found[1].items())[1:]), after)


def test_the_graph_that_ships_is_in_order(make_architecture: Callable[[str], Path], tmp_path: Path) -> None:
    """Also for what the graphs inside of its nodes read."""
    import onnx

    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"word{number} word{number + 1} word3" for number in range(40)) + "\n", encoding="utf-8")
    overrides = (
        "quantize.ladder=[{name: static, scheme: static, graph: fused}]",
        "quantize.precision=int8",
        "accuracy.min_agreement=0.1",
        "accuracy.max_loss=0.9",
        "accuracy.batch_invariance=0.1",
    )
    bert = str(make_architecture("bert"))
    request = CompileRequest(bert, tmp_path / "out", target="cpu-arm-dotprod", data=str(texts), overrides=overrides)
    compile_model(request, SilentProgress())
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    assert operator_counts(load_graph(tmp_path / "out" / "model.onnx"))["MultiHeadAttention"] > 0

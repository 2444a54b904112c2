"""A model with two MatMuls made fragile on purpose: the search returns exactly those to float, and the recipe repeats it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hfaccel
import hfaccel.pipeline
from hfaccel.api import SilentProgress
from hfaccel.quant.switches import SwitchedGraph
from hfaccel.stages.journal import Journal

OFF_TARGET = "cpu-arm-dotprod"
"""Another target than any host of these tests: nothing is timed, so no candidate is dropped for its speed."""
LAYERS = 9
"""Of six MatMuls each: enough to be ranked by layer first."""
FRAGILE_LAYERS = (1, 6)
NOT_FUSED = (
    "quantize.ladder=[{name: dynamic-per-channel, scheme: dynamic, graph: optimized}]",
    "optimize.rewrites=[drop_empty_row_guard, merge_transposes, fold_attention_scale]",  # not packed, there are enough to rank by block
    "fuse.enabled=false",
)


def planted_bert(
    folder: Path,
    *,
    layers: int = LAYERS,
    fragile: Sequence[int] = FRAGILE_LAYERS,
    intermediate_size: int = 128,
    loudness: float = 500,
    loud: slice = slice(5, 6),
) -> None:
    """BERT; in fragile layers some feed-forward neurons are so much louder and their readers as much deafer: the same function."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=intermediate_size,
        max_position_embeddings=64,
        hidden_act="relu",
    )
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for layer in fragile:
            block = model.encoder.layer[layer]
            block.intermediate.dense.weight[loud] *= loudness
            block.intermediate.dense.bias[loud] = loudness  # for every token
            block.output.dense.weight *= 8  # so that the feed-forward part matters in a random model
            block.output.dense.weight[:, loud] /= loudness
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "model"
    planted_bert(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = (" ".join(f"word{number}" for number in random.integers(0, 90, random.integers(3, 30))) for _ in range(80))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def searched(planted: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> hfaccel.pipeline.CompileResult:
    output = tmp_path_factory.mktemp("searched") / "out"
    return compile_planted(planted, texts, output, overrides=NOT_FUSED)


def compile_planted(planted: Path, texts: Path, output: Path, **options: Any) -> hfaccel.pipeline.CompileResult:
    """Off the target, where nothing is timed."""
    return hfaccel.compile(planted, output=output, task="feature-extraction", data=texts, target=OFF_TARGET, **options)


def test_exactly_the_two_fragile_ones_return_to_float(searched: hfaccel.pipeline.CompileResult) -> None:
    candidates = {item["name"]: item for item in searched.manifest["candidates"]}
    assert candidates["dynamic-per-channel"]["reason"] == "cosine-under-minimum"
    chosen = candidates["dynamic-per-channel-fallback"]
    assert searched.manifest["chosen"] == chosen["name"]
    assert chosen["verdict"]["cosine_lower_bound"] > 0.995
    kept = {name for name, _ in chosen["kept_float"]}
    assert kept == readers_of_fragile_neurons(searched.folder)
    assert chosen["quantized"] == LAYERS * 6 - 2
    in_float = {(item["layer"], item["role"]) for item in chosen["matmuls"] if item["precision"] == "fp32"}
    assert in_float == {(layer, "down") for layer in FRAGILE_LAYERS}
    roles = {item["role"] for item in chosen["matmuls"]}
    assert roles == {"query", "key", "value", "output", "up", "down"}


def readers_of_fragile_neurons(folder: Path) -> set[str]:
    """MatMuls still in float in the shipped graph that read 128 channels: the second products of feed-forward blocks."""
    import onnx

    model = onnx.load(str(folder / "model.onnx"))
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    found = {node.name for node in model.graph.node if node.op_type == "MatMul" and shapes.get(node.input[1]) == [128, 64]}
    assert len(found) == len(FRAGILE_LAYERS)
    return found


def test_the_recipe_repeats_the_model_byte_for_byte_without_a_search(
    searched: hfaccel.pipeline.CompileResult, planted: Path, texts: Path, tmp_path: Path
) -> None:
    again = compile_planted(planted, texts, tmp_path / "again", recipe=searched.folder / "recipe.yaml")
    assert (again.folder / "model.onnx").read_bytes() == (searched.folder / "model.onnx").read_bytes()
    assert [item["name"] for item in again.manifest["candidates"]] == ["dynamic-per-channel-fallback", "float"]


def test_what_blocks_suffice_for_need_not_stay_in_float(
    texts: Path, tmp_path: Path, write_tokenizer: Callable[..., None]
) -> None:
    """Loud neurons, too many to be split off, cost their own block of 128 precision, and not the seven others."""
    model = tmp_path / "model"
    planted_bert(model, layers=2, fragile=(1,), intermediate_size=1024, loudness=30, loud=slice(0, 128))
    write_tokenizer(model)
    smallest_that_holds = (*NOT_FUSED[1:], "accuracy.min_cosine=0.997", "measure.objective=size")
    ladder = "quantize.ladder=[{name: first, scheme: dynamic, graph: optimized}]"
    result = compile_planted(model, texts, tmp_path / "out", overrides=(*smallest_that_holds, ladder))
    candidates = {item["name"]: item for item in result.manifest["candidates"]}
    assert candidates["first"]["reason"] == "cosine-under-minimum"
    fallback, mixed = candidates["first-fallback"], candidates["first-mixed"]
    assert result.manifest["chosen"] == "first-mixed"
    assert (mixed["kept_float"], len(mixed["blockwise"])) == ([], 1)
    assert mixed["blockwise"] == [name for name, _ in fallback["kept_float"]]
    assert 0.997 < mixed["verdict"]["cosine_lower_bound"] < fallback["verdict"]["cosine_lower_bound"]
    assert mixed["size_bytes"] < fallback["size_bytes"]
    assert {item["precision"] for item in mixed["matmuls"]} == {"int8"}
    assert "1 of the int8 ones in blocks" in (result.folder / "report.md").read_text(encoding="utf-8")

    again = compile_planted(model, texts, tmp_path / "again", recipe=result.folder / "recipe.yaml")
    assert (again.folder / "model.onnx").read_bytes() == (result.folder / "model.onnx").read_bytes()


def test_outlier_channels_alone_need_stay_in_float(planted: Path, texts: Path, tmp_path: Path) -> None:
    """The loud neurons and 15 more are computed in float, all else of the two fragile MatMuls is in 8 bit."""
    smallest = (*NOT_FUSED, "measure.objective=size")
    result = compile_planted(planted, texts, tmp_path / "out", overrides=smallest)
    candidates = {item["name"]: item for item in result.manifest["candidates"]}
    fallback, outliers = candidates["dynamic-per-channel-fallback"], candidates["dynamic-per-channel-outliers"]
    assert result.manifest["chosen"] == outliers["name"]
    assert (outliers["kept_float"], outliers["quantized"]) == ([], LAYERS * 6)
    assert outliers["channelwise"] == [name for name, _ in fallback["kept_float"]]
    assert outliers["size_bytes"] < fallback["size_bytes"]
    assert outliers["verdict"]["cosine_lower_bound"] > 0.995
    assert {item["precision"] for item in outliers["matmuls"]} == {"int8"}
    assert "2 of the int8 ones with outlier channels in float" in (result.folder / "report.md").read_text(encoding="utf-8")

    again = compile_planted(planted, texts, tmp_path / "again", recipe=result.folder / "recipe.yaml")
    assert (again.folder / "model.onnx").read_bytes() == (result.folder / "model.onnx").read_bytes()
    assert [item["name"] for item in again.manifest["candidates"]] == [outliers["name"], "float"]


def test_a_recipe_for_another_model_is_refused_by_name(
    searched: hfaccel.pipeline.CompileResult, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    result = hfaccel.compile(tiny_checkpoint, output=tmp_path / "out", target=OFF_TARGET, recipe=searched.folder / "recipe.yaml")
    dropped = next(item for item in result.manifest["candidates"] if item["name"] == "dynamic-per-channel-fallback")
    assert dropped["reason"] == "build-failed"
    assert "float_matmuls: the graph has no MatMul 'node_MatMul_" in dropped["detail"]
    assert "the recipe was made for another model" in dropped["detail"]


def test_a_rung_with_nothing_left_to_quantize_is_not_built(
    searched: hfaccel.pipeline.CompileResult, planted: Path, texts: Path, tmp_path: Path
) -> None:
    everything = [item["name"] for item in searched.manifest["candidates"][0]["matmuls"]]
    ladder = f"quantize.ladder=[{{name: none-left, scheme: dynamic, graph: optimized, float_matmuls: [{', '.join(everything)}]}}]"
    result = compile_planted(planted, texts, tmp_path / "out", overrides=(*NOT_FUSED[1:], ladder))
    dropped = next(item for item in result.manifest["candidates"] if item["name"] == "none-left")
    assert (result.manifest["chosen"], dropped["reason"]) == ("float", "build-failed")
    assert "every MatMul stays in float: nothing is left to quantize" in dropped["detail"]


class Recorder(SilentProgress):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)


class Runs:
    """What the switched graph was run on, and with which MatMuls quantized; it can be made to break down after so many runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[bytes, frozenset[str]]] = []
        self.lifetime = 100_000
        switched: frozenset[str] = frozenset()
        switch_on, run = SwitchedGraph.switch_on, SwitchedGraph.run

        def noted_switch_on(graph: SwitchedGraph, names: Sequence[str]) -> None:
            nonlocal switched
            switched = frozenset(names)
            switch_on(graph, names)

        def noted_run(graph: SwitchedGraph, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            if len(self.seen) == self.lifetime:
                raise InterruptedError("killed")
            self.seen.append((feeds["input_ids"].tobytes(), switched))
            return run(graph, feeds)

        monkeypatch.setattr(SwitchedGraph, "switch_on", noted_switch_on)
        monkeypatch.setattr(SwitchedGraph, "run", noted_run)


def test_a_compile_killed_while_it_ranks_goes_on_where_it_stopped(
    searched: hfaccel.pipeline.CompileResult, planted: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, progress = Runs(monkeypatch), Recorder()

    def again() -> hfaccel.pipeline.CompileResult:
        # another result of the stage than that in the cache
        return compile_planted(
            planted, texts, tmp_path / "out", overrides=(*NOT_FUSED, "accuracy.resamples=500"), progress=progress
        )

    runs.lifetime = 17  # of the 20 runs on two batches by layer
    with pytest.raises(InterruptedError):
        again()
    before, runs.seen, runs.lifetime = runs.seen, [], 100_000
    result = again()
    done = {run for run in before if run[1]}
    assert len(done) == 15
    assert not done & set(runs.seen)
    assert f"ranking the {LAYERS * 6} MatMuls of dynamic-per-channel by sensitivity, in {LAYERS} blocks first" in progress.steps
    alone = {next(iter(names)) for _, names in runs.seen if len(names) == 1}
    assert len(alone) == 6 * len(FRAGILE_LAYERS)
    assert (result.folder / "model.onnx").read_bytes() == (searched.folder / "model.onnx").read_bytes()


def test_a_journal_knows_again_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "journals" / "key.jsonl"
    journal = Journal(path, "static")
    journal.add_trial(frozenset({"b", "a"}), True)
    journal.add_trial(frozenset(), False)
    journal.add_error(1, ("b", "a"), (0.1, 1 / 3))
    Journal(path, "smooth").add_trial(frozenset(), True)
    again = Journal(path, "static")
    assert (again.known_trial(frozenset({"a", "b"})), again.known_trial(frozenset()), again.known_trial(frozenset("c"))) == (
        True,
        False,
        None,
    )
    assert again.trials == 2
    assert again.known_error(1, ["a", "b"]) == (0.1, 1 / 3)  # to the last bit
    assert again.known_error(0, ["a", "b"]) is None
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0]) == {
        "rung": "static",
        "kind": "trial",
        "float": ["a", "b"],
        "holds": True,
    }


def test_a_line_that_a_kill_cut_costs_no_other_finding(tmp_path: Path) -> None:
    path = tmp_path / "key.jsonl"
    Journal(path, "static").add_error(0, ("a",), (1.0, 2.0))
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"rung": "static", "ki')
    second = Journal(path, "static")
    second.add_trial(frozenset(), False)
    second.add_trial(frozenset("a"), True)
    third = Journal(path, "static")
    assert third.known_error(0, ("a",)) == (1.0, 2.0)
    assert (third.known_trial(frozenset()), third.known_trial(frozenset("a"))) == (False, True)


def test_without_a_file_a_journal_remembers_for_itself() -> None:
    journal = Journal(None, "static")
    journal.add_error(0, ("a",), (1.0, 2.0))
    assert journal.known_error(0, ("a",)) == (1.0, 2.0)

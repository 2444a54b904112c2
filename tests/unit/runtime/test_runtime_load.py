from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from hfaccel.artifact.contract import Contract, SessionSettings, Task, TensorSpec, TextSettings
from hfaccel.cli.run import run
from hfaccel.errors import DataError, IntegrityError, SettingsError, UsageError
from hfaccel.runtime.load import load
from hfaccel.runtime.session import GraphSession


def write_graph(path: Path, output: str, width: int) -> None:
    """input_ids [batch, sequence] -> mean of random token vectors [batch, width]."""
    table = np.random.default_rng(3).normal(size=(300, width)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("ReduceMean", ["tokens", "axes"], [output], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))


def write_folder(folder: Path, tokenizer_file: Path, settings: TextSettings, task: Task, labels: tuple[str, ...]) -> Path:
    folder.mkdir(exist_ok=True)
    output, width = ("sentence_embedding", 8) if task == "sentence-similarity" else ("logits", len(labels))
    write_graph(folder / "model.onnx", output, width)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    contract = Contract(
        task,
        (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        (TensorSpec(output, "float32", ("batch", width)),),
        settings,
        labels,
    )
    session = asdict(SessionSettings(1, False, ("SkipLayerNormFusion",)))
    manifest = {"format_revision": 1, "contract": contract.to_json(), "session": session, "graph": "model.onnx"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def classifier(tmp_path: Path, tokenizer_file: Path, text_settings: TextSettings) -> Path:
    return write_folder(tmp_path / "out", tokenizer_file, text_settings, "text-classification", ("bad", "good"))


@pytest.fixture
def embedder(tmp_path: Path, tokenizer_file: Path, text_settings: TextSettings) -> Path:
    return write_folder(tmp_path / "out", tokenizer_file, text_settings, "sentence-similarity", ())


@pytest.fixture
def ranker(tmp_path: Path, tokenizer_file: Path, text_settings: TextSettings) -> Path:
    return write_folder(tmp_path / "out", tokenizer_file, text_settings, "text-ranking", ("score",))


def test_a_folder_answers(classifier: Path) -> None:
    answers = load(classifier)(["the dog", "a fox jumps"], top_k=None)
    assert [{answer["label"] for answer in item} for item in answers] == [{"bad", "good"}] * 2
    assert sum(answer["score"] for answer in answers[0]) == pytest.approx(1, abs=1e-5)


def test_session_drops_what_the_graph_does_not_read(classifier: Path) -> None:
    session = GraphSession(classifier / "model.onnx")
    assert (session.input_names, session.output_names) == (("input_ids",), ("logits",))
    ids = np.array([[1, 2]], np.int64)
    assert session.run({"input_ids": ids, "attention_mask": ids})["logits"].shape == (1, 2)
    with pytest.raises(IntegrityError, match="reads inputs that the run time does not make: input_ids"):
        session.run({"attention_mask": ids})


def test_errors_of_a_folder_say_what_to_do(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        load(tmp_path / "nowhere")
    assert str(caught.value) == f"{tmp_path / 'nowhere'}: there is no such folder (make one with: hfaccel compile MODEL -o OUT)"
    with pytest.raises(
        IntegrityError, match=r"no manifest\.json here: this is not a compiled artifact \(make one with: hfaccel compile"
    ):
        load(tmp_path)
    manifest_path = classifier / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest_path.write_text(json.dumps({**manifest, "graph": "../model.onnx"}))
    with pytest.raises(IntegrityError, match=r"the graph '\.\./model\.onnx' is not a file of the folder"):
        load(classifier)
    manifest_path.write_text(json.dumps({**manifest, "format_revision": 99}))
    with pytest.raises(IntegrityError, match=r"format revision 99, this hfaccel reads up to 1 \(update hfaccel"):
        load(classifier)
    manifest_path.write_text(json.dumps({"graph": "model.onnx"}))
    with pytest.raises(IntegrityError, match="the manifest has no format_revision"):
        load(classifier)
    manifest_path.write_text(json.dumps({"format_revision": 1, "graph": "model.onnx"}))
    with pytest.raises(IntegrityError, match="the manifest does not describe a model that this version can run: 'contract'"):
        load(classifier)
    manifest_path.write_text("{")
    with pytest.raises(IntegrityError, match="the manifest cannot be read"):
        load(classifier)
    manifest_path.write_text("[]")
    with pytest.raises(IntegrityError, match="the manifest is not a JSON object"):
        load(classifier)


def test_a_damaged_or_missing_graph_is_named(classifier: Path) -> None:
    graph = classifier / "model.onnx"
    graph.write_bytes(b"not a graph")
    with pytest.raises(IntegrityError, match=r"model\.onnx: onnxruntime .* cannot open the graph"):
        load(classifier)
    graph.unlink()
    with pytest.raises(IntegrityError, match="the graph file is missing"):
        load(classifier)


def test_the_run_time_needs_no_torch() -> None:
    code = (
        "import sys, hfaccel.runtime.load\n"
        "print([name for name in ('torch', 'transformers', 'onnx', 'optimum') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def command(*arguments: str, stdin: str | None = None) -> str:
    app = typer.Typer()
    app.command()(run)
    result = CliRunner().invoke(app, list(arguments), input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_run_prints_answers(classifier: Path, tmp_path: Path) -> None:
    text = command(str(classifier), "the dog", "--top-k", "2")
    assert "the dog" in text
    assert "bad" in text
    assert "good" in text
    answers = json.loads(command(str(classifier), "the dog", "a fox", "--json"))
    assert answers == load(classifier)(["the dog", "a fox"])
    file = tmp_path / "texts.txt"
    file.write_text("the dog\n\na fox\n")
    assert json.loads(command(str(classifier), "--file", str(file), "--json")) == answers
    assert json.loads(command(str(classifier), "--file", "-", "--json", stdin="the dog\na fox\n")) == answers
    paired = json.loads(command(str(classifier), "the dog", "--pair", "a fox", "--json"))
    assert paired == load(classifier)([("the dog", "a fox")])


def test_run_shows_vectors_and_cosines(embedder: Path) -> None:
    text = command(str(embedder), "the dog", "a fox")
    assert "8 values [" in text
    assert "1.000" in text
    result = json.loads(command(str(embedder), "the dog", "a fox", "--json"))
    vectors = load(embedder).embed(["the dog", "a fox"])
    np.testing.assert_allclose(result["embeddings"], vectors, rtol=1e-6)
    assert result["cosines"][0][0] == pytest.approx(1)
    assert "cosines" not in json.loads(command(str(embedder), "the dog", "--json"))


def test_run_ranks_documents(ranker: Path) -> None:
    ranked = json.loads(command(str(ranker), "who jumps", "the dog", "a fox", "it rains", "--json"))
    assert ranked == load(ranker).rank("who jumps", ["the dog", "a fox", "it rains"])
    assert "it rains" in command(str(ranker), "who jumps", "the dog", "it rains")
    with pytest.raises(UsageError, match="text-ranking needs a query and at least one document"):
        command(str(ranker), "who jumps")


def test_run_refuses_what_makes_no_sense(classifier: Path, tmp_path: Path) -> None:
    folder = str(classifier)
    with pytest.raises(UsageError, match="there is nothing to run"):
        command(folder)
    with pytest.raises(UsageError, match="--context: --question and --context go together"):
        command(folder, "--question", "who")
    with pytest.raises(UsageError, match="--question: this model was compiled for text-classification"):
        command(folder, "--question", "who", "--context", "it")
    with pytest.raises(UsageError, match="--aggregation: unknown strategy 'best'"):
        command(folder, "a", "--aggregation", "best")
    with pytest.raises(UsageError, match="'aggregation_strategy' has no meaning for text-classification"):
        command(folder, "a", "--aggregation", "max")
    with pytest.raises(DataError, match="the file cannot be read"):
        command(folder, "--file", str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match="-: the file has no text"):
        command(folder, "--file", "-", stdin="\n")


def test_run_refuses_options_it_would_ignore(embedder: Path) -> None:
    with pytest.raises(UsageError, match="--pair: the option has no meaning for sentence-similarity"):
        command(str(embedder), "a", "--pair", "b")


@pytest.mark.parametrize(("stored", "wanted", "opened"), [(0, None, 0), (3, None, 3), (9, None, 4), (9, 6, 6), (0, 2, 2)])
def test_threads_are_those_found_best_as_far_as_there_are_cores_or_those_asked_for(
    stored: int, wanted: int | None, opened: int, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((classifier / "manifest.json").read_text())
    manifest["session"]["intra_op_num_threads"] = stored
    (classifier / "manifest.json").write_text(json.dumps(manifest))
    seen: list[SessionSettings] = []

    def opening(path: Path, settings: SessionSettings) -> GraphSession:
        seen.append(settings)
        return GraphSession(path, replace(settings, intra_op_num_threads=1))

    monkeypatch.setattr("hfaccel.runtime.load.physical_cores", lambda: 4)
    monkeypatch.setattr("hfaccel.runtime.load.open_graph", opening)
    load(classifier, threads=wanted)
    assert [settings.intra_op_num_threads for settings in seen] == [opened]


def test_no_threads_at_all_are_refused(classifier: Path) -> None:
    with pytest.raises(SettingsError, match="0 threads"):
        load(classifier, threads=0)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done with the memory, in order."""
    calls: list[str] = []
    for name in ("give_back_freed_memory", "use_huge_pages"):
        monkeypatch.setattr(f"hfaccel.runtime.load.{name}", partial(calls.append, name))
    return calls


def with_weights(folder: Path, size_bytes: int) -> Path:
    """The folder with a sparse file of weights beside its graph."""
    with (folder / "model.onnx.data").open("wb") as file:
        file.truncate(size_bytes)
    return folder


@pytest.mark.parametrize(
    ("megabytes", "asked", "moved"), [(1, None, False), (1, True, True), (64, None, True), (64, False, False)]
)
def test_large_weights_move_to_huge_pages_unless_asked_otherwise_and_after_what_was_freed(
    megabytes: int, asked: bool | None, moved: bool, classifier: Path, moves: list[str]
) -> None:
    load(with_weights(classifier, megabytes << 20), huge_pages=asked)
    assert moves == ["give_back_freed_memory", *["use_huge_pages"] * moved]


@pytest.mark.parametrize(("texts", "moved"), [(["one answer"], False), (["several", "answers"], True)])
def test_a_command_that_answers_once_does_not_wait_for_huge_pages(
    texts: list[str], moved: bool, classifier: Path, moves: list[str]
) -> None:
    app = typer.Typer()
    app.command()(run)
    done = CliRunner().invoke(app, [str(with_weights(classifier, 64 << 20)), *texts])
    assert done.exit_code == 0, done.output
    assert ("use_huge_pages" in moves) == moved

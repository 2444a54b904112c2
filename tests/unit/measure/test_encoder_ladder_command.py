"""``hfaccel bench --ladder`` on tiny random models that read; says nothing about how fast anything is."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.artifact.contract import Contract, SessionSettings
from hfaccel.artifact.store import StageCache
from hfaccel.cli.bench import bench
from hfaccel.measure.contenders import GivenOrder
from hfaccel.measure.ladder_encoder import EncoderWay, ForgettingTokenizer, encoder_way
from hfaccel.measure.peers.setup import Setup
from hfaccel.measure.python_tokenizer import python_tokenizer
from hfaccel.runtime.load import load
from hfaccel.runtime.model import Model
from hfaccel.runtime.tokenizer import TextTokenizer
from hfaccel.source.contract import build_contract
from hfaccel.source.resolve import resolve_source
from hfaccel.source.text import text_settings, write_tokenizer
from hfaccel.source.torch_model import TorchRunner, load_torch_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "time", "year", "people", "story", *"abcdefghijklmnopqrstuvwxyz"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
CLASSES = {
    "text-classification": "BertForSequenceClassification",
    "text-ranking": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering",
    "fill-mask": "BertForMaskedLM",
    "sentence-similarity": "BertModel",
}
KEYS = {"export": "a" * 64, "fuse": "b" * 64}
# Tokens, the two special ones included: 4, 5, 6, 7, 8, and the first one again.
TEXTS = ["time people", "year story time", "time time time time", "story year people time year", "a b c d e f", "time people"]
STEPS = [
    "torch eager, each text padded to 64 tokens, tokenizer in Python",
    "padded to the longest text of each batch",
    "Rust tokenizer in place of Python",
    "tokens of texts that come again from a cache",
    "compiled: exported float graph, default session",
    "fused: rewritten float graph, default session",
    "quantized to int8, default session",
    "tuned session",
    "texts sorted by length: the artifact as it is",
]


def save_checkpoint(folder, task):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"num_labels": 1 if task == "text-ranking" else 2}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes, **labels)
    getattr(transformers, CLASSES[task])(config).eval().save_pretrained(folder)
    if task == "sentence-similarity":
        kinds = {"": "Transformer", "1_Pooling": "Pooling"}
        modules = [{"idx": index, "path": path, "type": f"models.{kinds[path]}"} for index, path in enumerate(kinds)]
        (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")


def compile_as_is(source_folder, folder, cache, task):
    """A folder whose graph is the exported one, and a cache that has it as the float graphs that it was made from."""
    source = resolve_source(str(source_folder), task=task)
    module = load_torch_model(source, attention=None)
    contract = build_contract(source, module)
    write_tokenizer(source, folder)
    model = Model(TorchRunner(module), TextTokenizer(folder, text_settings(source)), contract)
    graph = Setup(source, module, model, 1, cache.parent / f"{folder.name}-scratch", ())
    graph.folder.mkdir()
    shutil.copy(graph.float_graph(), folder / "model.onnx")
    for key in KEYS.values():
        with StageCache(cache) as stages, stages.writing(key) as entry:
            shutil.copy(folder / "model.onnx", entry / "artifact" / "model.onnx")
            made = Artifact(entry / "artifact", "model.onnx", "fp32", contract, record_files(entry / "artifact"))
            stages.write_record(entry, made, {})
    manifest = {
        "format_revision": 1,
        "source": {"id": "tiny", "folder": str(source_folder)},
        "contract": contract.to_json(),
        "session": {},
        "graph": "model.onnx",
        "precision": "int8",
        "stages": [{"stage": stage, "key": key, "status": "done"} for stage, key in KEYS.items()],
        "files": [{"path": path.name, "size_bytes": path.stat().st_size, "sha256": ""} for path in folder.iterdir()],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The ladder sets torch's number of threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A compiled folder and its cache, by task, made on first use."""
    made = {}

    def make_task(task):
        if task not in made:
            root = tmp_path_factory.mktemp(task)
            save_checkpoint(root / "source", task)
            compile_as_is(root / "source", root / "out", root / "cache", task)
            made[task] = root
        return made[task]

    return make_task


@pytest.fixture
def compiled(make, monkeypatch):
    root = make("text-classification")
    monkeypatch.setenv("HFACCEL_CACHE", str(root / "cache"))
    return root / "out"


@pytest.fixture
def stream(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def changed(folder, copy, **changes):
    """A copy of a compiled folder with another manifest."""
    shutil.copytree(folder, copy)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (copy / "manifest.json").write_text(json.dumps({**manifest, **changes}), encoding="utf-8")
    return copy


def run(*arguments):
    app = typer.Typer()
    app.command()(bench)
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(argument) for argument in arguments])


def climb(*arguments):
    done = run(*arguments, "--ladder", "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def steps(result):
    return [row["what"] for row in result["ladder"]]


def test_the_steps_come_in_order_and_their_factors_multiply_to_the_total(compiled, stream):
    result = climb(compiled, "--stream", stream, "--batch", "6")
    assert steps(result) == STEPS
    assert result["left_out"] == []
    assert (result["texts"], result["batch"]) == (6, 6)
    rows = result["ladder"]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert math.prod(row["factor"] for row in rows) == pytest.approx(rows[-1]["total"])
    assert rows[0]["total"] == 1
    assert all(row["texts_per_second"] == pytest.approx(6000 / row["p50_ms"]) for row in rows)
    assert rows[0]["note"] == "BertTokenizerLegacy of transformers, which was BertTokenizer before version 5"
    assert rows[3]["note"].startswith("1 of 6 texts came before in the stream")
    assert (rows[7]["factor"], "default settings" in rows[7]["note"]) == (1, True)


def test_without_texts_it_takes_the_sample_and_says_what_is_extrapolated_and_left_out(compiled, tmp_path):
    pytest.importorskip("matplotlib")
    done = run(compiled, "--ladder", "--seconds", "0.1", "--plot", tmp_path / "way.svg")
    assert done.exit_code == 0, done.output
    assert "one stream: 256 texts in batches of 32 in given order, text in, answers out" in done.stdout
    assert "texts/s" in done.stdout
    assert "* step 1: extrapolated by tokens, padding included, from 1 of 8 batches; BertTokenizerLegacy" in done.stdout
    assert "* steps 2, 3, 4, 5: extrapolated by tokens, padding included, from 2 of 8 batches" in done.stdout
    assert 'no step "tokens of texts that come again from a cache": no text of the stream comes twice' in done.stdout
    picture = (tmp_path / "way.svg").read_text(encoding="utf-8")
    assert "no text of the stream comes twice" in picture
    assert "milliseconds for all texts" in picture


@pytest.mark.parametrize("task", [task for task in CLASSES if task != "text-classification"])
def test_every_task_has_a_ladder(make, monkeypatch, tmp_path, task):
    root = make(task)
    monkeypatch.setenv("HFACCEL_CACHE", str(root / "cache"))
    rows = {
        "text-ranking": "query,document\ntime,story year\nyear,people\n",
        "sentence-similarity": "sentence1,sentence2\ntime,story year\nyear,people\n",
        "question-answering": f"question,context\ntime,story year\nyear,{'people ' * 100}\n",
        "fill-mask": "text\ntime [MASK] story\n[MASK]\n",
    }
    data = tmp_path / "data.csv"
    data.write_text(rows.get(task, "text\ntime people\nstory\n"), encoding="utf-8")
    result = climb(root / "out", "--stream", data)
    reasons = {item["what"]: item["reason"] for item in result["left_out"]}
    assert reasons.pop(STEPS[3]) == "no text of the stream comes twice"
    if task == "question-answering":
        assert "which tokenizers in Python do not tell" in reasons.pop(STEPS[2])
        assert steps(result)[0] == "torch eager, each text padded to 64 tokens"
    else:
        assert steps(result)[:3] == STEPS[:3]
    assert reasons == {}
    assert steps(result)[-5:] == STEPS[-5:]


def test_a_session_in_another_engine_is_a_step(compiled, stream, tmp_path):
    pytest.importorskip("openvino")
    session = vars(replace(SessionSettings(), engine="openvino"))
    result = climb(changed(compiled, tmp_path / "out", session=session), "--stream", stream)
    assert result["ladder"][7]["what"] == "tuned session, openvino"
    assert result["ladder"][7]["note"] == ""


def test_a_tokenizer_that_only_rust_has_is_no_step(compiled, stream, tmp_path, write_tokenizer):
    source, folder = tmp_path / "source", tmp_path / "out"
    shutil.copytree(compiled.parent / "source", source)
    (source / "vocab.txt").unlink()
    write_tokenizer(source, words=len(WORDS))
    changed(compiled, folder, source={"id": "tiny", "folder": str(source)})
    shutil.copy(source / "tokenizer.json", folder / "tokenizer.json")
    result = climb(folder, "--stream", stream)
    [left_out] = result["left_out"]
    assert left_out["what"] == STEPS[2]
    assert "has no tokenizer in Python for this model" in left_out["reason"]
    assert steps(result) == ["torch eager, each text padded to 64 tokens", STEPS[1], *STEPS[3:]]


def test_a_fused_graph_that_was_never_made_is_no_step(compiled, stream, tmp_path):
    stages = [{"stage": "export", "key": KEYS["export"], "status": "done"}, {"stage": "fuse", "key": "", "status": "skipped"}]
    result = climb(changed(compiled, tmp_path / "out", stages=stages), "--stream", stream)
    assert steps(result) == [step for step in STEPS if not step.startswith("fused")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "torch"), "--against: the ladder is compared with its own steps, not with engines"),
        (("--workload", "1x16"), "--workload: the ladder of a model that reads is timed on a stream of texts"),
        (("--graph-only",), "give your own texts with --stream FILE"),
        (("--calibration", "texts.txt"), "give your own texts with --stream FILE"),
        (("--plot", "way.pdf"), "the name must end in .png or .svg"),
        (("--stream", "none.txt"), "none.txt: no such file"),
    ],
)
def test_options_that_mean_nothing_here_say_what_to_write(compiled, options, message):
    done = run(compiled, "--ladder", *options)
    assert message in str(done.exception)


def test_it_says_what_to_run_when_the_cache_is_empty(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("HFACCEL_CACHE", str(tmp_path))
    done = run(compiled, "--ladder")
    assert f"hfaccel compile tiny -o {compiled} --force" in str(done.exception)


def contract_of(folder):
    return Contract.from_json(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["contract"])


@pytest.mark.parametrize("with_vocabulary", [True, False])
def test_the_tokenizer_in_python_gives_the_ids_of_the_fast_one(compiled, tmp_path, with_vocabulary):
    source, contract = tmp_path / "source", contract_of(compiled)
    shutil.copytree(compiled.parent / "source", source)
    if not with_vocabulary:
        (source / "vocab.txt").unlink()
    texts = [*TEXTS, "Time, PEOPLE!", "story " * 100, ("time", "year " * 100)]
    plain = [text for text in texts if isinstance(text, str)]
    found = python_tokenizer(resolve_source(str(source), task=contract.task), compiled, contract, plain)
    assert found.name == "BertTokenizerLegacy"
    fast = TextTokenizer(compiled, contract.text)
    for some in (plain, [text for text in texts if text not in plain]):
        for ours, theirs in zip(found.encode(some), fast.encode(some), strict=True):
            assert ours.ids.tolist() == theirs.ids.tolist()
            assert ours.type_ids.tolist() == theirs.type_ids.tolist()
            assert ours.special_tokens_mask == theirs.special_tokens_mask


def test_a_tokenizer_in_python_that_gives_other_ids_is_not_taken(compiled, tmp_path):
    source, contract = tmp_path / "source", contract_of(compiled)
    shutil.copytree(compiled.parent / "source", source)
    (source / "vocab.txt").write_text("\n".join([*WORDS[:5], "year", "time", *WORDS[7:]]), encoding="utf-8")
    found = python_tokenizer(resolve_source(str(source), task=contract.task), compiled, contract, ["time", "people", "a year"])
    assert found == "BertTokenizerLegacy gives other ids on 2 of 3 texts"


class Recorder:
    """A runner that notes the shapes it is given and answers with another's numbers."""

    def __init__(self, runner):
        self.input_names = runner.input_names
        self._runner = runner
        self.shapes = []

    def run(self, feeds):
        self.shapes.append(feeds["input_ids"].shape)
        return self._runner.run(feeds)


def test_padding_changes_the_work_and_not_the_answers(compiled):
    model = load(compiled)
    recorder = Recorder(model.runner)
    padded = GivenOrder(recorder, model.tokenizer, model.contract, pad_to=20)(TEXTS[:3], max_batch=2)
    assert recorder.shapes == [(2, 20), (1, 20)]
    assert [answer["score"] for answer in padded] == pytest.approx([answer["score"] for answer in model(TEXTS[:3])], abs=1e-5)


def test_a_batch_that_stands_for_others_counts_by_their_tokens(compiled):
    model = load(compiled)
    recorder = Recorder(model.runner)
    manifest = json.loads((compiled / "manifest.json").read_text(encoding="utf-8"))
    graph = Artifact(compiled, "model.onnx", "fp32", model.contract, ())
    way = EncoderWay(compiled, model, manifest, recorder, {"export": graph}, tuple(TEXTS), 2, 1, False, "none")
    padded, dynamic = encoder_way(way).rungs[:2]
    for rung in (padded, dynamic):
        recorder.shapes.clear()
        rung.shares[0].run()
        timed = sum(math.prod(shape) for shape in recorder.shapes)
        # 6 texts padded to 64 tokens; or batches of two, the longest of which have 5, 7 and 8.
        whole = 6 * 64 if rung is padded else 2 * (5 + 7 + 8)
        assert timed * rung.shares[0].times == pytest.approx(whole)
        assert timed < whole


def test_a_stream_finds_in_the_cache_only_what_it_brought_itself(compiled):
    model = load(compiled)
    tokenizer = ForgettingTokenizer(compiled / "tokenizer.json", model.contract.text)
    for _ in range(2):
        tokenizer.forget()
        before = tokenizer.cache_info().hits
        first = tokenizer.encode(TEXTS[:2])
        again = tokenizer.encode(TEXTS[4:])
        assert tokenizer.cache_info().hits - before == 1
        assert np.array_equal(first[0].ids, again[1].ids)

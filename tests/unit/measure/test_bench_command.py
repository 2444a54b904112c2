"""The whole command on a tiny random BERT; says nothing about how fast anything is."""

from __future__ import annotations

import json
import sys

import pytest
import typer
from typer.testing import CliRunner

from hfaccel.artifact.contract import Contract, TensorSpec, TextSettings
from hfaccel.cli.bench import bench

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "time", "year", "people", "story", *"abcdefghijklmnopqrstuvwxyz"]
WORDS += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


def save_checkpoint(folder):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    return model


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The comparison sets torch's number of threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    source, folder = root / "source", root / "out"
    model = save_checkpoint(source)
    folder.mkdir()
    # Two tensors: one tensor given twice becomes one input that is read twice.
    ids, mask = torch.full((2, 8), 5), torch.ones(2, 8, dtype=torch.int64)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    options = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"], "dynamo": True, "verbose": False}
    torch.onnx.export(Logits(model).eval(), (ids, mask), str(folder / "model.onnx"), dynamic_shapes=(dims, dims), **options)
    (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
    contract = Contract(
        task="text-classification",
        inputs=inputs,
        outputs=(TensorSpec("logits", "float32", ("batch", 2)),),
        text=TextSettings(max_length=64, pad_token_id=0),
        labels=("LABEL_0", "LABEL_1"),
        problem_type="single_label_classification",
    )
    manifest = {
        "format_revision": 1,
        "source": {"id": "tiny", "folder": str(source)},
        "contract": contract.to_json(),
        "session": {},
        "graph": "model.onnx",
        "files": [{"path": path.name, "size_bytes": path.stat().st_size, "sha256": ""} for path in folder.iterdir()],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def run(*arguments):
    app = typer.Typer()
    app.command()(bench)
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, [str(argument) for argument in arguments])


def test_it_compares_with_torch_and_loads_in_a_fresh_process(compiled):
    done = run(compiled, "--workload", "1x8,2x16", "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [(row["workload"], row["mode"], row["engine"]) for row in result["rows"]] == [
        (point, mode, engine)
        for point in ("1x8", "2x16")
        for mode in ("graph only", "end to end")
        for engine in ("artifact", "torch fp32")
    ]
    assert all(len(row["samples_ms"]) >= 7 for row in result["rows"])
    assert result["fresh_process"]["load_ms"] > 0
    assert result["fresh_process"]["peak_memory_bytes"] > 10_000_000
    assert result["size_bytes"] > 1000


def test_the_table_shows_one_kind_of_run_when_asked(compiled):
    done = run(compiled, "--against", "", "--workload", "1x8", "--seconds", "0.1", "--graph-only")
    assert done.exit_code == 0, done.output
    assert "graph only" in done.stdout
    assert "end to end" not in done.stdout
    assert "fresh process: import" in done.stdout


@pytest.mark.parametrize(("options", "moved"), [((), False), (("--huge-pages",), True), (("--no-huge-pages",), False)])
def test_the_artifact_is_opened_in_huge_pages_as_asked(compiled, options, moved, monkeypatch):
    moves = []
    monkeypatch.setattr("hfaccel.runtime.load.use_huge_pages", lambda: moves.append(1))
    done = run(compiled, "--against", "", "--workload", "1x8", "--seconds", "0.1", "--graph-only", "--json", *options)
    assert done.exit_code == 0, done.output
    assert len(moves) == moved
    assert json.loads(done.stdout)["huge_pages"] is (moved if options else None)


def test_lengths_that_the_model_cannot_read_are_refused(compiled):
    done = run(compiled, "--workload", "1x65")
    assert str(done.exception) == ("--workload: 1x65 is longer than the 64 tokens that the model reads (use lengths up to 64)")


def engines(result, key="rows"):
    return list(dict.fromkeys(row["engine"] for row in result[key]))


def test_every_engine_answers_as_the_source_does(compiled):
    for package in ("openvino", "ctranslate2"):
        pytest.importorskip(package)
    names = "torch,torch-bf16,onnxruntime-default,openvino,ctranslate2"
    done = run(compiled, "--against", names, "--workload", "2x16", "--seconds", "0.1", "--end-to-end", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["not_compared"] == []
    found = engines(result)
    assert [name.split()[0] for name in found] == ["artifact", *names.replace("-bf16", "").split(",")]
    for row in result["rows"]:
        likeness = row["likeness"]
        assert likeness["finite"]
        assert likeness["texts"] == 64
        assert likeness["cosine"] > (0.9999 if row["engine"] in ("artifact", "torch fp32") else 0.98), row["engine"]
        assert likeness["top1_agreement"] > 0.8


def test_nncf_is_calibrated_with_the_given_texts(compiled, tmp_path):
    pytest.importorskip("nncf")
    texts = tmp_path / "texts.txt"
    texts.write_text("time people\nyear story\nabc def time\n", encoding="utf-8")
    options = ("--workload", "2x8", "--seconds", "0.1", "--graph-only", "--calibration", texts, "--json")
    done = run(compiled, "--against", "openvino-int8", *options)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["not_compared"] == []
    assert engines(result)[1] in ("openvino int8+fp32", "openvino int8+bf16")
    assert result["rows"][1]["likeness"]["cosine"] > 0.95


def test_an_engine_that_is_not_installed_or_cannot_run_it_is_told(compiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    monkeypatch.setitem(sys.modules, "nncf", None)
    done = run(compiled, "--against", "ctranslate2,torch,openvino-int8", "--workload", "1x8", "--seconds", "0.1", "--graph-only")
    assert done.exit_code == 0, done.output
    assert "ctranslate2: not installed (pip install ctranslate2)" in done.stdout
    assert "not installed (pip install nncf)" in done.stdout
    assert "torch fp32" in done.stdout


def test_an_architecture_that_ctranslate2_does_not_convert_is_told(compiled, tmp_path):
    pytest.importorskip("ctranslate2")
    folder = tmp_path / "electra"
    save_checkpoint(folder)
    sizes = {"hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ElectraConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    transformers.ElectraForSequenceClassification(config).save_pretrained(folder)
    options = ("--workload", "1x8", "--seconds", "0.1", "--graph-only", "--json")
    done = run(compiled, "--against", "ctranslate2", "--model", folder, *options)
    assert done.exit_code == 0, done.output
    [absent] = json.loads(done.stdout)["not_compared"]
    assert absent["engine"] == "ctranslate2"
    assert absent["reason"].startswith("not supported by ctranslate2: ")
    assert "ElectraConfig" in absent["reason"]


def test_a_stream_goes_through_every_engine_in_both_orders(compiled, tmp_path):
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\n" + "".join(f"time {'people ' * (count % 5)},0\n" for count in range(7)), encoding="utf-8")
    done = run(compiled, "--stream", texts, "--batch", "2", "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["rows"] == []
    assert [(row["engine"], row["order"], row["texts"]) for row in result["stream"]] == [
        ("artifact", "as it comes", 7),
        ("torch fp32", "as it comes", 7),
        ("torch fp32", "sorted by length", 7),
    ]
    assert result["stream"][0]["likeness"]["texts"] == 7


def test_a_stream_that_does_not_exist_is_refused(compiled, tmp_path):
    done = run(compiled, "--stream", tmp_path / "none.csv")
    assert str(done.exception) == (
        f"{tmp_path / 'none.csv'}: no such file (give a file with one text a line, or CSV with a column 'text')"
    )

"""The whole command on a tiny random BERT; says nothing about how fast anything is."""

from __future__ import annotations

import json

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


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    source, folder = root / "source", root / "out"
    model = save_checkpoint(source)
    folder.mkdir()
    ids = torch.ones(2, 8, dtype=torch.int64)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    options = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"], "dynamo": True, "verbose": False}
    torch.onnx.export(Logits(model).eval(), (ids, ids), str(folder / "model.onnx"), dynamic_shapes=(dims, dims), **options)
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


def test_lengths_that_the_model_cannot_read_are_refused(compiled):
    done = run(compiled, "--workload", "1x65")
    assert str(done.exception) == ("--workload: 1x65 is longer than the 64 tokens that the model reads (use lengths up to 64)")

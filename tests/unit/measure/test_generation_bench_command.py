"""``hfaccel bench`` on a tiny random Llama that generates text; says nothing about how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.artifact.contract import Contract, SessionSettings, TensorSpec, TextSettings
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.artifact.store import StageCache
from hfaccel.cli.bench import bench
from hfaccel.rewrites.graphs import load_graph, save_graph
from hfaccel.rewrites.last_token_logits import last_token_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mobius = pytest.importorskip("mobius")

VOCABULARY, CONTEXT = 400, 96
KEYS = {"export": "a" * 64, "fuse": "b" * 64}
CONTRACT = Contract(
    task="text-generation",
    inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
    outputs=(TensorSpec("logits", "float32", ("batch", 1, VOCABULARY)),),
    text=TextSettings(max_length=CONTEXT, pad_token_id=0),
    # The end token that the run must not stop at is likely to come up in a random model.
    generation=GenerationSettings(
        layers=2,
        key_value_heads=2,
        head_size=16,
        context_length=CONTEXT,
        vocabulary_size=VOCABULARY,
        end_token_ids=tuple(range(2, VOCABULARY)),
        pad_token_id=0,
    ),
)


def save_checkpoint(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).eval().save_pretrained(folder)
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")


def write_stage(root, key, graph_folder):
    with StageCache(root) as cache, cache.writing(key) as entry:
        shutil.copytree(graph_folder, entry / "artifact", dirs_exist_ok=True)
        artifact = Artifact(entry / "artifact", "model.onnx", "fp32", CONTRACT, record_files(entry / "artifact"))
        cache.write_record(entry, artifact, {})


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The comparison sets torch's number of threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A compiled folder, and the cache with the float graphs that it was made from."""
    root = tmp_path_factory.mktemp("bench-generation")
    source, graph, folder = root / "source", root / "graph", root / "out"
    source.mkdir()
    save_checkpoint(source)
    mobius.build(str(source), task="text-generation", dtype="f32", execution_provider="cpu").save(str(graph))
    shutil.copytree(graph, folder)
    (folder / "model.onnx").unlink()
    model = load_graph(graph / "model.onnx")
    last_token_logits(model)
    save_graph(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    for key in KEYS.values():
        write_stage(root / "cache", key, graph)
    manifest = {
        "format_revision": 1,
        "source": {"id": "tiny", "folder": str(source)},
        "contract": CONTRACT.to_json(),
        "session": {},
        "graph": "model.onnx",
        "precision": "int8",
        "stages": [{"stage": stage, "key": key, "status": "done"} for stage, key in KEYS.items()],
        "files": [{"path": path.name, "size_bytes": path.stat().st_size, "sha256": ""} for path in folder.iterdir()],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder, root / "cache"


@pytest.fixture
def compiled(made, monkeypatch):
    monkeypatch.setenv("HFACCEL_CACHE", str(made[1]))
    return made[0]


def changed(compiled, folder, **changes):
    """A copy of the compiled folder with another manifest."""
    shutil.copytree(compiled, folder)
    manifest = json.loads((compiled / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}), encoding="utf-8")
    return folder


def run(*arguments):
    app = typer.Typer()
    app.command()(bench)
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, [str(argument) for argument in arguments])


def test_prompt_and_answer_are_compared_with_torch(compiled):
    done = run(compiled, "--workload", "6+3,4+2", "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [(row["workload"], row["part"], row["engine"]) for row in result["rows"]] == [
        (request, part, engine)
        for request in ("6+3", "4+2")
        for part in ("prompt", "answer")
        for engine in ("artifact", "torch fp32")
    ]
    assert result["not_compared"] == []
    assert all(row["likeness"]["cosine"] > 0.9999 for row in result["rows"])
    assert all(len(row["samples_ms"]) >= 7 for row in result["rows"])


def test_the_table_names_a_peer_that_is_not_there(compiled, tmp_path, monkeypatch):
    (tmp_path / "genai_config.json").write_text("{}", encoding="utf-8")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "hfaccel.measure.peers.decoders.find_spec", lambda name: None if name == "onnxruntime_genai" else find(name)
    )
    done = run(compiled, "--against", f"onnxruntime-genai={tmp_path}", "--workload", "6+3", "--seconds", "0.1")
    assert done.exit_code == 0, done.output
    assert "onnxruntime-genai: not installed (pip install onnxruntime-genai)" in done.stdout
    assert "tokens/s" in done.stdout


def test_genai_runs_its_own_folder(compiled, made):
    pytest.importorskip("onnxruntime_genai")
    folder = made[0].parent / "graph"
    if not (folder / "genai_config.json").is_file():
        pytest.skip("this mobius writes no genai_config.json")
    done = run(compiled, "--against", f"torch,onnxruntime-genai={folder}", "--workload", "6+3", "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["not_compared"] == []
    assert result["rows"][2]["engine"] == "onnxruntime-genai graph"
    assert result["rows"][2]["likeness"]["cosine"] > 0.9999


TOGETHER = ("--ladder", "--batch", 3)


def way(result):
    return [row["what"].split(":")[0].split(",")[0] for row in result["ladder"]]


GUESSED = "tokens guessed ahead (prompt lookup)"
STEPS = [
    "transformers eager",
    "key-value cache (use_cache=True)",
    "compiled",
    "fused",
    "quantized to int8",
    "tuned session",
    "3 requests answered together",
]


@pytest.mark.parametrize("new", [3, 20])
def test_the_ladder_has_its_steps_in_order(compiled, new):
    done = run(compiled, *TOGETHER, "--workload", f"8+{new}", "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["ladder"]
    assert way({"ladder": rows}) == STEPS
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert all(row["p50_ms"] > 0 for row in rows)
    assert math.prod(row["factor"] for row in rows) == pytest.approx(rows[-1]["total"])
    assert rows[0]["what"].endswith("extrapolated") == (new == 20)
    assert rows[-2]["factor"] == 1
    assert "default settings" in rows[-2]["note"]
    assert "divided by 3" in rows[-1]["note"]


def test_weights_in_huge_pages_are_a_step_of_the_ladder(compiled):
    done = run(compiled, "--ladder", "--workload", "8+3", "--seconds", "0.1", "--huge-pages", "--json")
    assert done.exit_code == 0, done.output
    tuned = json.loads(done.stdout)["ladder"][-2]
    assert (tuned["what"], tuned["note"]) == ("tuned session: the artifact as it is", "its weights lie in pages of 2 MiB")


@pytest.fixture
def texts(tmp_path):
    """Tokens are bytes here: two of the lines are needed for a prompt of 40."""
    path = tmp_path / "texts.txt"
    path.write_text("The council met on Monday.\nIt agreed on nothing but the next meeting.\n" * 3, encoding="utf-8")
    return path


def test_texts_that_people_wrote_get_a_step_with_guessed_tokens(compiled, texts):
    done = run(compiled, *TOGETHER, "--workload", "40+3", "--stream", texts, "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert way(result) == [*STEPS[:-1], GUESSED, STEPS[-1]]
    assert "the mean of 3 texts" in result["ladder"][-2]["note"]
    assert result["stream"] == str(texts)


def test_without_texts_nothing_is_guessed_and_that_is_said(compiled):
    done = run(compiled, *TOGETHER, "--workload", "8+3", "--seconds", "0.1")
    assert f'no step "{GUESSED}": how much an answer repeats depends on the text' in done.stdout


def test_whole_requests_of_texts_are_compared_with_torch(compiled, texts, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "requests.png"
    options = ("--workload", "20+5", "--stream", texts, "--seconds", "0.1", "--plot", picture, "--json")
    done = run(compiled, *options)
    assert done.exit_code == 0, done.output
    rows = [row for row in json.loads(done.stdout)["rows"] if row["part"] == "request"]
    assert [row["engine"] for row in rows] == ["artifact", "torch fp32"]
    assert [row["tokens"] for row in rows] == [5 * 4, 5 * 4]
    assert picture.stat().st_size > 1000


def test_texts_too_short_for_a_prompt_are_refused(compiled, texts):
    texts.write_text("Too short.\n", encoding="utf-8")
    done = run(compiled, "--workload", "40+3", "--stream", texts)
    assert "fewer than the 40 tokens of one prompt" in str(done.exception)


def test_a_single_request_has_no_step_of_several(compiled):
    done = run(compiled, "--ladder", "--batch", 1, "--workload", "8+3", "--seconds", "0.1", "--json")
    assert way(json.loads(done.stdout)) == STEPS[:-1]


def test_a_decoder_whose_tokenizer_exists_in_python_has_its_step(compiled, made, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(made[0].parent / "source", source)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (source / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizerFast(vocab=str(source / "vocab.txt")).save_pretrained(source)
    folder = changed(compiled, tmp_path / "out", source={"id": "tiny", "folder": str(source)})
    shutil.copy(source / "tokenizer.json", folder / "tokenizer.json")
    done = run(folder, *TOGETHER, "--workload", "8+20", "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert way(result) == [*STEPS[:2], "Rust tokenizer in place of Python", *STEPS[2:]]
    assert result["ladder"][0]["what"].endswith("tokenizer in Python, extrapolated")
    assert [item["what"] for item in result["left_out"]] == [GUESSED]


def test_the_ladder_is_a_table_and_a_picture_and_times_a_tuned_session(compiled, tmp_path):
    pytest.importorskip("matplotlib")
    session = replace(SessionSettings(), allow_spinning=False)
    folder = changed(compiled, tmp_path / "out", session=vars(session))
    done = run(folder, "--ladder", "--workload", "8+20", "--seconds", "0.1", "--plot", tmp_path / "way.png")
    assert done.exit_code == 0, done.output
    assert "* step 1: extrapolated by length from 4 new tokens" in done.stdout
    assert "* step 6" not in done.stdout
    assert 'no step "Rust tokenizer in place of Python": transformers' in done.stdout
    assert (tmp_path / "way.png").stat().st_size > 1000


def test_a_fused_graph_that_was_never_made_is_no_step(compiled, tmp_path):
    stages = [{"stage": "export", "key": KEYS["export"], "status": "done"}, {"stage": "fuse", "key": "", "status": "skipped"}]
    done = run(changed(compiled, tmp_path / "out", stages=stages), *TOGETHER, "--workload", "8+3", "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    assert way(json.loads(done.stdout)) == [step for step in STEPS if step != "fused"]


def test_the_ladder_says_what_to_run_when_the_cache_is_empty(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("HFACCEL_CACHE", str(tmp_path))
    done = run(compiled, "--ladder", "--workload", "8+3")
    assert f"hfaccel compile tiny -o {compiled} --force" in str(done.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workload", "1x16"), "'1x16' is no workload of text generation (write prompt+new tokens, for example 128+32)"),
        (("--workload", "90+7"), "90+7 is longer than the 96 tokens"),
        (("--batch", 4), "--batch: this option is for models that only read"),
        (("--graph-only",), "leave it out; prompt and answer are timed one by one"),
        (("--stream", "missing.txt", "--workload", "8+3"), "missing.txt: no such file"),
        (("--against", "ctranslate2"), "known peers: torch, onnxruntime-genai=FOLDER"),
        (("--ladder", "--against", "torch"), "--against: the ladder is compared with its own steps, not with engines"),
        (("--ladder", "--workload", "8+3,8+4"), "give one, e.g. --workload 128+128"),
        (("--plot", "way.pdf", "--workload", "8+3"), "the name must end in .png or .svg"),
    ],
)
def test_options_that_mean_nothing_here_say_what_to_write(compiled, options, message):
    done = run(compiled, *options)
    assert message in str(done.exception)


def test_a_folder_that_reads_texts_has_other_points(compiled, tmp_path):
    contract = {**CONTRACT.to_json(), "task": "text-classification", "generation": None}
    folder = changed(compiled, tmp_path / "out", contract=contract)
    assert "write batch x sequence length" in str(run(folder, "--workload", "128+128").exception)


def test_the_ladder_of_a_checkpoint_says_to_compile_it_first(tmp_path):
    done = run(tmp_path, "--ladder")
    assert f"hfaccel compile {tmp_path} -o OUT" in str(done.exception)

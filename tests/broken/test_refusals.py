"""The zoo of bad input: one clear line, the exit code of the table, nothing half-written, an existing output untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 30, "hidden_size": 32}


def header(tensors: dict[str, object]) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def write_checkpoint(
    folder: Path, *, config: object = CONFIG, weights: bytes | None = None, name: str = "model.safetensors"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    good = header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}) + bytes(8)
    (folder / name).write_bytes(good if weights is None else weights)
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}}
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "added_tokens": []}), encoding="utf-8")
    return folder


def run(*arguments: str | Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HFACCEL_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "hfaccel", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def check(process: subprocess.CompletedProcess[str], code: int, *texts: str) -> None:
    assert process.returncode == code, process.stderr
    for text in texts:
        assert text in process.stderr, process.stderr
    assert "Traceback" not in process.stderr
    assert process.stdout == ""


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("missing-folder", 4, "missing-folder"),
        ("config-not-json", 4, "config.json"),
        ("truncated", 4, "model.safetensors"),
        ("pickle", 4, "--allow-pickle"),
        ("remote-code", 4, "--trust-remote-code"),
        ("no-tokenizer", 4, "tokenizer"),
        ("wrong-tokenizer", 4, "tokenizer"),
        ("encoder-decoder", 5, "LongT5ForConditionalGeneration"),
    ],
)
def test_bad_checkpoints(name: str, code: int, text: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    if name == "config-not-json":
        write_checkpoint(folder, config="{not json")
    elif name == "truncated":
        write_checkpoint(folder, weights=header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}) + bytes(8))
    elif name == "pickle":
        write_checkpoint(folder, name="pytorch_model.bin")
    elif name == "remote-code":
        write_checkpoint(folder, config={**CONFIG, "auto_map": {"AutoModel": "evil.Model"}})
    elif name == "no-tokenizer":
        write_checkpoint(folder)
        (folder / "tokenizer.json").unlink()
    elif name == "wrong-tokenizer":
        write_checkpoint(folder, config={**CONFIG, "vocab_size": 1})
    elif name == "encoder-decoder":
        changes = {"model_type": "longt5", "architectures": ["LongT5ForConditionalGeneration"], "is_encoder_decoder": True}
        write_checkpoint(folder, config={**CONFIG, **changes})
    check(run("compile", folder, "-o", tmp_path / "out", tmp_path=tmp_path), code, text)
    assert not (tmp_path / "out").exists()


def test_bad_recipe_names_file_line_and_closest_key(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nextends: encoder\ndescription: x\nquantize:\n  weight_bitz: 8\n", encoding="utf-8")
    process = run("compile", write_checkpoint(tmp_path / "m"), "-o", tmp_path / "out", "--recipe", recipe, tmp_path=tmp_path)
    check(process, 3, "mine.yaml:5", "weight_bits")


@pytest.mark.parametrize(
    ("content", "text"),
    [("", "empty"), ("body,label\nhello,1\n", "body"), ("text,label\n", "no ")],
    ids=["empty", "wrong-column", "no-rows"],
)
def test_bad_data(content: str, text: str, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text(content, encoding="utf-8")
    process = run("compile", write_checkpoint(tmp_path / "m"), "-o", tmp_path / "out", "--data", data, tmp_path=tmp_path)
    check(process, 3, "data.csv", text)


def test_unknown_target(tmp_path: Path) -> None:
    process = run("compile", write_checkpoint(tmp_path / "m"), "-o", tmp_path / "out", "--target", "cpu-avx3", tmp_path=tmp_path)
    check(process, 8, "cpu-avx3")


def test_foreign_output_folder_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious", encoding="utf-8")
    process = run("compile", write_checkpoint(tmp_path / "m"), "-o", output, "--force", tmp_path=tmp_path)
    check(process, 3, "left alone")
    assert [path.name for path in output.iterdir()] == ["mine.txt"]


def test_several_problems_come_together(tmp_path: Path) -> None:
    process = run("compile", tmp_path / "nowhere", "-o", tmp_path / "out", "--target", "cpu-avx3", tmp_path=tmp_path)
    assert process.returncode in (4, 8)
    assert "cpu-avx3" in process.stderr
    assert "nowhere" in process.stderr


def test_bad_share_is_a_usage_error(tmp_path: Path) -> None:
    check(run("compile", "x", "-o", tmp_path / "out", "--max-loss", "lots", tmp_path=tmp_path), 2, "--max-loss")


def test_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    assert run("compile", "x", "--no-such-option", tmp_path=tmp_path).returncode == 2


def test_verify_of_a_folder_that_is_no_artifact(tmp_path: Path) -> None:
    check(run("verify", tmp_path, tmp_path=tmp_path), 9, "hfaccel compile MODEL -o OUT")

"""An architecture that mobius does not know, from the command line to a folder that answers as transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import hfaccel
from hfaccel.rewrites.graphs import load_graph
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.sampling import SamplingSettings

WORDS, NEW_TOKENS = 120, 64
OFF_TARGET = "cpu-arm-dotprod"
"""Another target than any host of these tests: nothing is timed, so no candidate is dropped for its speed."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[..., None]) -> Path:
    """A random Jais 2: layer norms and squared ReLU, with as many heads as Llama has. mobius takes it for a Llama."""
    torch.manual_seed(0)
    config = transformers.Jais2Config(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path_factory.mktemp("jais2")
    model.save_pretrained(folder)
    write_tokenizer(folder, words=WORDS, settings={"model_max_length": 128})
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = (" ".join(f"word{number}" for number in random.integers(0, WORDS - 5, 30)) for _ in range(6))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_what_mobius_does_not_know_is_traced(
    checkpoint: Path, texts: Path, tmp_path: Path, command_line: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    arguments = ("compile", checkpoint, "-o", out, "--data", texts, "--max-loss", "3%", "--target", OFF_TARGET, "--json")
    finished = command_line(*arguments, "--set", "quantize.fallback=off")
    assert finished.code == 0, finished.err
    assert "warning: exporter mobius" in finished.err
    assert "Traceback" not in finished.err
    manifest = json.loads(finished.out)
    stages = {record["stage"]: record for record in manifest["stages"]}
    assert stages["export"]["metrics"]["exporter"] == "traced"
    assert stages["export"]["metrics"]["parity"]["max_abs"] < 1e-5
    assert {item["name"] for item in manifest["candidates"]} >= {"float", "int8"}
    int8 = next(item for item in manifest["candidates"] if item["name"] == "int8")
    assert int8["size_bytes"] < 0.5 * next(item for item in manifest["candidates"] if item["name"] == "float")["size_bytes"]


def test_what_the_operator_does_not_rotate_is_traced(
    texts: Path, tmp_path: Path, write_tokenizer: Callable[..., None], command_line: Callable[..., Any]
) -> None:
    """GroupQueryAttention rotates multiples of 16 channels, which mobius leaves to it; here it is a half of 16."""
    torch.manual_seed(0)
    config = transformers.PhiConfig(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=0, partial_rotary_factor=0.5,
    )  # fmt: skip
    transformers.PhiForCausalLM(config).save_pretrained(tmp_path / "phi")
    write_tokenizer(tmp_path / "phi", words=WORDS, settings={"model_max_length": 128})
    arguments = ("compile", tmp_path / "phi", "-o", tmp_path / "out", "--data", texts, "--precision", "fp32", "--json")
    finished = command_line(*arguments, "--target", OFF_TARGET)
    assert finished.code == 0, finished.err
    assert "onnxruntime does not run the graph" in " ".join(finished.err.split())
    export = next(record for record in json.loads(finished.out)["stages"] if record["stage"] == "export")
    assert export["metrics"]["exporter"] == "traced"


def test_the_float_folder_answers_as_transformers_does(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    result = hfaccel.compile(
        checkpoint,
        output=tmp_path / "out",
        data=texts,
        target=OFF_TARGET,
        overrides=("quantize.enabled=false", "export.exporters=[traced]"),
        use_cache=False,
    )
    graph = load_graph(result.folder / "model.onnx").graph
    assert "position_ids" not in {value.name for value in graph.inputs}
    assert next(value for value in graph.outputs if value.name == "logits").shape[1] == 1  # the head runs on the last token only
    random = np.random.default_rng(1)
    prompts = [random.integers(5, WORDS, length).tolist() for length in (13, 29, 18)]
    source = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            given = source.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        expected.append(given[0, len(prompt) :].tolist())
    model, settings = hfaccel.load(result.folder), SamplingSettings(max_new_tokens=NEW_TOKENS)
    assert isinstance(model, GenerationModel)
    assert [model.generate_ids([prompt], settings)[0] for prompt in prompts] == expected
    assert model.generate_ids(prompts, settings) == expected

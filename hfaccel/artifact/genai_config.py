"""``genai_config.json``: what onnxruntime-genai reads to open a compiled decoder as it lies there.

Its keys are those that the model builder of onnxruntime-genai writes. Our graphs are used the way its own are: past and present in one
buffer, prompts padded on the right, and logits of the last token of each row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfaccel.artifact.contract import Contract, Engine
from hfaccel.artifact.generation import GenerationSettings

FILE_NAME = "genai_config.json"
MOST_DEFAULT_TOKENS = 4096
"""The cache has room for ``max_length`` tokens from the start, so the default may not be the whole of a long context."""
# model_type of the checkpoint -> type in onnxruntime-genai. That of GPT-2 there is another graph, with a cache of another shape.
_TYPES: Mapping[str, str] = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "gpt2": "decoder",
    "llama": "llama",
    "mistral": "mistral",
    "phi": "phi",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
_OPTIONAL_SIZES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
}
"""Key -> names that config files have for it."""


def why_no_genai_config(contract: Contract, model_type: str, engine: Engine) -> str | None:
    """Why onnxruntime-genai cannot open a compiled folder, as the end of a sentence; None where it can.

    Args:
        contract: of the graph.
        model_type: of the checkpoint.
        engine: that the graph was made for.
    """
    if contract.task != "text-generation" or contract.generation is None:
        return f"it opens decoders, and the task is {contract.task}"
    if engine != "onnxruntime":
        return f"the graph was made for the engine {engine}"
    if model_type not in _TYPES:
        return f"it has no type for the architecture {model_type}"
    if not _end_tokens(contract.generation):
        return "the checkpoint names no token that ends a text, and it would take the padding for one"
    return None


def genai_config(contract: Contract, config: Mapping[str, Any], graph: str) -> dict[str, Any]:
    """The content of the file, for a graph of which :func:`why_no_genai_config` says nothing.

    Threads are left to whoever opens it. ``min_p`` has no counterpart there.

    Args:
        contract: of the graph.
        config: ``config.json`` of the checkpoint.
        graph: its file name.
    """
    settings = contract.generation
    assert settings is not None  # the caller has asked why not
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if any(spec.name == "position_ids" for spec in contract.inputs):
        inputs["position_ids"] = "position_ids"
    found = {key: next((int(config[name]) for name in names if config.get(name)), None) for key, names in _OPTIONAL_SIZES.items()}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph,
        "head_size": settings.head_size,
        **{key: size for key, size in found.items() if size is not None},
        "num_hidden_layers": settings.layers,
        "num_key_value_heads": settings.key_value_heads,
        "inputs": {**inputs, "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }
    start, size = config.get("bos_token_id"), settings.vocabulary_size
    model = {
        "type": _TYPES[str(config["model_type"])],
        "vocab_size": size,
        "context_length": settings.context_length,
        **({} if start is None or not 0 <= int(start) < size else {"bos_token_id": int(start)}),
        "eos_token_id": _end_tokens(settings),
        "pad_token_id": settings.pad_token_id,
        "decoder": decoder,
    }
    defaults = settings.defaults
    search = {
        "do_sample": defaults.do_sample,
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "repetition_penalty": defaults.repetition_penalty,
        "num_beams": 1,
        "max_length": min(settings.context_length, MOST_DEFAULT_TOKENS),
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search}


def _end_tokens(settings: GenerationSettings) -> list[int]:
    """It refuses ids beyond the vocabulary, which can end nothing."""
    return [token for token in settings.end_token_ids if 0 <= token < settings.vocabulary_size]

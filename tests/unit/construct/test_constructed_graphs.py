"""Constructed encoder-decoders answer as transformers does: at once, with padding, and token by token with their cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from hfaccel.artifact.contract import SessionSettings
from hfaccel.artifact.generation import EncoderSettings, GenerationSettings
from hfaccel.construct import FAMILIES, construct_encoder_decoder
from hfaccel.errors import ExportError
from hfaccel.evaluate.cached_decoding import CachedAnswering, open_parts
from hfaccel.rewrites.graphs import save_graph
from hfaccel.rewrites.last_token_logits import last_token_logits

LAYERS, HEADS, HEAD_SIZE, VOCABULARY = 2, 4, 8, 99


def _t5(**options: Any) -> Any:
    sizes = {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": HEAD_SIZE, "d_ff": 40, "num_layers": LAYERS, "num_heads": HEADS}
    few = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **few, decoder_start_token_id=0, **options))


def _mt5() -> Any:
    config = transformers.MT5Config(
        vocab_size=VOCABULARY, d_model=24, d_kv=HEAD_SIZE, d_ff=40, num_layers=LAYERS, num_heads=HEADS, decoder_start_token_id=0
    )
    return transformers.MT5ForConditionalGeneration(config)


def _bart_like(kind: str, **options: Any) -> Any:
    name = {
        "bart": "Bart",
        "blenderbot": "Blenderbot",
        "m2m_100": "M2M100",
        "mbart": "MBart",
        "marian": "Marian",
        "pegasus": "Pegasus",
    }[kind]
    model = "MarianMTModel" if kind == "marian" else f"{name}ForConditionalGeneration"
    sizes = {"d_model": HEADS * HEAD_SIZE, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "max_position_embeddings": 48}
    wide = {"encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    ids = {
        "vocab_size": VOCABULARY,
        "pad_token_id": 98,
        "eos_token_id": 0,
        "decoder_start_token_id": 98,
        "forced_eos_token_id": 0,
    }
    return getattr(transformers, model)(getattr(transformers, f"{name}Config")(**sizes, **wide, **{**ids, **options}))


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=HEADS * HEAD_SIZE, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_ffn_dim=40,
        decoder_ffn_dim=40, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, num_mel_bins=8, max_source_positions=30,
        max_target_positions=48, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "t5": _t5,
    "t5-gated-untied": lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": _mt5,
    "bart": lambda: _bart_like("bart"),
    "bart-relu-scaled": lambda: _bart_like("bart", activation_function="relu", scale_embedding=True),
    "mbart": lambda: _bart_like("mbart"),
    "marian-swish": lambda: _bart_like("marian", activation_function="swish", scale_embedding=True),
    "pegasus": lambda: _bart_like("pegasus"),
    "blenderbot": lambda: _bart_like("blenderbot"),
    "m2m_100": lambda: _bart_like("m2m_100", pad_token_id=0, eos_token_id=2, decoder_start_token_id=2, scale_embedding=True),
    "whisper": _whisper,
}


def _random_model(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases, norms and position tables start as zeros or ones, which hide mistakes
            parameter += 0.1 * torch.randn_like(parameter)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias += torch.randn_like(model.final_logits_bias)
    return model


def _source(model: Any) -> dict[str, torch.Tensor]:
    if model.config.model_type == "whisper":
        return {"input_features": torch.randn(3, 8, 60)}
    mask = torch.ones(3, 19, dtype=torch.long)
    mask[1, 11:], mask[2, 2:] = 0, 0
    return {"input_ids": torch.randint(1, 90, (3, 19)), "attention_mask": mask}


def test_every_family_is_among_the_models_here() -> None:
    assert {_random_model(name).config.model_type for name in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_source_with_a_cache_and_padded_sources(name: str, tmp_path: Path) -> None:
    model = _random_model(name)
    source, answer = _source(model), torch.randint(1, 90, (3, 23))
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=answer).logits.numpy()
    settings = GenerationSettings(LAYERS, HEADS, HEAD_SIZE, 48, VOCABULARY, (), 0, encoder=EncoderSettings(19, (0,)))
    graph = construct_encoder_decoder(model)
    assert last_token_logits(graph) == 1  # taken back by open_parts, which must find it in the decoder
    runner = CachedAnswering(*open_parts(save_graph(graph, tmp_path), SessionSettings(), all_logits=True), settings)
    arrays = {key: value.numpy() for key, value in source.items()}
    given = {**arrays, "decoder_input_ids": answer.numpy(), "decoder_attention_mask": np.ones((3, 23), dtype=np.int64)}
    np.testing.assert_allclose(runner.run(given)["logits"], expected, atol=2e-5, rtol=1e-4)


def test_the_encoder_reads_no_tokens_of_the_answer_and_the_decoder_no_source(tmp_path: Path) -> None:
    path = save_graph(construct_encoder_decoder(_random_model("bart")), tmp_path)
    encoder, decoder = open_parts(path, SessionSettings())
    assert set(encoder.input_names) == {"input_ids", "attention_mask"}
    assert {name for name in decoder.input_names if not name.startswith(("past_key_values.", "cross."))} == {
        "input_ids",
        "attention_mask",
        "position_ids",
        "encoder_attention_mask",
    }


def test_an_unknown_architecture_is_refused_with_what_is_known() -> None:
    model = _random_model("bart")
    model.config.model_type = "prophetnet"
    with pytest.raises(ExportError, match="prophetnet") as refused:
        construct_encoder_decoder(model)
    assert "marian" in str(refused.value.hint)


def test_an_unknown_activation_is_refused(tmp_path: Path) -> None:
    model = _random_model("bart")
    model.config.activation_function = "prelu"
    with pytest.raises(ExportError, match="prelu"):
        construct_encoder_decoder(model)

"""Decoders traced from torch answer token for token as transformers does, alone and in a ragged batch; what cannot be is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
import transformers

from hfaccel.artifact.contract import SessionSettings
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.errors import ExportError
from hfaccel.rewrites.graphs import save_graph
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.stages.exporters import quiet_exporters
from hfaccel.stages.mobius_corrections import WINDOW, attention_nodes
from hfaccel.trace import trace_decoder
from hfaccel.trace.decoder import probe_layers

WORDS, LAYERS, CONTEXT, WINDOW_TOKENS, NEW_TOKENS = 120, 2, 128, 8, 64
PROMPT_LENGTHS = (13, 29, 18)  # all longer than the window
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,  # so that every answer has all its tokens
    "pad_token_id": 0,
}
GPT = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_inner": 128, "n_positions": CONTEXT}
GROUPED = {"num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 16}
GEMMA = {**HEADS, "hidden_size": 96, "query_pre_attn_scalar": 24, "sliding_window": WINDOW_TOKENS}
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
NESTED_ROTARY = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Row:
    """An architecture: settings that differ from SIZES, layers that see a window only, whether the operator rotates by itself."""

    model_type: str
    settings: dict[str, Any]
    sliding: tuple[int, ...] = ()
    rotated_inside: bool = True


ARCHITECTURES = {
    "gpt2": Row("gpt2", GPT, rotated_inside=False),
    "llama": Row("llama", GROUPED),
    "qwen2": Row("qwen2", GROUPED),
    "qwen3": Row("qwen3", HEADS),
    "phi": Row("phi", {"num_attention_heads": 2, "partial_rotary_factor": 0.5}),
    "gemma": Row("gemma", {**HEADS, "hidden_size": 96}),
    "gemma3": Row("gemma3_text", {**GEMMA, "layer_types": SLIDING_THEN_FULL, "rope_parameters": NESTED_ROTARY}, sliding=(0,)),
    # mobius takes these for others, or reads less of their configs than there is.
    "vaultgemma": Row("vaultgemma", {**GEMMA, "layer_types": SLIDING_THEN_FULL}, sliding=(0,)),
    "granite-sinks": Row(
        "granite_swa", {**GROUPED, "sliding_window": WINDOW_TOKENS, "layer_types": SLIDING_THEN_FULL}, sliding=(0,)
    ),
    "gpt-neo": Row(
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "window_size": WINDOW_TOKENS, "attention_types": [[["global", "local"], 1]]},
        sliding=(1,),
        rotated_inside=False,
    ),
    "minicpm3": Row("minicpm3", LATENT, rotated_inside=False),  # keys and values of two sizes, cached in latent form
}


@dataclass(frozen=True)
class Traced:
    """A random model whose answers vary, and the graph traced from it."""

    row: Row
    hf_model: Any
    graph: Path
    settings: GenerationSettings


def make_model(model_type: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
        if config.tie_word_embeddings:  # else a token's likeliest successor is itself
            model.get_input_embeddings().weight.mul_(0.2)
    return model.eval()


def settings_of(hf_model: Any) -> GenerationSettings:
    first = probe_layers(hf_model, LAYERS, CONTEXT)[0]
    return GenerationSettings(LAYERS, first.key_value_heads, first.head_size, CONTEXT, WORDS, (), 0)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    row = ARCHITECTURES[request.param]
    hf_model = make_model(row.model_type, row.settings)
    settings = settings_of(hf_model)
    with quiet_exporters():
        model = trace_decoder(hf_model, settings, opset=20)
    return Traced(row, hf_model, save_graph(model, tmp_path_factory.mktemp(request.param)), settings)


def prompts() -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(5, WORDS, length).tolist() for length in PROMPT_LENGTHS]


def answers_of_transformers(hf_model: Any) -> list[list[int]]:
    """Greedy, each prompt alone."""
    answers = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            given = hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(given[0, len(prompt) :].tolist())
    return answers


def greedy(decoder: Decoder, rows: list[list[int]]) -> list[list[int]]:
    decoding = decoder.prefill(rows, room=NEW_TOKENS)
    answers: list[list[int]] = [[] for _ in rows]
    for _ in range(NEW_TOKENS):
        chosen = decoding.logits.argmax(axis=-1)
        for answer, token in zip(answers, chosen.tolist(), strict=True):
            answer.append(token)
        decoding.step(chosen)
    return answers


def test_answers_are_those_of_transformers_alone_and_in_a_ragged_batch(traced: Traced) -> None:
    expected = answers_of_transformers(traced.hf_model)
    assert len({token for answer in expected for token in answer}) > 5, "the model repeats itself: nothing would be compared"
    decoder = Decoder(traced.graph, SessionSettings(), traced.settings)
    assert [greedy(decoder, [prompt])[0] for prompt in prompts()] == expected
    assert greedy(decoder, prompts()) == expected


def test_a_text_that_grows_is_read_on_from_where_it_was(traced: Traced) -> None:
    decoder = Decoder(traced.graph, SessionSettings(), traced.settings)
    whole = prompts()[1]
    expected = decoder.prefill([whole]).logits
    decoder.keep(decoder.prefill([whole[:12]]))
    grown = decoder.prefill([whole])
    assert grown.reused == 12
    np.testing.assert_allclose(grown.logits, expected, atol=1e-4)


def test_the_graph_is_valid_onnx(traced: Traced) -> None:
    onnx.checker.check_model(str(traced.graph))


def test_each_layer_has_one_attention_with_its_window(traced: Traced) -> None:
    nodes = attention_nodes(onnx_ir.load(traced.graph))
    windows = {layer: node.attributes.get_int(WINDOW, -1) for layer, node in nodes.items()}
    assert windows == {layer: WINDOW_TOKENS if layer in traced.row.sliding else -1 for layer in range(LAYERS)}
    assert {bool(node.attributes.get_int("do_rotary", 0)) for node in nodes.values()} == {traced.row.rotated_inside}


def test_every_product_has_a_constant_weight_under_the_name_of_its_parameter(traced: Traced) -> None:
    graph = onnx_ir.load(traced.graph).graph
    products = [node for node in graph if node.op_type in ("MatMul", "Gemm", "FusedMatMul")]
    weights = [node.inputs[1] for node in products if node.inputs[1] is not None and node.inputs[1].const_value is not None]
    parameters = {name for name, value in traced.hf_model.named_parameters() if value.ndim == 2}
    named = [
        name
        for name in (str(weight.name) for weight in weights)
        if name == "lm_head.weight" or name.split("_and_")[0] in parameters
    ]
    assert {node.op_type for node in products} == {"MatMul"}
    assert len(named) == len(weights) >= 3 * LAYERS + 1


def test_tracing_leaves_the_model_as_it_was(traced: Traced) -> None:
    ids = torch.tensor([prompts()[0]])
    again = make_model(traced.row.model_type, traced.row.settings)
    assert traced.hf_model.config._attn_implementation == again.config._attn_implementation
    with torch.inference_mode():
        torch.testing.assert_close(traced.hf_model(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    ("model_type", "settings", "message"),
    [
        ("bloom", {"n_layer": LAYERS, "n_head": 4}, "takes no position_ids"),
        ("mamba", {"state_size": 8}, "takes no position_ids"),
        ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, "does not run on a cache of keys and values alone"),
        (
            "llama",
            {**GROUPED, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "'dynamic' changes",
        ),
        (
            "llama4_text",
            {**HEADS, "num_local_experts": 2, "attention_chunk_size": 8, "moe_layers": [], "intermediate_size_mlp": 128},
            "attends to others than those before it",
        ),
        ("falcon", {}, "0 of them ask for attention"),
    ],
)
def test_what_cannot_be_traced_is_refused(model_type: str, settings: dict[str, Any], message: str) -> None:
    hf_model = make_model(model_type, settings)
    with pytest.raises(ExportError, match=message):
        probe_layers(hf_model, LAYERS, CONTEXT)
    assert hf_model.config._attn_implementation != "hfaccel_cached"


def test_experts_are_refused_in_one_plain_sentence() -> None:
    hf_model = make_model("mixtral", {**GROUPED, "num_local_experts": 2})
    with quiet_exporters(), pytest.raises(ExportError, match="torch cannot export it: No ONNX function found"):
        trace_decoder(hf_model, settings_of(hf_model), opset=20)


def test_layers_with_caches_of_different_shapes_are_refused() -> None:
    hf_model = make_model("llama", GROUPED)
    with pytest.raises(ExportError, match="layer 0 caches 2 heads of 16 channels"):
        trace_decoder(hf_model, GenerationSettings(LAYERS, 4, 16, CONTEXT, WORDS, (), 0), opset=20)

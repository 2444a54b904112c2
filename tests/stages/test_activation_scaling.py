"""Scaling what products read changes no answer of a decoder, and every way to round in blocks makes a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from hfaccel.artifact.generation import GenerationSettings
from hfaccel.evaluate.cached_decoding import empty_past
from hfaccel.quant.awq import scale_by_activations
from hfaccel.quant.build import build_candidate
from hfaccel.quant.observed import CalibrationData
from hfaccel.quant.scheme import matmul_sites
from hfaccel.recipe.schema import Rung
from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import load_graph, save_graph
from hfaccel.rewrites.pack_projections import pack_projections
from hfaccel.rewrites.untie_head import untie_head
from hfaccel.runtime.session import GraphSession
from hfaccel.stages.exporters import quiet_exporters

WORDS, LAYERS, CHANNELS = 90, 2, 96
OUTLIERS = 5, 50
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": CHANNELS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
METHODS = ("hqq", "gptq", "quant-ease", "awq", "awq-quant-ease", "auto-round")


def make_graph(model_type: str, folder: Path, *, packed: bool) -> Path:
    """A tiny random decoder; some channels of norms, values and feed-forward blocks are far larger than the others."""
    import mobius

    torch.manual_seed(0)
    sizes = SIZES if model_type != "gpt2" else {"vocab_size": WORDS, "n_embd": CHANNELS, "n_layer": LAYERS, "n_head": 6}
    config = transformers.AutoConfig.for_model(model_type, **sizes, bos_token_id=None, eos_token_id=None)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.1 if parameter.ndim > 1 else 0.5)
            if parameter.ndim == 1 and name.endswith("weight") and len(parameter) > max(OUTLIERS):  # of a norm of the stream
                parameter[list(OUTLIERS)] = 12
            elif "up_proj" in name or "v_proj" in name:
                parameter[[3, 17]] *= 20
    module.save_pretrained(folder)
    with quiet_exporters():
        model = mobius.build(str(folder), task="text-generation", dtype="f32", execution_provider="cpu")["model"]
    untie_head(model)
    if packed:
        pack_projections(model)
    drop_unused(model)
    return save_graph(model, folder)


def some_feeds(kv_heads: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(1, WORDS, (4, 40))
    past = empty_past(4, GenerationSettings(LAYERS, kv_heads, 16, 64, WORDS, (), 0))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.tile(np.arange(40), (4, 1)), **past}


@pytest.mark.parametrize(
    ("model_type", "packed", "expected"),
    [
        # attention's input and output, and both products of a feed-forward block, of each layer, and the head
        ("llama", False, 4 * LAYERS + 1),
        ("llama", True, 4 * LAYERS + 1),
        ("qwen2", False, 4 * LAYERS + 1),  # with biases
        ("qwen3", True, 4 * LAYERS + 1),
        ("mistral", False, 4 * LAYERS + 1),
        ("gpt2", False, 3 * LAYERS + 1),  # an activation stands before the second product of a feed-forward block
    ],
)
def test_scaling_changes_no_answer(model_type: str, packed: bool, expected: int, tmp_path: Path) -> None:
    graph = make_graph(model_type, tmp_path, packed=packed)
    data = some_feeds(6 if model_type == "gpt2" else 2)
    before = GraphSession(graph).run(data)["logits"]
    model = load_graph(graph)
    rung = Rung(
        name="four", scheme="weight-only", graph="fused", weight_only_bits=4, block_size=32, symmetric=False, method="awq"
    )
    names = [site.node for site in matmul_sites(model)]
    scaled = scale_by_activations(rung, model, names, [data], workdir=tmp_path / "work")
    (tmp_path / "scaled").mkdir()
    after = GraphSession(save_graph(model, tmp_path / "scaled")).run(data)["logits"]
    assert scaled == expected
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_graph("llama", tmp_path_factory.mktemp("llama"), packed=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_round_makes_a_graph_that_answers_nearly_the_same(method: str, llama: Path, tmp_path: Path) -> None:
    data = some_feeds(2)
    fields = {"weight_only_bits": 4, "block_size": 32, "symmetric": False, "method": method, "eight_bit": ("head",)}
    rung = Rung(name="four", scheme="weight-only", graph="fused", **fields)  # type: ignore[arg-type]
    built = build_candidate(rung, llama, CalibrationData([data], {}), weights=WeightFormat(), folder=tmp_path)
    operators = [node.op_type for node in load_graph(built.path).graph]
    assert operators.count("MatMulNBits") == len(built.quantized) == 5 * LAYERS + 1
    assert "MatMul" not in operators
    before, after = (GraphSession(path).run(data)["logits"].ravel() for path in (llama, built.path))
    assert np.corrcoef(before, after)[0, 1] > 0.9

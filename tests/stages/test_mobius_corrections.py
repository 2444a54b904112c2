"""Constructed decoders are corrected after the config, or refused: never wrong beyond a window without a word."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
import transformers

from hfaccel.errors import ExportError
from hfaccel.stages.mobius_corrections import WINDOW, attention_nodes, check_windows, correct_decoder, sliding_windows

SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 200,
}
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {"sliding_window": 8}, {}),  # a stray key: its model reads none
        ("mistral", {"sliding_window": 8}, {0: 8, 1: 8}),
        ("mistral", {"sliding_window": None}, {}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, {1: 8}),
        ("gemma2", {"sliding_window": 8}, {0: 8}),
        ("gemma3_text", {"sliding_window": 8, "layer_types": SLIDING_THEN_FULL}, {0: 8}),
    ],
)
def test_layers_slide_as_the_model_in_torch_does(model_type: str, settings: dict[str, Any], expected: dict[int, int]) -> None:
    assert sliding_windows(transformers.AutoConfig.for_model(model_type, **{**SIZES, **settings})) == expected


def test_attention_of_another_kind_is_refused() -> None:
    config = transformers.Qwen2Config(**SIZES, layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(ExportError, match="layer_types has chunked_attention"):
        sliding_windows(config)


def test_a_sliding_layer_without_a_window_is_refused() -> None:
    config = transformers.Gemma2Config(**SIZES, layer_types=SLIDING_THEN_FULL, sliding_window=8)
    config.sliding_window = None
    with pytest.raises(ExportError, match="layer 0 is of sliding_attention"):
        sliding_windows(config)


@pytest.mark.parametrize(
    ("in_graph", "by_config", "message"),
    [
        ({0: 8, 1: None}, {0: 8, 1: 8}, "layer 1 has a window of 8 tokens, in the graph it has none"),
        ({0: 8, 1: 8}, {0: 8}, "layer 1 has no window, in the graph it has a window of 8"),
        ({0: 4}, {0: 8}, "layer 0 has a window of 8 tokens, in the graph it has a window of 4"),
        ({0: 8}, {0: 8, 1: 8}, "layer 1 has a window of 8 tokens, in the graph it has none"),  # no such operator at all
    ],
)
def test_a_graph_with_other_windows_is_refused(in_graph: dict[int, int | None], by_config: dict[int, int], message: str) -> None:
    nodes = attention_nodes(decoder(in_graph))
    with pytest.raises(ExportError, match=message):
        check_windows(nodes, by_config)


def test_a_graph_whose_sliding_layer_cannot_slide_is_refused() -> None:
    module = gemma3()
    with pytest.raises(ExportError, match="layer 0 has a window of 8 tokens, in the graph it has none"):
        correct_decoder(decoder({1: None}), module)


def test_each_kind_of_layer_gets_its_window_scale_and_rotation() -> None:
    module = gemma3()
    model = decoder({0: None, 1: 8})  # the wrong way round
    correct_decoder(model, module)
    nodes = attention_nodes(model)
    assert {layer: node.attributes.get_int(WINDOW, -1) for layer, node in nodes.items()} == {0: 8, 1: -1}
    assert all(node.attributes.get_float("scale") == pytest.approx(7**-0.5) for node in nodes.values())
    positions = torch.arange(SIZES["max_position_embeddings"])[None]
    for layer, kind in enumerate(SLIDING_THEN_FULL):
        expected = module.hf_model.model.rotary_emb(torch.zeros(1), positions, kind)
        for place, table in zip((7, 8), expected, strict=True):
            half = table[0, :, : table.shape[-1] // 2].numpy()
            np.testing.assert_allclose(constant_of(nodes[layer].inputs[place]), half, atol=1e-5)


def test_the_scale_of_embeddings_is_not_rounded() -> None:
    model = decoder({0: None, 1: None})
    correct_decoder(model, gemma3())
    factor = next(node for node in model.graph if node.op_type == "Mul")
    assert constant_of(factor.inputs[1]) == pytest.approx(24**0.5, rel=1e-6)


def test_rotation_that_changes_with_the_length_is_refused() -> None:
    module = gemma3()
    module.config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    with pytest.raises(ExportError, match="'dynamic' changes with the length"):
        correct_decoder(decoder({0: None, 1: None}), module)


class Source(torch.nn.Module):
    """A transformers model where hfaccel's wrapper has it."""

    def __init__(self, hf_model: Any) -> None:
        super().__init__()
        self.hf_model = hf_model
        self.config: Any = hf_model.config


def gemma3() -> Source:
    """Two layers, the first of which slides; the second rotates half as fast."""
    rotary = {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    config = transformers.Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=8,
        layer_types=SLIDING_THEN_FULL,
        rope_parameters=rotary,
        query_pre_attn_scalar=7,
    )
    return Source(transformers.Gemma3ForCausalLM(config))


def decoder(windows: dict[int, int | None]) -> onnx_ir.Model:
    """What matters here of a constructed decoder: scaled embeddings, and one attention operator a layer, all with one table."""
    table = constant("table", np.zeros((4, 4)))
    ids = onnx_ir.Value(name="input_ids", type=onnx_ir.TensorType(onnx_ir.DataType.INT64), shape=onnx_ir.Shape(["b", "s"]))
    hidden = onnx_ir.node("Gather", [table, ids], name="embed")
    scaled = onnx_ir.node("Mul", [hidden.outputs[0], scale := constant("scale", np.array(4.9))], name="scaled")
    nodes, inputs = [hidden, scaled], [ids]
    for layer, window in windows.items():
        past = [onnx_ir.Value(name=f"past_key_values.{layer}.{part}") for part in ("key", "value")]
        attributes = {"scale": 0.5, "do_rotary": 1, **({} if window is None else {WINDOW: window})}
        operands = [scaled.outputs[0], None, None, *past, None, None, table, table]
        nodes.append(onnx_ir.node("GroupQueryAttention", operands, attributes, domain="com.microsoft", name=f"layer_{layer}"))
        inputs.extend(past)
    for node in nodes:
        node.outputs[0].name = f"{node.name}_value"
    graph = onnx_ir.Graph(inputs, nodes[-1].outputs, nodes=nodes, initializers=[table, scale], opset_imports={"": 20})
    return onnx_ir.Model(graph, ir_version=10)


def constant(name: str, array: np.ndarray) -> onnx_ir.Value:
    return onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array.astype(np.float32), name=name))


def constant_of(value: onnx_ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()

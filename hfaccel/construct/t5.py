"""T5 and mT5: no biases, norms without a mean, and scores that depend on how far tokens are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.construct.attention import CacheReading, Heads, attend_cache, attend_encoder, attend_text, padding_mask, read_cache
from hfaccel.construct.builder import CONTRIB, GraphBuilder

if TYPE_CHECKING:
    import onnx_ir


def construct_t5(hf_model: Any) -> onnx_ir.Model:
    """The graph of a T5 model; see :func:`hfaccel.construct.construct_encoder_decoder`."""
    config = hf_model.config
    graph = GraphBuilder(hf_model)

    ids = graph.input("input_ids", ("batch", "sequence"))
    mask = padding_mask(graph, graph.input("attention_mask", ("batch", "sequence")))
    encoded = _encode(graph, ids, mask, hf_model)

    answer_ids, reading = read_cache(graph)
    hidden = _decode(graph, answer_ids, encoded, mask, reading, hf_model)
    if _scales_output(config):
        hidden = graph.node("Mul", hidden, graph.constant("output_scale", np.float32(config.d_model**-0.5)))
    graph.output(graph.linear(hidden, hf_model.lm_head), "logits", ("batch", "decoder_sequence", int(config.vocab_size)))
    return graph.model()


def _encode(graph: GraphBuilder, ids: onnx_ir.Value, mask: onnx_ir.Value, hf_model: Any) -> onnx_ir.Value:
    stack = hf_model.encoder
    length = graph.node("Gather", graph.node("Shape", ids), graph.integer(1))
    places = graph.node("Range", graph.integer(0), length, graph.integer(1))
    row = graph.node("Unsqueeze", places, graph.integers(0))
    bias = _distance_bias(graph, stack, graph.node("Unsqueeze", row, graph.integers(2)), row, bidirectional=True)
    total, pending = graph.node("Gather", graph.parameter(stack.embed_tokens), ids), None
    for block in stack.block:
        attention, feed_forward = block.layer
        normed, total = _normed(graph, total, pending, attention.layer_norm)
        projections, heads = _attention(attention.SelfAttention)
        made = attend_text(graph, normed, projections, heads, mask=mask, bias=bias)
        pending = graph.linear(made, attention.SelfAttention.o)
        normed, total = _normed(graph, total, pending, feed_forward.layer_norm)
        pending = _feed_forward(graph, normed, feed_forward.DenseReluDense, hf_model.config)
    return _normed(graph, total, pending, stack.final_layer_norm)[0]


def _decode(
    graph: GraphBuilder,
    ids: onnx_ir.Value,
    encoded: onnx_ir.Value,
    mask: onnx_ir.Value,
    reading: CacheReading,
    hf_model: Any,
) -> onnx_ir.Value:
    stack = hf_model.decoder
    width = graph.node("Cast", reading.total, to=7)
    places = graph.node("Unsqueeze", graph.node("Range", graph.integer(0), width, graph.integer(1)), graph.integers(0))
    bias = _distance_bias(
        graph, stack, graph.node("Unsqueeze", reading.positions, graph.integers(2)), places, bidirectional=False
    )
    total, pending = graph.node("Gather", graph.parameter(stack.embed_tokens), ids), None
    for layer, block in enumerate(stack.block):
        attention, crossing, feed_forward = block.layer
        normed, total = _normed(graph, total, pending, attention.layer_norm)
        projections, heads = _attention(attention.SelfAttention)
        made = attend_cache(graph, normed, projections, heads, layer, reading, bias=bias)
        pending = graph.linear(made, attention.SelfAttention.o)
        normed, total = _normed(graph, total, pending, crossing.layer_norm)
        projections, heads = _attention(crossing.EncDecAttention)
        made = attend_encoder(graph, normed, encoded, projections, heads, layer, mask=mask)
        pending = graph.linear(made, crossing.EncDecAttention.o)
        normed, total = _normed(graph, total, pending, feed_forward.layer_norm)
        pending = _feed_forward(graph, normed, feed_forward.DenseReluDense, hf_model.config)
    return _normed(graph, total, pending, stack.final_layer_norm)[0]


def _distance_bias(
    graph: GraphBuilder, stack: Any, queries: onnx_ir.Value, keys: onnx_ir.Value, *, bidirectional: bool
) -> onnx_ir.Value:
    """What is added to scores [batch, heads, queries, keys], by how far a key is from a query; far ones are all alike.

    Args:
        graph: being written.
        stack: encoder or decoder; its first layer has the table.
        queries: places int64 [batch, queries, 1].
        keys: places int64 [1, keys].
        bidirectional: keys may come after queries.
    """
    import torch

    attention = stack.block[0].layer[0].SelfAttention
    farthest = int(attention.relative_attention_max_distance)
    distances = torch.arange(-farthest, farthest + 1 if bidirectional else 1)
    buckets = attention._relative_position_bucket(
        distances,
        bidirectional=bidirectional,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    by_distance = attention.relative_attention_bias.weight.detach().float()[buckets].numpy()
    table = graph.constant(f"{graph.name_of(attention)}.bias_by_distance", by_distance)
    apart = graph.node("Sub", graph.node("Unsqueeze", keys, graph.integers(1)), queries)
    nearest = graph.node("Clip", apart, graph.integer(-farthest), graph.integer(farthest if bidirectional else 0))
    bias = graph.node("Gather", table, graph.node("Add", nearest, graph.integer(farthest)))
    return graph.node("Transpose", bias, perm=[0, 3, 1, 2])


def _normed(
    graph: GraphBuilder, total: onnx_ir.Value, added: onnx_ir.Value | None, module: Any
) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """The norm of the sum, and the sum."""
    scale, epsilon, name = graph.parameter(module), float(module.variance_epsilon), graph.name_of(module)
    if added is None:
        return graph.rms_norm(total, scale, epsilon), total
    normed, _, _, summed = graph.nodes(
        "SkipSimplifiedLayerNormalization", added, total, scale, outputs=4, name=name, domain=CONTRIB, epsilon=epsilon
    )
    return normed, summed


def _feed_forward(graph: GraphBuilder, value: onnx_ir.Value, module: Any, config: Any) -> onnx_ir.Value:
    if not config.is_gated_act:
        return graph.linear(graph.activation(graph.linear(value, module.wi), config.dense_act_fn), module.wo)
    gate, content = graph.nodes("Split", graph.linear(value, module.wi_0, module.wi_1), outputs=2, axis=-1, num_outputs=2)
    return graph.linear(graph.node("Mul", graph.activation(gate, config.dense_act_fn), content), module.wo)


def _attention(module: Any) -> tuple[tuple[Any, Any, Any], Heads]:
    """Scores are not scaled: the initial weights are."""
    return (module.q, module.k, module.v), Heads(int(module.n_heads), int(module.key_value_proj_dim), 1.0)


def _scales_output(config: Any) -> bool:
    """Whether logits are scaled down, as T5 with a tied head does; mT5 has no such word in its config and never does."""
    return bool(getattr(config, "scale_decoder_outputs", False))

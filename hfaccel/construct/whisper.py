"""Whisper: log-mel features of a window of sound in, text out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.construct.attention import read_cache
from hfaccel.construct.builder import GraphBuilder
from hfaccel.construct.transformer import LayerWriter

if TYPE_CHECKING:
    import onnx_ir


def construct_whisper(hf_model: Any) -> onnx_ir.Model:
    """The graph of a Whisper model; see :func:`hfaccel.construct.construct_encoder_decoder`. ``frames`` is fixed by the model."""
    config = hf_model.config
    graph = GraphBuilder(hf_model)
    layers = LayerWriter(graph, norm_first=True, activation=config.activation_function)
    encoder, decoder = hf_model.model.encoder, hf_model.model.decoder

    frames = 2 * int(config.max_source_positions)
    features = graph.input("input_features", ("batch", int(config.num_mel_bins), frames), floating=True)
    hidden = _convolve(graph, _convolve(graph, features, encoder.conv1), encoder.conv2)
    hidden = graph.node("Transpose", hidden, perm=[0, 2, 1])
    hidden = graph.node("Add", hidden, graph.parameter(encoder.embed_positions))
    encoded = layers.encoder(hidden, encoder, mask=None)

    ids, reading = read_cache(graph)
    tokens = graph.node("Gather", graph.parameter(decoder.embed_tokens), ids)
    if config.scale_embedding:
        tokens = graph.node("Mul", tokens, graph.constant("embedding_scale", np.float32(math.sqrt(config.d_model))))
    positions = graph.node("Gather", graph.parameter(decoder.embed_positions), reading.positions)
    answer = layers.decoder(graph.node("Add", tokens, positions), encoded, decoder, reading, mask=None)
    graph.output(graph.linear(answer, hf_model.proj_out), "logits", ("batch", "decoder_sequence", int(config.vocab_size)))
    return graph.model()


def _convolve(graph: GraphBuilder, value: onnx_ir.Value, module: Any) -> onnx_ir.Value:
    """A convolution over time [batch, channels, frames] and its activation."""
    made = graph.node(
        "Conv", value, graph.parameter(module), graph.parameter(module, "bias"), name=graph.name_of(module),
        kernel_shape=list(module.kernel_size), strides=list(module.stride), pads=list(module.padding) * 2,
    )  # fmt: skip
    return graph.activation(made, "gelu")

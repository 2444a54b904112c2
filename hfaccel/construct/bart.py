"""BART, MBart, Marian, Pegasus, Blenderbot and M2M-100 (NLLB): text in, text out, learned or sinusoidal positions from tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.construct.attention import padding_mask, read_cache
from hfaccel.construct.builder import GraphBuilder
from hfaccel.construct.transformer import LayerWriter
from hfaccel.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir

_NORM_FIRST = ("blenderbot", "m2m_100", "mbart", "pegasus")


def construct_bart(hf_model: Any) -> onnx_ir.Model:
    """The graph of a model of this family; see :func:`hfaccel.construct.construct_encoder_decoder`."""
    config = hf_model.config
    graph = GraphBuilder(hf_model)
    layers = LayerWriter(graph, config.model_type in _NORM_FIRST, config.activation_function)
    encoder, decoder = hf_model.model.encoder, hf_model.model.decoder

    ids = graph.input("input_ids", ("batch", "sequence"))
    mask = padding_mask(graph, graph.input("attention_mask", ("batch", "sequence")))
    length = graph.node("Gather", graph.node("Shape", ids), graph.integer(1))
    places = graph.node("Range", graph.integer(0), length, graph.integer(1))
    encoded = layers.encoder(_embed(graph, ids, places, encoder, config), encoder, mask=mask)

    answer_ids, reading = read_cache(graph)
    embedded = _embed(graph, answer_ids, reading.positions, decoder, config)
    hidden = layers.decoder(embedded, encoded, decoder, reading, mask=mask)
    logits = graph.linear(hidden, hf_model.lm_head)
    bias = getattr(hf_model, "final_logits_bias", None)  # M2M-100 has none
    if bias is not None and bool(bias.any()):
        logits = graph.node("Add", logits, graph.constant("final_logits_bias", bias.detach().float().numpy()[0]))
    graph.output(logits, "logits", ("batch", "decoder_sequence", int(config.vocab_size)))
    return graph.model()


def _embed(graph: GraphBuilder, ids: onnx_ir.Value, places: onnx_ir.Value, stack: Any, config: Any) -> onnx_ir.Value:
    """Tokens and their places."""
    tokens = graph.node("Gather", graph.parameter(stack.embed_tokens), ids)
    if config.scale_embedding:
        tokens = graph.node("Mul", tokens, graph.constant("embedding_scale", np.float32(math.sqrt(config.d_model))))
    table = graph.constant(f"{graph.name_of(stack.embed_positions)}.weight", _table(stack.embed_positions, config))
    positions = graph.node("Gather", table, places)
    total = graph.node("Add", tokens, positions)
    norm = getattr(stack, "layernorm_embedding", None)
    return total if norm is None else graph.layer_norm(total, norm)


def _table(module: Any, config: Any) -> np.ndarray:
    """What is added at each place [places, channels]; the modules count their places from an offset."""
    if config.model_type == "m2m_100":  # computed, not learned, and as long as it is asked to be
        if config.decoder_start_token_id == module.padding_idx:
            raise ExportError(
                f"an answer begins with the padding token {module.padding_idx}, which this architecture gives no place",
                where="exporter constructed",
                hint="M2M-100 and NLLB pad with token 1 and begin with 2: correct config.json",
            )
        first = int(module.padding_idx) + 1
        computed: np.ndarray = module.weights.detach().float().numpy()[first : first + int(config.max_position_embeddings)]
        return computed
    learned: np.ndarray = module.weight.detach().float().numpy()[int(getattr(module, "offset", 0)) :]
    return learned

"""Attention of encoder-decoders: the encoder's over a text, the decoder's over its own cache and over the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfaccel.construct.builder import CONTRIB, GraphBuilder

if TYPE_CHECKING:
    import onnx_ir
    import torch

    Projections = Sequence[torch.nn.Module]


@dataclass(frozen=True)
class Heads:
    """How an attention is cut: number of heads, channels of each, and what scores are multiplied by."""

    count: int
    size: int
    scale: float


@dataclass(frozen=True)
class CacheReading:
    """What all layers of a decoder share.

    Attributes:
        last_places: int32 [batch], of each row the place of its last token.
        total: int32 scalar, width of the mask.
        positions: int64 [batch, decoder_sequence].
    """

    last_places: onnx_ir.Value
    total: onnx_ir.Value
    positions: onnx_ir.Value


def read_cache(graph: GraphBuilder) -> tuple[onnx_ir.Value, CacheReading]:
    """The decoder's inputs: token ids [batch, decoder_sequence], and where they are in their rows."""
    import onnx_ir

    ids = graph.input("decoder_input_ids", ("batch", "decoder_sequence"))
    mask = graph.input("decoder_attention_mask", ("batch", "decoder_total"))
    positions = graph.input("decoder_position_ids", ("batch", "decoder_sequence"))
    length = graph.node("ReduceSum", mask, graph.integers(1), keepdims=0)
    last = graph.node("Sub", length, graph.integer(1))
    width = graph.node("Gather", graph.node("Shape", mask), graph.integer(1))
    kind = int(onnx_ir.DataType.INT32)
    return ids, CacheReading(graph.node("Cast", last, to=kind), graph.node("Cast", width, to=kind), positions)


def padding_mask(graph: GraphBuilder, mask: onnx_ir.Value) -> onnx_ir.Value:
    """int32 [batch, sequence], as the attention operator reads it."""
    import onnx_ir

    return graph.node("Cast", mask, to=int(onnx_ir.DataType.INT32))


def attend_text(
    graph: GraphBuilder,
    value: onnx_ir.Value,
    projections: Projections,
    heads: Heads,
    *,
    mask: onnx_ir.Value | None,
    bias: onnx_ir.Value | None = None,
) -> onnx_ir.Value:
    """Attention of every token to every token.

    Args:
        graph: being written.
        value: [batch, sequence, channels].
        projections: of query, key and value.
        heads: of the attention.
        mask: int32 [batch, sequence], or None where nothing is padded.
        bias: [1, heads, sequence, sequence], added to the scores.
    """
    packed = graph.linear(value, *projections)
    sizes = graph.integers(*[heads.count * heads.size] * 3)
    query, key, content = graph.nodes("Split", packed, sizes, outputs=3, axis=-1)
    return graph.nodes(
        "MultiHeadAttention", query, key, content, None, mask, bias,
        name=f"{graph.name_of(projections[0])}_attention", domain=CONTRIB, num_heads=heads.count, scale=heads.scale,
    )[0]  # fmt: skip


def attend_cache(
    graph: GraphBuilder,
    value: onnx_ir.Value,
    projections: Projections,
    heads: Heads,
    layer: int,
    reading: CacheReading,
    *,
    bias: onnx_ir.Value | None = None,
) -> onnx_ir.Value:
    """Attention of new tokens to themselves and those before, whose keys and values are in the cache of the layer.

    Args:
        graph: being written.
        value: [batch, decoder_sequence, channels].
        projections: of query, key and value.
        heads: of the attention.
        layer: names its past and present.
        reading: of the cache.
        bias: [batch, heads, decoder_sequence, decoder_total], added to the scores.
    """
    shape = ("batch", heads.count, "past_sequence", heads.size)
    past = [graph.input(f"past_key_values.{layer}.{part}", shape, floating=True) for part in ("key", "value")]
    packed = graph.linear(value, *projections)
    attended, *present = graph.nodes(
        "GroupQueryAttention", packed, None, None, *past, reading.last_places, reading.total, None, None, None, bias,
        outputs=3, name=f"{graph.name_of(projections[0])}_attention", domain=CONTRIB,
        num_heads=heads.count, kv_num_heads=heads.count, scale=heads.scale,
    )  # fmt: skip
    for part, item in zip(("key", "value"), present, strict=True):
        graph.output(item, f"present.{layer}.{part}", ("batch", heads.count, "total_sequence", heads.size))
    return attended


def attend_encoder(
    graph: GraphBuilder,
    value: onnx_ir.Value,
    encoded: onnx_ir.Value,
    projections: Projections,
    heads: Heads,
    layer: int,
    *,
    mask: onnx_ir.Value | None,
) -> onnx_ir.Value:
    """Attention of new tokens to what the encoder made of the source; its keys and values do not depend on the new tokens.

    Args:
        graph: being written.
        value: [batch, decoder_sequence, channels].
        encoded: [batch, sequence, channels] of the encoder.
        projections: of query, key and value.
        heads: of the attention.
        layer: names the keys and values, ``cross.n.key`` and ``cross.n.value``.
        mask: int32 [batch, sequence], or None where nothing is padded.
    """
    crossing = []
    for part, module in zip(("key", "value"), projections[1:], strict=True):
        split = graph.node("Reshape", graph.linear(encoded, module), graph.integers(0, 0, heads.count, heads.size))
        crossing.append(graph.node("Transpose", split, perm=[0, 2, 1, 3]))
        graph.output(crossing[-1], f"cross.{layer}.{part}", ("batch", heads.count, "encoded_sequence", heads.size))
    query = graph.linear(value, projections[0])
    return graph.nodes(
        "MultiHeadAttention", query, *crossing, None, mask,
        name=f"{graph.name_of(projections[0])}_attention", domain=CONTRIB, num_heads=heads.count, scale=heads.scale,
    )[0]  # fmt: skip

"""Layers that BART and its kin (see :mod:`hfaccel.construct.bart`) and Whisper have in common: biases everywhere, layer norms before or after each part."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfaccel.construct.attention import CacheReading, Heads, attend_cache, attend_encoder, attend_text
from hfaccel.construct.builder import GraphBuilder

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir

    Part = Callable[[onnx_ir.Value], onnx_ir.Value]


@dataclass(frozen=True)
class Stream:
    """What flows from part to part.

    Attributes:
        total: the sum of the parts so far, normed where norms come after the parts.
        pending: what the last part made, where the next norm adds it.
    """

    total: onnx_ir.Value
    pending: onnx_ir.Value | None = None


@dataclass(frozen=True)
class LayerWriter:
    """Writes layers into a graph.

    Attributes:
        graph: being written.
        norm_first: a part reads the norm of the sum (MBart, Pegasus, Blenderbot, M2M-100, Whisper); else each sum is normed at once (BART, Marian).
        activation: transformers' name.
    """

    graph: GraphBuilder
    norm_first: bool
    activation: str

    def encoder(self, value: onnx_ir.Value, encoder: Any, *, mask: onnx_ir.Value | None) -> onnx_ir.Value:
        """All layers of an encoder, and its last norm where it has one."""
        stream = Stream(value)
        for layer in encoder.layers:
            own = layer.self_attn
            attend = functools.partial(attend_text, self.graph, projections=_projections(own), heads=_heads(own), mask=mask)
            stream = self._part(stream, layer.self_attn_layer_norm, attend, own.out_proj)
            stream = self._feed_forward(stream, layer)
        return self._finished(stream, encoder)

    def decoder(
        self, value: onnx_ir.Value, encoded: onnx_ir.Value, decoder: Any, reading: CacheReading, *, mask: onnx_ir.Value | None
    ) -> onnx_ir.Value:
        """All layers of a decoder, and its last norm where it has one."""
        stream = Stream(value)
        for number, layer in enumerate(decoder.layers):
            own, crossing = layer.self_attn, layer.encoder_attn
            attend = functools.partial(
                attend_cache, self.graph, projections=_projections(own), heads=_heads(own), layer=number, reading=reading
            )
            stream = self._part(stream, layer.self_attn_layer_norm, attend, own.out_proj)
            attend = functools.partial(
                attend_encoder,
                self.graph,
                encoded=encoded,
                projections=_projections(crossing),
                heads=_heads(crossing),
                layer=number,
                mask=mask,
            )
            stream = self._part(stream, layer.encoder_attn_layer_norm, attend, crossing.out_proj)
            stream = self._feed_forward(stream, layer)
        return self._finished(stream, decoder)

    def _finished(self, stream: Stream, stack: Any) -> onnx_ir.Value:
        return self._read(stream, stack.layer_norm)[0] if self.norm_first else stream.total

    def _feed_forward(self, stream: Stream, layer: Any) -> Stream:
        def widened(value: onnx_ir.Value) -> onnx_ir.Value:
            return self.graph.activation(self.graph.linear(value, layer.fc1), self.activation)

        return self._part(stream, layer.final_layer_norm, widened, layer.fc2)

    def _part(self, stream: Stream, norm: Any, part: Part, last: Any) -> Stream:
        """One attention or feed-forward network, with its norm and its sum."""
        if self.norm_first:
            normed, total = self._read(stream, norm)
            return Stream(total, self.graph.linear(part(normed), last))
        made = self.graph.linear(part(stream.total), last)
        return Stream(self.graph.added_layer_norm(stream.total, made, norm)[0])

    def _read(self, stream: Stream, norm: Any) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """The norm of the sum, and the sum."""
        if stream.pending is None:
            return self.graph.layer_norm(stream.total, norm), stream.total
        return self.graph.added_layer_norm(stream.total, stream.pending, norm)


def _heads(module: Any) -> Heads:
    size = int(module.head_dim)
    return Heads(int(module.num_heads), size, size**-0.5)


def _projections(module: Any) -> tuple[Any, Any, Any]:
    return module.q_proj, module.k_proj, module.v_proj

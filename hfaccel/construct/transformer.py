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
        for layer in encoder.layers:
            own = layer.self_attn
            attend = functools.partial(attend_text, self.graph, projections=_projections(own), heads=_heads(own), mask=mask)
            value = self._part(value, layer.self_attn_layer_norm, attend, own.out_proj)
            value = self._feed_forward(value, layer)
        return self._finished(value, encoder)

    def decoder(
        self, value: onnx_ir.Value, encoded: onnx_ir.Value, decoder: Any, reading: CacheReading, *, mask: onnx_ir.Value | None
    ) -> onnx_ir.Value:
        """All layers of a decoder, and its last norm where it has one."""
        for number, layer in enumerate(decoder.layers):
            own, crossing = layer.self_attn, layer.encoder_attn
            attend = functools.partial(
                attend_cache, self.graph, projections=_projections(own), heads=_heads(own), layer=number, reading=reading
            )
            value = self._part(value, layer.self_attn_layer_norm, attend, own.out_proj)
            attend = functools.partial(
                attend_encoder,
                self.graph,
                encoded=encoded,
                projections=_projections(crossing),
                heads=_heads(crossing),
                layer=number,
                mask=mask,
            )
            value = self._part(value, layer.encoder_attn_layer_norm, attend, crossing.out_proj)
            value = self._feed_forward(value, layer)
        return self._finished(value, decoder)

    def _finished(self, value: onnx_ir.Value, stack: Any) -> onnx_ir.Value:
        return self.graph.layer_norm(value, stack.layer_norm) if self.norm_first else value

    def _feed_forward(self, value: onnx_ir.Value, layer: Any) -> onnx_ir.Value:
        def widened(value: onnx_ir.Value) -> onnx_ir.Value:
            return self.graph.activation(self.graph.linear(value, layer.fc1), self.activation)

        return self._part(value, layer.final_layer_norm, widened, layer.fc2)

    def _part(self, value: onnx_ir.Value, norm: Any, part: Part, last: Any) -> onnx_ir.Value:
        """One attention or feed-forward network, with its norm and its sum.

        Sum and norm are two nodes: they take a quarter of the time of onnxruntime's one (``SkipLayerNormalization``).
        """
        read = self.graph.layer_norm(value, norm) if self.norm_first else value
        total = self.graph.node("Add", self.graph.linear(part(read), last), value, name=f"{self.graph.name_of(last)}.sum")
        return total if self.norm_first else self.graph.layer_norm(total, norm)


def _heads(module: Any) -> Heads:
    size = int(module.head_dim)
    return Heads(int(module.num_heads), size, size**-0.5)


def _projections(module: Any) -> tuple[Any, Any, Any]:
    return module.q_proj, module.k_proj, module.v_proj

"""Attention of a decoder writes down the scores of all new tokens at once, in place of block by block.

    GroupQueryAttention(...)  ->  GroupQueryAttention(..., head_sink)

From version 1.27 on onnxruntime's ``GroupQueryAttention`` computes several new tokens block by block (FlashAttention), which saves memory and,
on the processors that this was measured on, no time: on two cores with AVX-512 all of SmolLM2-135M takes 295 ms in place of 405 for a
prompt of 512 tokens without the blocks, 69 in place of 76 for 128, and as long with AVX2. An operator with a *sink*, one more score that a
head may give weight to, is computed without blocks; a sink of the lowest number gets none. Exact but for the order of summation.

Scores of a long prompt would take much memory so: the run time reads it in pieces (:mod:`hfaccel.runtime.generation.decoding`). A single token
takes 1.03 times as long without blocks (up to 1,024 tokens), so a graph that only takes steps, beside one for prompts, goes back to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.graphs import shared_initializer

if TYPE_CHECKING:
    import onnx_ir

_SINK = 11
"""Place among the inputs of ``GroupQueryAttention``, which has no other name for it."""
_LOWEST = np.finfo(np.float32).min


def score_at_once(model: onnx_ir.Model) -> int:
    """Give a sink without weight to each attention that has none and looks at all tokens before; returns their number."""
    chosen = [node for node in model.graph if node.op_type == "GroupQueryAttention" and _takes_blocks(node)]
    for node in chosen:
        heads = node.attributes.get_int("num_heads", 0)
        sink = np.full(heads, _LOWEST, dtype=np.float32)
        node.resize_inputs(max(len(node.inputs), _SINK + 1))
        node.replace_input_with(_SINK, shared_initializer(model, f"no_sink_of_{heads}_heads", sink))
    return len(chosen)


def score_in_blocks(model: onnx_ir.Model) -> int:
    """The inverse of :func:`score_at_once`; returns how many attentions lost their sink."""
    chosen = [node for node in model.graph if node.op_type == "GroupQueryAttention" and _has_sink_without_weight(node)]
    for node in chosen:
        node.replace_input_with(_SINK, None)
        node.resize_inputs(1 + max(place for place, value in enumerate(node.inputs) if value is not None))
    return len(chosen)


def scores_at_once(model: onnx_ir.Model) -> bool:
    """Whether :func:`score_at_once` changed something in a graph."""
    return any(node.op_type == "GroupQueryAttention" and _has_sink_without_weight(node) for node in model.graph)


def _has_sink_without_weight(node: onnx_ir.Node) -> bool:
    sink = node.inputs[_SINK] if len(node.inputs) > _SINK else None
    return sink is not None and sink.const_value is not None and bool((sink.const_value.numpy() == _LOWEST).all())


def _takes_blocks(node: onnx_ir.Node) -> bool:
    has_sink = len(node.inputs) > _SINK and node.inputs[_SINK] is not None
    # Where attention looks at a window only, blocks outside of it are left out.
    return (
        not has_sink
        and node.attributes.get_int("local_window_size", -1) <= 0
        and not node.attributes.get_int("smooth_softmax", 0)
    )

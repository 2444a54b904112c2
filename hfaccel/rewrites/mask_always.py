"""Attention reads its mask always, for an engine to which a branch costs more than the mask.

    If(every token counts): MultiHeadAttention(query, key, value), else: MultiHeadAttention(query, key, value, mask)
    MultiHeadAttention(query, key, value, mask)

The inverse of what the fusion ``attention`` adds for onnxruntime. OpenVINO cannot fuse across a branch: on two cores with VNNI attention
takes 9 ms a text batch of 8 x 128 tokens (MiniLM) in place of 15 with the branch, and of 40 as it was exported. Exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.fuse_attention import ATTENTION
from hfaccel.rewrites.graphs import take_over

if TYPE_CHECKING:
    import onnx_ir

_BRANCHES = ("then_branch", "else_branch")


def mask_always(model: onnx_ir.Model) -> int:
    """Replace every choice between attention with and without the mask by the one with it; returns their number."""
    import onnx_ir

    chosen = [(node, masked) for node in model.graph if (masked := _masked(node)) is not None]
    for node, masked in chosen:
        made = onnx_ir.node(ATTENTION, masked.inputs, dict(masked.attributes), domain=masked.domain, name=node.name)
        model.graph.insert_before(node, made)
        take_over(node, made.outputs[0])
        _forget(node)
    if chosen:
        drop_unused(model)
    return len(chosen)


def _forget(choice: onnx_ir.Node) -> None:
    """Nodes inside of one that was removed would still count as readers of what they read outside."""
    for name in _BRANCHES:
        for inner in choice.attributes[name].as_graph():
            for place in range(len(inner.inputs)):
                inner.replace_input_with(place, None)


def _masked(node: onnx_ir.Node) -> onnx_ir.Node | None:
    """The attention with the mask, where the node chooses between one with and one without."""
    if node.op_type != "If":
        return None
    complete, padded = (list(node.attributes[name].as_graph()) for name in _BRANCHES)
    if [part.op_type for part in (*complete, *padded)] != [ATTENTION, ATTENTION]:
        return None
    return padded[0] if complete[0].inputs[:3] == padded[0].inputs[:3] else None

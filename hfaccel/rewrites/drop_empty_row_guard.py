"""Drop the selection that zeroes the attention of tokens which may look at nothing.

PyTorch defines the attention of a row that is masked entirely as zero, and the exporter writes that down: a ``Where`` over
[batch, heads, sequence, head size] in every layer. In an encoder that masks padding only, such a row exists only in a text without
a single token, and there is none: tokenizers add at least their special tokens. Windowed attention is another matter, so it is
found out by running the condition: for masks that leave one token only, first, middle or last, of a text longer than windows
are. More tokens can only make fewer rows empty.

Exact for every text with a token in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.probe import ancestors, reads_more_than_shapes, run_part

if TYPE_CHECKING:
    import onnx_ir

_LENGTH = 1100
"""Tokens; windows of local attention are some hundred wide."""


def drop_empty_row_guard(model: onnx_ir.Model) -> int:
    """Remove every ``Where(empty row, 0, x)`` whose condition never holds for a text with a token; returns their number."""
    verdicts: dict[onnx_ir.Value, bool] = {}
    return sum(_drop(model, node, verdicts) for node in list(model.graph) if node.op_type == "Where")


def _drop(model: onnx_ir.Model, guard: onnx_ir.Node, verdicts: dict[onnx_ir.Value, bool]) -> int:
    from onnx_ir.convenience import replace_all_uses_with

    condition, zeros, kept = guard.inputs
    if condition is None or zeros is None or kept is None or guard.outputs[0].is_graph_output():
        return 0
    if (
        zeros.const_value is None
        or zeros.const_value.size != 1
        or zeros.const_value.numpy().item() != 0
        or not _is_computed(kept)
    ):
        return 0
    if condition not in verdicts:
        verdicts[condition] = _never_holds(model, condition)
    if not verdicts[condition]:
        return 0
    replace_all_uses_with(guard.outputs[0], kept)
    model.graph.remove(guard, safe=True)
    return 1


def _is_computed(value: onnx_ir.Value) -> bool:
    return value.const_value is None and value.producer() is not None


def _never_holds(model: onnx_ir.Model, condition: onnx_ir.Value) -> bool:
    nodes = ancestors(condition, model.graph.inputs)
    mask = next((value for value in model.graph.inputs if value.name == "attention_mask"), None)
    if nodes is None or mask is None or not any(mask in node.inputs for node in nodes):
        return False
    if reads_more_than_shapes(nodes, [value for value in model.graph.inputs if value is not mask]):
        return False  # it depends on the tokens too
    one_token = np.zeros((3, _LENGTH), dtype=np.int64)
    one_token[[0, 1, 2], [0, _LENGTH // 2, _LENGTH - 1]] = 1
    feeds = {value: one_token if value is mask else np.zeros_like(one_token) for value in model.graph.inputs}
    held = run_part(model, condition, feeds, nodes)
    return held is not None and not held.any()

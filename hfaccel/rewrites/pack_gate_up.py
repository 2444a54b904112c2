"""A gated feed-forward block computes its two projections of one value in one product.

    x -> MatMul(gate) -> activation -> Mul        x -> MatMul([gate up]) -> Split -> activation -> Mul
    x -> MatMul(up) -----------------> Mul

Exact, and for a single token less is lost on starting and ending the work of the threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.graphs import new_initializer

if TYPE_CHECKING:
    import onnx_ir

PACKED_SUFFIX = "_and_up"


def pack_gate_up(model: onnx_ir.Model) -> int:
    """Pack all pairs of products without biases, of equal widths, that read the same value; returns how many pairs."""
    pairs: dict[onnx_ir.Value, list[onnx_ir.Node]] = {}
    for node in model.graph:
        source = node.inputs[0] if node.op_type == "MatMul" and node.domain in ("", "ai.onnx") else None
        weight = node.inputs[1] if source is not None else None
        if source is not None and weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2:
            pairs.setdefault(source, []).append(node)
    return sum(_pack(model, source, pair) for source, pair in pairs.items() if len(pair) == 2)


def _pack(model: onnx_ir.Model, source: onnx_ir.Value, pair: list[onnx_ir.Node]) -> int:
    import onnx_ir
    from onnx_ir.convenience import replace_all_uses_with

    gate, up = (_array(node.inputs[1]) for node in pair)
    if gate.shape != up.shape or gate.dtype != up.dtype or any(node.outputs[0].is_graph_output() for node in pair):
        return 0
    name, width = f"{pair[0].name}{PACKED_SUFFIX}", int(gate.shape[1])
    first = pair[0].inputs[1]
    assert first is not None  # the caller saw it
    weight = new_initializer(model, f"{first.name}{PACKED_SUFFIX}", np.concatenate([gate, up], axis=1))
    product = onnx_ir.node("MatMul", [source, weight], name=name)
    product.outputs[0].name = f"{name}_output"
    sizes = new_initializer(model, f"{name}_sizes", np.array([width, width], dtype=np.int64))
    split = onnx_ir.node("Split", [product.outputs[0], sizes], {"axis": -1}, num_outputs=2, name=f"{name}_split")
    model.graph.insert_before(pair[0], [product, split])
    for number, old in enumerate(pair):
        part = split.outputs[number]
        part.name, part.type, part.shape = f"{name}_part_{number}", old.outputs[0].type, old.outputs[0].shape
        replace_all_uses_with(old.outputs[0], part)
    model.graph.remove(pair, safe=True)
    return 1


def _array(value: onnx_ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None  # the caller saw it
    return value.const_value.numpy()

"""Make one Transpose of a chain of Reshapes and Transposes that does no more than that.

The key of an attention is exported as Transpose, Reshape to rank 3, Transpose, Reshape back: it is moved through memory twice to
end up where one Transpose puts it. Whether a chain is a Transpose is found by running it on numbered elements, with two
choices for the free dimensions: what such a chain does depends on the dimensions alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.probe import ancestors, reads_more_than_shapes, run_part

if TYPE_CHECKING:
    import onnx_ir

_LAYOUT = ("Reshape", "Transpose")
_FREE_SIZES = ((2, 3, 7, 11, 17, 19, 23, 29, 31), (5, 13, 3, 2, 29, 23, 19, 37, 41))
_LARGEST_RANK = 4


def merge_transposes(model: onnx_ir.Model) -> int:
    """Replace chains with several Transposes by one; returns how many chains."""
    return sum(_merge(model, node) for node in list(model.graph) if node.op_type in _LAYOUT and _ends_chain(node))


def _ends_chain(node: onnx_ir.Node) -> bool:
    return not any(user.op_type in _LAYOUT and position == 0 for user, position in node.outputs[0].uses())


def _merge(model: onnx_ir.Model, end: onnx_ir.Node) -> int:
    import onnx_ir
    from onnx_ir.convenience import replace_all_uses_with

    if end.outputs[0].is_graph_output():
        return 0
    chain = [end]
    while (node := chain[0].inputs[0].producer() if chain[0].inputs[0] is not None else None) is not None:
        if node.op_type not in _LAYOUT or node.outputs[0].is_graph_output():
            break
        if {user for user, _ in node.outputs[0].uses() if user.op_type != "Shape"} != {chain[0]}:
            break
        chain.insert(0, node)
    for start, node in enumerate(chain):
        if sum(item.op_type == "Transpose" for item in chain[start:]) < 2:
            return 0
        source, target = node.inputs[0], end.outputs[0]
        permutation = _permutation(model, source, target) if source is not None else None
        if permutation is None or source is None:
            continue
        merged = onnx_ir.node("Transpose", [source], {"perm": permutation}, name=f"{end.name}_merged")
        merged.outputs[0].name, merged.outputs[0].type = f"{target.name}_merged", target.type
        merged.outputs[0].shape = target.shape
        model.graph.insert_before(end, merged)
        replace_all_uses_with(target, merged.outputs[0])
        return 1
    return 0


def _permutation(model: onnx_ir.Model, source: onnx_ir.Value, target: onnx_ir.Value) -> tuple[int, ...] | None:
    """The axes of the one Transpose that makes ``target`` of ``source``; None if none does."""
    inputs = [value for value in model.graph.inputs if value is not source]
    nodes = ancestors(target, [source, *inputs])
    if source.shape is None or len(source.shape) > _LARGEST_RANK or nodes is None or reads_more_than_shapes(nodes, inputs):
        return None
    candidates = set(itertools.permutations(range(len(source.shape))))
    for sizes in _FREE_SIZES:
        chosen: dict[object, int] = {}
        free = iter(sizes)
        shape = _sized(source, chosen, free)
        numbered = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        feeds = {value: np.zeros(_sized(value, chosen, free), dtype=np.int64) for value in inputs}
        moved = run_part(model, target, {**feeds, source: numbered}, nodes)
        if moved is None:
            return None
        candidates = {axes for axes in candidates if np.array_equal(numbered.transpose(axes), moved)}
    return next(iter(candidates)) if len(candidates) == 1 else None


def _sized(value: onnx_ir.Value, chosen: dict[object, int], free: Iterator[int]) -> list[int]:
    """The shape of a value with a size for every free dimension, the same for dimensions of the same name."""
    sizes = []
    for position, size in enumerate(value.shape or ()):
        if isinstance(size, int):
            sizes.append(size)
            continue
        name = size.value if size.value is not None else (value.name, position)
        if name not in chosen:
            chosen[name] = next(free)
        sizes.append(chosen[name])
    return sizes

"""Let the attention operator do what a traced graph does before it: rotate queries and keys, and part them.

    x -> MatMul([q k v]) -> Split -> (q, k) RotaryEmbedding -> GroupQueryAttention        x -> MatMul([q k v]) -> GroupQueryAttention

The operator rotates by tables of cosines and sines for every position; they are computed here by running the part of the graph that
made them, once, for all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.graphs import constant_input, new_initializer
from hfaccel.rewrites.probe import ancestors, reads_more_than_shapes, run_part

if TYPE_CHECKING:
    import onnx_ir

_QUERY, _KEY, _VALUE, _COSINES = 0, 1, 2, 7
_SWAPPED_HEADS = [0, 2, 1, 3]
_ROTATED_IN_STEPS_OF = 16
"""Channels; the operator knows no other sizes."""


@dataclass(frozen=True)
class Rotation:
    """What rotates the queries or keys of a layer.

    Attributes:
        end: what the attention reads in the end of the rotated value, perhaps through transposes and reshapes.
        source: the value before.
        node: ``RotaryEmbedding``.
    """

    end: onnx_ir.Value
    source: onnx_ir.Value
    node: onnx_ir.Node


def rotate_in_attention(model: onnx_ir.Model, positions: int) -> int:
    """Move rotary embeddings into ``GroupQueryAttention``; returns the number of layers where that was possible.

    Args:
        model: a traced decoder with the names of the contract.
        positions: that a text may have.
    """
    import onnx_ir

    tables: dict[tuple[onnx_ir.Value, ...], tuple[onnx_ir.Value, onnx_ir.Value] | None] = {}
    changed = 0
    for node in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        rotations = [_rotation(node.inputs[place]) for place in (_QUERY, _KEY)]
        query, key = rotations
        if query is None or key is None or query.node.inputs[1:] != key.node.inputs[1:]:
            continue
        settings = [item.node.attributes.get_int("interleaved", 0) for item in (query, key)]
        read = tuple(value for value in query.node.inputs[1:4] if value is not None)
        if read not in tables:
            tables[read] = _tables(model, read, positions, f"rotary.{len(tables)}")
        made = tables[read]
        past = node.inputs[3]
        head_size = past.shape[3] if past is not None and past.shape is not None else None
        if made is None or settings[0] != settings[1] or not isinstance(head_size, int) or head_size % _ROTATED_IN_STEPS_OF:
            continue
        for item in (query, key):
            item.end.replace_all_uses_with(item.source)
        node.attributes["do_rotary"] = onnx_ir.AttrInt64("do_rotary", 1)
        node.attributes["rotary_interleaved"] = onnx_ir.AttrInt64("rotary_interleaved", settings[0])
        node.resize_inputs(max(_COSINES + 2, len(node.inputs)))
        for place, table in zip((_COSINES, _COSINES + 1), made, strict=True):
            node.replace_input_with(place, table)
        changed += 1
    return changed


def pack_attention_inputs(model: onnx_ir.Model) -> int:
    """Hand ``GroupQueryAttention`` the product that its query, key and value were split from; returns how many.

    Where each part had a bias added, the biases are added to the whole, side by side.
    """
    import onnx_ir

    changed = 0
    for node in [node for node in model.graph if node.op_type == "GroupQueryAttention"]:
        parts = [node.inputs[place] for place in (_QUERY, _KEY, _VALUE)]
        adds = [part.producer() if part is not None else None for part in parts]
        biases = [_bias(add) for add in adds]
        if all(bias is not None for bias in biases):
            parts = [
                next((value for value in add.inputs if value is not bias), None)
                for add, bias in zip(adds, biases, strict=True)
                if add
            ]
        elif any(bias is not None for bias in biases):
            continue
        split = parts[0].producer() if parts[0] is not None else None
        if split is None or split.op_type != "Split" or split.attributes.get_int("axis", 0) not in (-1, 2):
            continue
        if list(split.outputs) != parts or any(len(part.uses()) != 1 for part in split.outputs):
            continue
        packed = split.inputs[0]
        if packed is not None and all(bias is not None for bias in biases):
            arrays = [bias.const_value.numpy() for bias in biases if bias is not None and bias.const_value is not None]
            bias = new_initializer(model, f"{packed.name}_bias", np.concatenate(arrays))
            add = onnx_ir.node("Add", [packed, bias])
            add.outputs[0].name, add.outputs[0].type, add.outputs[0].shape = f"{packed.name}_biased", packed.type, packed.shape
            model.graph.insert_before(split, [add])
            packed = add.outputs[0]
        node.replace_input_with(_QUERY, packed)
        node.replace_input_with(_KEY, None)
        node.replace_input_with(_VALUE, None)
        changed += 1
    return changed


def _bias(node: onnx_ir.Node | None) -> onnx_ir.Value | None:
    """The constant vector that a node adds to what only the attention reads."""
    if node is None or node.op_type != "Add" or len(node.outputs[0].uses()) != 1:
        return None
    bias = constant_input(node)
    return bias if bias is not None and bias.const_value is not None and len(bias.const_value.shape) == 1 else None


def _rotation(value: onnx_ir.Value | None) -> Rotation | None:
    """The rotation that a value comes from, through nothing but heads and tokens trading places and merging."""
    node = value.producer() if value is not None else None
    while value is not None and node is not None and len(value.uses()) == 1 and node.op_type in ("Reshape", "Transpose"):
        if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) != _SWAPPED_HEADS:
            return None
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    if value is None or node is None or len(value.uses()) != 1:
        return None
    if node.op_type == "RotaryEmbedding" and node.inputs[0] is not None:
        return Rotation(value, node.inputs[0], node)
    return _partial_rotation(value, node) if node.op_type == "Concat" else None


def _partial_rotation(value: onnx_ir.Value, node: onnx_ir.Node) -> Rotation | None:
    """The same where only the first channels of each head are rotated: ``Concat(RotaryEmbedding(x[..., :n]), x[..., n:])``."""
    rank = len(value.shape) if value.shape is not None else 0
    if len(node.inputs) != 2 or rank != 4 or node.attributes.get_int("axis", 0) not in (-1, rank - 1):
        return None
    first, rest = (item.producer() if item is not None else None for item in node.inputs)
    if first is None or rest is None or first.op_type != "RotaryEmbedding" or first.inputs[0] is None:
        return None
    begin = first.inputs[0].producer()
    if begin is None or begin.op_type != "Slice" or rest.op_type != "Slice" or begin.inputs[0] is not rest.inputs[0]:
        return None
    size, source = value.shape[3] if value.shape is not None else None, begin.inputs[0]
    rotated = _channels(begin, rank)
    others = _channels(rest, rank)
    if rotated is None or others is None or not isinstance(size, int) or source is None:
        return None
    return Rotation(value, source, first) if rotated[0] == 0 and rotated[1] == others[0] and others[1] >= size else None


def _channels(node: onnx_ir.Node, rank: int) -> tuple[int, int] | None:
    """First and last channel (exclusive) that a slice of the last axis takes."""
    constants = [
        value.const_value.numpy().tolist() if value is not None and value.const_value is not None else None
        for value in node.inputs[1:]
    ]
    if len(constants) < 3 or constants[2] not in ([-1], [rank - 1]) or (len(constants) > 3 and constants[3] != [1]):
        return None
    start, end = constants[:2]
    return (int(start[0]), int(end[0])) if start and end and start[0] >= 0 and end[0] >= 0 else None


def _tables(
    model: onnx_ir.Model, read: Sequence[onnx_ir.Value], positions: int, name: str
) -> tuple[onnx_ir.Value, onnx_ir.Value] | None:
    """Cosines and sines float32 [positions, half of the rotated channels] as constants; None where positions alone do not make them.

    Args:
        model: the graph.
        read: row of the tables for each token, and the tables of one run, as ``RotaryEmbedding`` reads them.
        positions: how many rows to make.
        name: of the constants, before ``.cos`` and ``.sin``.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    ids = np.arange(positions, dtype=np.int64)[None]
    feeds: dict[onnx_ir.Value, np.ndarray] = {inputs[key]: ids for key in ("input_ids", "attention_mask", "position_ids")}
    for value in inputs.values():
        if value not in feeds:
            feeds[value] = np.zeros(_sizes(value), dtype=np.float32)
    found = []
    for value in read:
        nodes = ancestors(value, list(feeds))
        others = [item for key, item in inputs.items() if key != "position_ids"]
        if nodes is None or reads_more_than_shapes(nodes, others):
            return None
        found.append(run_part(model, value, feeds, nodes))
    rows, cosines, sines = found
    if rows is None or cosines is None or sines is None or cosines.shape != sines.shape or cosines.ndim != 2:
        return None
    half = cosines.shape[1]
    if rows.tolist() != ids.tolist() or len(cosines) != positions or (2 * half) % _ROTATED_IN_STEPS_OF:
        return None
    return new_initializer(model, f"{name}.cos", cosines), new_initializer(model, f"{name}.sin", sines)


def _sizes(value: onnx_ir.Value) -> tuple[int, ...]:
    """Of the past of a layer, for a run on one row that has none."""
    return tuple(dim if isinstance(dim, int) else int(dim.value == "batch") for dim in value.shape or ())

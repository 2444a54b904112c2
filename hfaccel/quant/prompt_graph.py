"""A second graph beside a decoder's, for prompts: the same weights, computed for many tokens at once.

``MatMulNBits`` is made for one token: it scales each block by itself, so for a prompt it does two to three operations where a product with
one scale per channel and call does one. Such a product needs weights with one scale per channel, and an activation of which all
tokens have the same range: after :mod:`hfaccel.rewrites.rotate_residual` those that a norm gives do. Both graphs read one file of weights;
onnxruntime lays them out for either kernel when it opens the graph.

Where products of unsigned activations with signed weights saturate (x86 without VNNI), weights stay unsigned: that kernel widens both to 16
bits first. It is exact, a tenth slower than the saturating one, and still 1.4 times as fast as float on AVX2.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.quant.weight_only import BlockwiseWeight
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import load_graph, new_initializer
from hfaccel.runtime.generation.decoder import PROMPT_GRAPH_NAME

if TYPE_CHECKING:
    import onnx_ir

_LARGEST = 127
_ZERO_LEVEL = 128


def round_channels(weight: np.ndarray, block_size: int) -> BlockwiseWeight:
    """Round a weight [in, out] to 8 bit with one scale per output channel, stored as if each block had its own."""
    scales = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny).astype(np.float32) / _LARGEST
    levels = (np.rint(weight / scales) + _ZERO_LEVEL).astype(np.uint8).T
    return in_blocks(BlockwiseWeight(levels[:, None], scales[:, None], None, 8), block_size)


def in_blocks(channels: BlockwiseWeight, block_size: int) -> BlockwiseWeight:
    """A weight of 8 bit whose every channel is one block, stored as if it were several, each with the channel's scale."""
    outputs, _, inputs = channels.levels.shape
    blocks = -(-inputs // block_size)
    levels = np.full((outputs, blocks * block_size), _ZERO_LEVEL, dtype=np.uint8)
    levels[:, :inputs] = channels.levels[:, 0]
    return BlockwiseWeight(levels.reshape(outputs, blocks, block_size), np.repeat(channels.scales, blocks, axis=1), None, 8)


def write_prompt_graph(graph: Path, names: Collection[str], *, saturates: bool) -> Path:
    """Write the graph for prompts beside a decoder's graph.

    Args:
        graph: with its weights in a file of their own, which is not changed.
        names: of its ``MatMulNBits`` whose weights come from :func:`in_blocks`; all others stay as they are.
        saturates: whether u8 x s8 products saturate on the target.
    """
    import onnx_ir

    model = load_graph(graph)
    for node in list(model.graph):
        if node.name in names:
            _compute_in_channels(model, node, unsigned=saturates)
    drop_unused(model)
    path = graph.with_name(PROMPT_GRAPH_NAME)
    onnx_ir.save(model, str(path))  # weights that lie in a file stay there
    return path


def _compute_in_channels(model: onnx_ir.Model, node: onnx_ir.Node, *, unsigned: bool) -> None:
    import onnx_ir

    activation, blocks, scales = node.inputs[:3]
    assert activation is not None and blocks is not None and scales is not None  # as store_in_blocks made it
    inputs, outputs = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    made: list[onnx_ir.Node] = []

    def add(operator: str, what: str, *operands: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
        made.append(onnx_ir.node(operator, operands, attributes=attributes, name=f"{node.name}_{what}"))
        return made[-1].outputs[0]

    def integers(*values: int) -> onnx_ir.Value:
        name = "prompt_integers_" + "_".join(map(str, values))
        known = model.graph.initializers.get(name)
        return known if known is not None else new_initializer(model, name, np.array(values, dtype=np.int64))

    levels = add("Reshape", "levels", blocks, integers(outputs, -1))
    used = add("Slice", "used", levels, integers(0), integers(inputs), integers(1))
    if not unsigned:
        signed = add("Sub", "signed", add("Cast", "wide", used, to=onnx_ir.DataType.INT32), _zero_level(model, np.int32))
        used = add("Cast", "narrow", signed, to=onnx_ir.DataType.INT8)
    weight = add("Transpose", "weight", used)
    scale = add("Reshape", "scale", add("Slice", "first", scales, integers(0), integers(1), integers(1)), integers(-1))
    operands = [activation, weight, scale, *([_zero_level(model, np.uint8, outputs)] if unsigned else [])]
    product = onnx_ir.node("DynamicQuantizeMatMul", operands, domain=node.domain, name=f"{node.name}_prompt")
    model.graph.insert_before(node, [*made, product])
    result = product.outputs[0]
    result.name, result.type, result.shape = f"{node.outputs[0].name}_prompt", node.outputs[0].type, node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(result)
    model.graph.remove(node, safe=True)


def _zero_level(model: onnx_ir.Model, dtype: type[np.integer[Any]], outputs: int | None = None) -> onnx_ir.Value:
    """The level of zero, as one number or once for each output channel."""
    name = "prompt_zero_level" if outputs is None else f"prompt_zero_levels_{outputs}"
    known = model.graph.initializers.get(name)
    shape = () if outputs is None else (outputs,)
    return known if known is not None else new_initializer(model, name, np.full(shape, _ZERO_LEVEL, dtype=dtype))

"""A second graph beside a decoder's, for many tokens at once: the same weights, computed with one scale per channel and one per token.

``MatMulNBits`` is made for one token: it scales each block by itself, so for a prompt it does two to three operations where a product with
one scale per channel does one. What a norm gives after :mod:`hfaccel.rewrites.rotate_residual` has no channel that stands out: such
products read the same file of weights, if these have 8 bits, whose blocks then all have their channel's scale, and onnxruntime lays them out for
either kernel when it opens the graph. All others are turned (:mod:`hfaccel.quant.per_token`), but for a head that reads no such norm: a prompt needs it for
its last token only. Turned weights lie in a second file, as turning them when the graph is opened would take a gigabyte, and so do those of 8 bit for
prompts where steps have 4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.channel_weight import ChannelWeight
from hfaccel.quant.massive_channels import MassiveChannels, split_off
from hfaccel.quant.per_token import ZERO_LEVEL, PerTokenProducts, turned, turning_group
from hfaccel.quant.weight_only import BlockwiseWeight, read_blocks
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import PROMPT_DATA_NAME, PROMPT_INTEGERS, load_graph, shared_initializer, shared_integers
from hfaccel.rewrites.score_at_once import score_at_once
from hfaccel.runtime.generation.decoder import PROMPT_GRAPH_NAME

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.recipe.weight_format import WeightFormat


def round_channels(weight: np.ndarray, block_size: int, weights: WeightFormat) -> BlockwiseWeight:
    """Round a weight [in, out] to 8 bit with one scale per output channel, stored as if each block had its own."""
    rounded = ChannelWeight.nearest(weight, weights)
    levels = (rounded.levels.T.astype(np.int16) + ZERO_LEVEL).astype(np.uint8)
    return in_blocks(BlockwiseWeight(levels[:, None], rounded.scales[:, None], None, 8), block_size)


def in_blocks(channels: BlockwiseWeight, block_size: int) -> BlockwiseWeight:
    """A weight of 8 bit whose every channel is one block, stored as if it were several, each with the channel's scale."""
    outputs, _, inputs = channels.levels.shape
    blocks = -(-inputs // block_size)
    levels = np.full((outputs, blocks * block_size), ZERO_LEVEL, dtype=np.uint8)
    levels[:, :inputs] = channels.levels[:, 0]
    return BlockwiseWeight(levels.reshape(outputs, blocks, block_size), np.repeat(channels.scales, blocks, axis=1), None, 8)


def write_prompt_graph(
    graph: Path,
    in_channels: Collection[str],
    to_turn: Collection[str],
    weights: WeightFormat,
    *,
    exact: Mapping[str, np.ndarray] = MappingProxyType({}),
    massive: Mapping[str, MassiveChannels] = MappingProxyType({}),
    at_once: bool = False,
) -> Path:
    """Write the graph for prompts beside a decoder's graph.

    Args:
        graph: with its weights in a file of their own, which is not changed.
        in_channels: of its ``MatMulNBits`` whose activations need no turning. Their weights come from :func:`in_blocks`, or are ``exact``.
        to_turn: those that are turned; where their inputs have no group to turn they stay as they are, like all that are named nowhere.
        weights: how what this graph has for itself is stored; what comes out of blocks is as it is.
        exact: float weights [in, out] by name, of those that the other graph has too coarse.
        massive: channels of those that are turned which are computed in float.
        at_once: compute attention without blocks.
    """
    import onnx_ir

    model = load_graph(graph)
    if at_once:
        score_at_once(model)
    products = PerTokenProducts(model)
    stored: list[onnx_ir.Value] = []
    for node in list(model.graph):
        name, group = node.name or "", turning_group(node.attributes.get_int("K", 0)) if node.name in to_turn else None
        if name in in_channels and name not in exact:
            products.replace(node, *_channels_of_blocks(model, node), None)
        elif name in in_channels or group is not None:
            weight = exact[name].copy() if name in exact else read_blocks(node).dequantized(node.attributes.get_int("K", 0))
            if (large := massive.get(name)) is not None:
                if name in exact:  # which may have been scaled since these channels were found
                    large = replace(large, rows=weight[large.channels])
                weight[large.channels] = 0
                split_off(model, node, large, len(weight))
            own = ChannelWeight.nearest(weight if group is None else turned(weight, group), weights)
            constants = own.store(model, f"{name}_for_prompts")
            products.replace(node, *constants, group)
            stored.append(constants[0])
    drop_unused(model)
    _store_beside(stored, graph.parent)
    path = graph.with_name(PROMPT_GRAPH_NAME)
    onnx_ir.save(model, str(path))  # weights that lie in a file stay there
    return path


def _store_beside(values: list[onnx_ir.Value], folder: Path) -> None:
    """Put constants into the file of what only the graph for prompts reads."""
    from onnx_ir.external_data import convert_tensors_to_external

    tensors = [value.const_value for value in values if value.const_value is not None]
    if tensors:
        for value, tensor in zip(values, convert_tensors_to_external(tensors, folder, PROMPT_DATA_NAME), strict=True):
            value.const_value = tensor


def _channels_of_blocks(model: onnx_ir.Model, node: onnx_ir.Node) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """Weight [in, out] and scales [out], computed from the blocks when the graph is opened.

    Every constant on the way stays in memory until all are computed, so they are few and of one byte each: a level of 8 bits with its
    highest one turned over is the signed weight.
    """
    import onnx_ir

    blocks, scales = node.inputs[1:3]
    assert blocks is not None and scales is not None  # as store_in_blocks made it
    inputs, outputs = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    made: list[onnx_ir.Node] = []

    def add(operator: str, what: str, *operands: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
        made.append(onnx_ir.node(operator, operands, attributes=attributes, name=f"{node.name}_{what}"))
        return made[-1].outputs[0]

    def integers(*values: int) -> onnx_ir.Value:
        return shared_integers(model, PROMPT_INTEGERS, *values)

    levels = add("Reshape", "levels", blocks, integers(outputs, -1))
    if inputs % node.attributes.get_int("block_size", inputs):
        levels = add("Slice", "used", levels, integers(0), integers(inputs), integers(1))
    zero = shared_initializer(model, "prompt_zero_level", np.array(ZERO_LEVEL, dtype=np.uint8))
    signed = add("Cast", "signed", add("BitwiseXor", "turned_over", levels, zero), to=onnx_ir.DataType.INT8)
    weight = add("Transpose", "weight", signed)
    scale = add("Reshape", "scale", add("Slice", "first", scales, integers(0), integers(1), integers(1)), integers(-1))
    model.graph.insert_before(node, made)
    return weight, scale

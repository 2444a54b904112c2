"""Activation-aware scaling: weights that meet large activations are made larger before they are rounded, and so lose less.

After Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv:2306.00978): with ``s_k = rms(x_k)^a``, ``x W = (x / s) (s W)``. The
division goes into what makes the activation, a norm's weight, the up projection or the values of attention, so nothing is added to the
graph and its answers stay as they were. The exponent is the one of some that changes the products least, which may be 0: the more
strongly a block's other weights are coarsened by a few large ones, the less it gains.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.clipping import clipped_to_nearest
from hfaccel.quant.descent import improved, regularized
from hfaccel.quant.layers import has_eight_bits
from hfaccel.quant.moments import grouped, second_moments
from hfaccel.quant.weight_only import BlockwiseWeight
from hfaccel.rewrites.graphs import new_initializer

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import onnx_ir

    from hfaccel.quant.calibration import Feeds
    from hfaccel.quant.gptq import MomentRounding
    from hfaccel.recipe.schema import Rung

EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65)
_OUTPUTS_TRIED = 96
"""Of a weight, evenly spaced: enough to tell exponents apart."""
_SMALLEST_RMS = 1e-4
"""Of a channel, as a share of the mean: what was never active is not to be scaled without end."""
_NORMS = {
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "LayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (2,),
    "SkipLayerNormalization": (2, 3),
}
"""Operator -> its inputs that a division of the result goes into."""


@dataclass(frozen=True)
class _Source:
    """What makes an activation, so that a division of its channels can go there.

    Attributes:
        constants: nodes, each with the place of a constant [..., channels] among its inputs and the first of the channels that count.
        spread: for each channel of the activation the one of the source that it is made of; heads may share values.
    """

    constants: tuple[tuple[onnx_ir.Node, int, int], ...]
    spread: np.ndarray


def clipped(weight: np.ndarray, moments: np.ndarray, *, bits: int, block_size: int) -> BlockwiseWeight:
    """Round a weight [in, out] to the nearest level of clipped blocks; of the moments [in, in] only the diagonal counts."""
    return clipped_to_nearest(weight, np.diag(moments), bits=bits, block_size=block_size)


def shortly_descended(weight: np.ndarray, moments: np.ndarray, *, bits: int, block_size: int) -> BlockwiseWeight:
    """What :func:`hfaccel.quant.descent.descended` comes to, roughly and soon: two rounds from :func:`clipped`."""
    return improved(clipped(weight, moments, bits=bits, block_size=block_size), weight, moments, rounds=2)


def scale_by_activations(
    rung: Rung,
    model: onnx_ir.Model,
    names: Collection[str],
    batches: Sequence[Feeds],
    *,
    workdir: Path,
    trial: MomentRounding = clipped,
) -> int:
    """Scale what the named MatMuls read, where what makes it can take the division; exact in float arithmetic.

    Args:
        rung: its bits and block size.
        model: float; changed in place.
        names: of the MatMuls; parts in 8 bits are exact enough as they are.
        batches: calibration texts.
        workdir: for graphs on the way.
        trial: the rounding that exponents are compared with.

    Returns:
        How many activations were scaled.
    """
    readers: dict[str, list[onnx_ir.Node]] = {}
    for node in model.graph:
        weight = node.inputs[1] if node.name in names else None
        if weight is not None and not has_eight_bits(weight.name or "", rung.eight_bit) and node.inputs[0] is not None:
            readers.setdefault(node.inputs[0].name or "", []).append(node)
    values = {name: nodes[0].inputs[0] for name, nodes in readers.items()}
    sources = {name: source for name, value in values.items() if value is not None and (source := _source_of(value)) is not None}
    widths = {name: len(source.spread) for name, source in sources.items()}
    scaled = 0
    for group in grouped(widths):
        moments = second_moments(model, group, batches, workdir=workdir)
        for name in group:
            weights = [_array(node.inputs[1]) for node in readers[name]]
            scale = chosen_scale(weights, moments.pop(name), sources[name].spread, rung, trial)
            value = values[name]
            if scale is not None and value is not None:
                _fold(model, value, sources[name], scale)
                scaled += 1
    return scaled


def chosen_scale(
    weights: Sequence[np.ndarray], moments: np.ndarray, spread: np.ndarray, rung: Rung, trial: MomentRounding
) -> np.ndarray | None:
    """The scale of a source's channels with which the products change least when their weights are rounded; None for no scale.

    Args:
        weights: [in, out] of the products that read one activation.
        moments: of the activation [in, in].
        spread: source channel of each input, [in].
        rung: its bits and block size.
        trial: rounds one weight.
    """
    tried = [weight[:, :: max(1, weight.shape[1] // _OUTPUTS_TRIED)] for weight in weights]
    tried_weight = np.ascontiguousarray(np.concatenate(tried, axis=1), dtype=np.float32)
    squares = np.bincount(spread, weights=np.diag(moments).astype(np.float64)) / np.bincount(spread)
    magnitudes = np.sqrt(np.maximum(squares, _SMALLEST_RMS**2 * (squares.mean() or 1.0)))
    cost = regularized(moments, len(moments))
    best, least = None, np.inf
    for exponent in EXPONENTS:
        scale = magnitudes**exponent
        scale = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
        own = scale[spread][:, None]
        scaled_weight, scaled_moments = tried_weight * own, moments / (own * own.T)
        rounded = trial(scaled_weight, scaled_moments, bits=rung.weight_only_bits, block_size=rung.block_size)
        difference = rounded.dequantized(len(own)) / own - tried_weight
        error = float(np.einsum("io,io->", difference, cost @ difference, dtype=np.float64))
        if error < least:
            best, least = (scale if exponent else None), error
    return best


def _source_of(value: onnx_ir.Value) -> _Source | None:
    """None where a division has nowhere to go, or where anything but products with a weight of their own reads the value."""
    node = value.producer()
    if node is None or value.is_graph_output() or not all(_is_own_product(reader, value) for reader in value.consumers()):
        return None
    weight = next(iter(value.consumers())).inputs[1]
    assert weight is not None and weight.const_value is not None  # just checked
    every = np.arange(weight.const_value.shape.numpy()[0])
    if node.op_type in _NORMS and node.outputs[0] is value:
        present = [place for place in _NORMS[node.op_type] if place < len(node.inputs) and node.inputs[place] is not None]
        fits = present and all(_last(node.inputs[place]) == len(every) for place in present)
        return _Source(tuple((node, place, 0) for place in present), every) if fits else None
    if node.op_type == "Mul":
        found = (_linear(item) for item in node.inputs if item is not None)
        constants = next((item for item in found if item is not None), None)
        return _Source(constants, every) if constants is not None else None
    return _values_of_attention(node, len(every)) if node.op_type == "GroupQueryAttention" else None


def _values_of_attention(node: onnx_ir.Node, width: int) -> _Source | None:
    heads, groups = node.attributes.get_int("num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    values = node.inputs[2] if node.inputs[2] is not None else node.inputs[0]
    if not heads or not groups or width % heads or values is None:
        return None
    size = width // heads
    first = 0 if node.inputs[2] is not None else (heads + groups) * size
    constants = _linear(values)
    spread = (np.arange(heads)[:, None] // (heads // groups) * size + np.arange(size)).ravel()
    return _Source(tuple((item, place, start + first) for item, place, start in constants), spread) if constants else None


def _linear(value: onnx_ir.Value, first: int = 0) -> tuple[tuple[onnx_ir.Node, int, int], ...] | None:
    """The constants of the product, with or without a bias, that a value is a part of; None where something else reads it too."""
    node = value.producer()
    if node is None or value.is_graph_output() or len(list(value.consumers())) != 1:
        return None
    operands = list(node.inputs)
    if node.op_type == "MatMul":
        own = operands[0] is not None and operands[0].const_value is None and _is_own_product(node, operands[0])
        return ((node, 1, first),) if own else None
    if node.op_type == "Split" and node.attributes.get_int("axis", 0) == -1 and operands[0] is not None:
        sizes = operands[1].const_value if len(operands) > 1 and operands[1] is not None else None
        if sizes is None:
            return None
        place = next(number for number, output in enumerate(node.outputs) if output is value)
        return _linear(operands[0], first + int(sizes.numpy()[:place].sum()))
    if node.op_type == "Add" and len(operands) == 2:
        place = 0 if operands[0] is not None and operands[0].const_value is not None else 1
        product = operands[1 - place]
        inner = _linear(product, first) if product is not None and _last(operands[place]) > 1 else None
        return (*inner, (node, place, first)) if inner else None
    return None


def _fold(model: onnx_ir.Model, value: onnx_ir.Value, source: _Source, scale: np.ndarray) -> None:
    for node, place, first in source.constants:
        array = _array(node.inputs[place]).copy()
        array[..., first : first + len(scale)] /= scale
        _replace(model, node, place, array)
    for reader in list(value.consumers()):
        _replace(model, reader, 1, _array(reader.inputs[1]) * scale[source.spread][:, None])


def _replace(model: onnx_ir.Model, node: onnx_ir.Node, place: int, array: np.ndarray) -> None:
    old = node.inputs[place]
    assert old is not None and old.name is not None  # found so
    name = f"{old.name}_scaled"  # the name tells which part of the model it is
    while name in model.graph.initializers:  # norms may share a weight, and a weight may be scaled along both of its axes
        name += "_again"
    node.replace_input_with(place, new_initializer(model, name, array.astype(np.float32)))


def _is_own_product(node: onnx_ir.Node, value: onnx_ir.Value) -> bool:
    """Whether a node multiplies a value with a constant matrix that no other node reads."""
    weight = node.inputs[1] if node.op_type == "MatMul" and node.inputs[0] is value else None
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
        return False
    return len(list(weight.consumers())) == 1


def _last(value: onnx_ir.Value | None) -> int:
    """Size of the last axis of a constant; 0 of anything else."""
    if value is None or value.const_value is None or not len(value.const_value.shape):
        return 0
    return int(value.const_value.shape.numpy()[-1])


def _array(value: onnx_ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None  # found so
    return np.asarray(value.const_value.numpy(), dtype=np.float32)

"""Rounding that makes up for itself: what rounding one input's weights breaks, the weights of the inputs after it repair.

GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, arXiv:2210.17323): inputs are rounded one after the other; the error of each is spread over
those not rounded yet, by the inverse of the second moments of the activations, so that the products change least on the texts
seen. Inputs with the largest activations come first, when most others can still repair (the authors' ``act_order``); scale and zero point
of a block are found before, from the weights as they are, so the order costs nothing when the product runs.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hfaccel.quant.channel_weight import LARGEST_PAIR, weight_scales
from hfaccel.quant.clipping import clipped_grid, symmetric_grid
from hfaccel.quant.layers import has_eight_bits, weight_name
from hfaccel.quant.moments import grouped, second_moments
from hfaccel.quant.per_token import ZERO_LEVEL
from hfaccel.quant.prompt_graph import in_blocks, round_channels
from hfaccel.quant.weight_only import EIGHT_BITS, BlockwiseWeight, store_in_blocks
from hfaccel.rewrites.last_token_logits import LAST_TOKEN

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import onnx_ir

    from hfaccel.quant.calibration import Feeds
    from hfaccel.quant.massive_channels import MassiveChannels
    from hfaccel.recipe.schema import Rung
    from hfaccel.recipe.weight_format import WeightFormat


class MomentRounding(Protocol):
    """Rounds a weight [in, out] to blocks with zero points, given the second moments [in, in] of its activation."""

    def __call__(self, weight: np.ndarray, moments: np.ndarray, *, bits: int, block_size: int) -> BlockwiseWeight:
        """Bits are 4 or 8; ``block_size`` inputs share a scale."""


DAMPING = 0.01
"""Added to the diagonal, as a share of its mean: few texts leave directions that were never seen."""
_INPUTS_AT_ONCE = 64
"""Errors reach the inputs after these in one product; more at once have more to do one by one."""
_INVERSE_AT_ONCE = 128
_TOKENS_FOR_EIGHT_BITS = 2048
"""Twice as many take 3 s more and lose no less (SmolLM2: divergence 0.0043 in place of 0.0039)."""


def compensated(
    weight: np.ndarray, moments: np.ndarray, *, bits: int, block_size: int, symmetric: bool = False
) -> BlockwiseWeight:
    """Round a weight [in, out] to blocks.

    Args:
        weight: of a product.
        moments: of its activation [in, in].
        bits: 4 or 8.
        block_size: inputs that share a scale.
        symmetric: without zero points.
    """
    inputs, outputs = weight.shape
    blocks, highest = -(-inputs // block_size), 2**bits - 1
    exact, importance = np.asarray(weight, dtype=np.float32), np.diag(moments)
    scales, zeros = np.ones((blocks, outputs), dtype=np.float32), np.zeros((blocks, outputs), dtype=np.float32)
    for block in range(blocks):
        part = slice(block * block_size, min(inputs, (block + 1) * block_size))
        grid = symmetric_grid if symmetric else clipped_grid
        scales[block], zeros[block] = grid(exact[part], importance[part].astype(np.float32), highest)
    order = np.argsort(-importance, kind="stable")
    own_blocks = order // block_size
    rounded = np.full((blocks * block_size, outputs), 2 ** (bits - 1) if symmetric else 0, dtype=np.uint8)
    repair = _repair_matrix(moments[np.ix_(order, order)])
    rounded[order] = _round_in_order(exact[order], repair, scales[own_blocks], zeros[own_blocks], highest)
    levels = np.ascontiguousarray(rounded.T).reshape(outputs, blocks, block_size)
    zero_points = None if symmetric else np.ascontiguousarray(zeros.T).astype(np.uint8)
    return BlockwiseWeight(levels, np.ascontiguousarray(scales.T), zero_points, bits)


def compensated_channels(weight: np.ndarray, moments: np.ndarray, weights: WeightFormat) -> BlockwiseWeight:
    """Round a weight [in, out] to the bits of its format in one block per channel, without zero points; other arguments as for :func:`compensated`.

    Where sums must fit into 16 bits, a weight whose neighbour in its channel has been rounded goes no further than that leaves room for.
    """
    if not weights.sums_in_16_bits:
        return compensated(weight, moments, bits=weights.bits, block_size=len(weight), symmetric=True)
    exact, order = np.asarray(weight, dtype=np.float32), np.argsort(-np.diag(moments), kind="stable")
    scales = np.broadcast_to(weight_scales(exact, weights), exact.shape)
    zeros = np.full(exact.shape, ZERO_LEVEL, dtype=np.float32)
    places = np.empty_like(order)
    places[order] = np.arange(len(order))
    neighbours = np.append(places, len(order))[np.minimum(order ^ 1, len(order))]
    rounded = np.empty(exact.shape, dtype=np.uint8)
    repair = _repair_matrix(moments[np.ix_(order, order)])
    rounded[order] = _round_in_order(exact[order], repair, scales, zeros, 2**8 - 1, neighbours)
    return BlockwiseWeight(np.ascontiguousarray(rounded.T)[:, None], np.ascontiguousarray(scales[:1].T), None, 8)


def _round_in_order(
    left: np.ndarray,
    repair: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    highest: int,
    neighbours: np.ndarray | None = None,
) -> np.ndarray:
    """Levels uint8 [in, out] of a weight [in, out], one input after the other; ``left`` is used up.

    Args:
        left: the weight.
        repair: from :func:`_repair_matrix`, in the same order of inputs.
        scales: of each input [in, out].
        zeros: of each input [in, out].
        highest: level.
        neighbours: of each input the place of the one whose product is added to its own in 16 bits; None if no sum saturates.
    """
    inputs = len(left)
    rounded = np.empty(left.shape, dtype=np.uint8)
    for start in range(0, inputs, _INPUTS_AT_ONCE):
        stop = min(inputs, start + _INPUTS_AT_ONCE)
        part, errors = left[start:stop].copy(), np.empty((stop - start, left.shape[1]), dtype=np.float32)
        for place in range(stop - start):
            row = start + place
            lowest, most = (0, highest) if neighbours is None else _room(rounded, neighbours[row], row, highest)
            level = np.clip(np.rint(part[place] / scales[row]) + zeros[row], lowest, most)
            rounded[row] = level
            errors[place] = (part[place] - (level - zeros[row]) * scales[row]) / repair[row, row]
            part[place + 1 :] -= repair[row, row + 1 : stop, None] * errors[place]
        left[stop:] -= repair[start:stop, stop:].T @ errors
    return rounded


def _room(rounded: np.ndarray, neighbour: int, row: int, highest: int) -> tuple[np.ndarray | int, np.ndarray | int]:
    """Lowest and highest level [out] that the neighbour leaves to an input, where it is rounded already."""
    if neighbour >= row:
        return 0, highest
    beside = rounded[neighbour].astype(np.int16) - ZERO_LEVEL
    return np.maximum(0, ZERO_LEVEL - LARGEST_PAIR - np.minimum(beside, 0)), np.minimum(
        highest, ZERO_LEVEL + LARGEST_PAIR - np.maximum(beside, 0)
    )


def store_compensated(
    rung: Rung,
    model: onnx_ir.Model,
    names: Collection[str],
    batches: Sequence[Feeds],
    *,
    workdir: Path,
    method: MomentRounding = compensated,
    in_channels: Collection[str] = (),
    massive: Mapping[str, MassiveChannels] = MappingProxyType({}),
    weights: WeightFormat,
) -> None:
    """Make the named MatMuls ``MatMulNBits`` in place, rounded by a method that looks at the moments of their activations.

    Parts that have 8 bits are rounded first. Then the graph is gone through from front to back in as many passes as memory asks for; each
    pass sees what the ones before left.

    Args:
        rung: its bits and block size.
        model: float.
        names: of the MatMuls.
        batches: calibration texts.
        workdir: for graphs on the way.
        method: rounds one weight.
        in_channels: those of the names whose every channel has one scale, and 8 bits.
        massive: channels of some of them that count as no larger than ordinary ones.
        weights: how those in channels are stored.
    """
    if rung.weight_only_bits == 8:
        batches = first_tokens(batches, _TOKENS_FOR_EIGHT_BITS)
    exact_enough = [
        node.name or "" for node in model.graph if node.name in names and has_eight_bits(weight_name(node), rung.eight_bit)
    ]
    products = [node for node in model.graph if node.name in names and node.name not in exact_enough]
    store_nearest(rung, model, exact_enough, in_channels, weights)
    reads = {node.name or "": _activation(node) for node in products}
    widths = {reads[node.name or ""]: _width(node) for node in products}
    large = {activation: massive[name] for name, activation in reads.items() if name in massive}
    for group in grouped(widths):
        moments = second_moments(model, group, batches, workdir=workdir, massive=large)
        chosen = [name for name, activation in reads.items() if activation in moments]

        def rounding(name: str, weight: np.ndarray, own: Rung, moments: dict[str, np.ndarray] = moments) -> BlockwiseWeight:
            seen, bits, size = moments[reads[name]], own.weight_only_bits, own.block_size
            if name in in_channels:
                return in_blocks(compensated_channels(weight, seen, weights), size)
            if own.symmetric:
                return compensated(weight, seen, bits=bits, block_size=size, symmetric=True)
            return method(weight, seen, bits=bits, block_size=size)

        store_in_blocks(rung, model, chosen, rounding)


def store_nearest(
    rung: Rung, model: onnx_ir.Model, names: Collection[str], in_channels: Collection[str], weights: WeightFormat
) -> None:
    """Make the named MatMuls ``MatMulNBits`` of 8 bit in place, rounded to the nearest; those ``in_channels`` with one scale per channel."""
    rung = rung.model_copy(update={**EIGHT_BITS, "eight_bit": ()})
    store_in_blocks(rung, model, [name for name in names if name not in in_channels])
    chosen = [name for name in names if name in in_channels]
    store_in_blocks(rung, model, chosen, lambda _name, weight, own: round_channels(weight, own.block_size, weights))


def first_tokens(batches: Sequence[Feeds], count: int) -> Sequence[Feeds]:
    """The first batches that hold so many tokens: what 8 bits lose is so little that more text tells nothing new."""
    ends = np.cumsum([int(feeds["attention_mask"].sum()) for feeds in batches])
    return batches[: 1 + int(np.searchsorted(ends, count))]


def _activation(node: onnx_ir.Node) -> str:
    """Name of what a product reads; of a head, which reads the last token only, what that is picked from: all tokens tell more."""
    value = node.inputs[0]
    assert value is not None  # a MatMul has two inputs
    picked = value.producer()
    source = picked.inputs[0] if picked is not None and picked.name == LAST_TOKEN else None
    return (value if source is None else source).name or ""


def _width(node: onnx_ir.Node) -> int:
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None  # the caller named such MatMuls
    width: int = weight.const_value.shape.numpy()[0]
    return width


def _repair_matrix(moments: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor of the inverse of the damped moments; more damping where they are still not positive definite.

    It is the inverse of the upper factor R with moments = R R^T, which is the lower factor of the moments in reverse order.
    """
    moments = moments.astype(np.float64)
    diagonal = np.diag(moments).mean() or 1.0
    for attempt in range(8):
        damped = moments + np.eye(len(moments)) * diagonal * DAMPING * 10**attempt
        try:
            lower = np.linalg.cholesky(damped[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        return _inverse_of_upper(lower[::-1, ::-1]).astype(np.float32)
    return np.eye(len(moments), dtype=np.float32)  # nothing to repair with: rounds to the nearest


def _inverse_of_upper(matrix: np.ndarray) -> np.ndarray:
    """Of an upper triangular matrix, by halves: three times as fast as an inverse that does not know of the zeros."""
    size = len(matrix)
    if size <= _INVERSE_AT_ONCE:
        return np.triu(np.linalg.inv(matrix))
    half, inverse = size // 2, np.zeros_like(matrix)
    inverse[:half, :half] = _inverse_of_upper(matrix[:half, :half])
    inverse[half:, half:] = _inverse_of_upper(matrix[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ matrix[:half, half:] @ inverse[half:, half:]
    return inverse

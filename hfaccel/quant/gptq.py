"""Rounding that makes up for itself: what rounding one input's weights breaks, the weights of the inputs after it repair.

GPTQ (Frantar, Ashkboos, Hoefler and Alistarh, arXiv:2210.17323): inputs are rounded one after the other; the error of each is spread over
those not rounded yet, by the inverse of the second moments of the activations, so that the products change least on the texts
seen. Inputs with the largest activations come first, when most others can still repair (the authors' ``act_order``); scale and zero point
of a block are found before, from the weights as they are, so the order costs nothing when the product runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hfaccel.quant.layers import part_of
from hfaccel.quant.moments import grouped, second_moments
from hfaccel.quant.prompt_graph import in_blocks, round_channels
from hfaccel.quant.weight_only import BlockwiseWeight, store_in_blocks

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import onnx_ir

    from hfaccel.quant.calibration import Feeds
    from hfaccel.recipe.schema import Rung


class MomentRounding(Protocol):
    """Rounds a weight [in, out] to blocks with zero points, given the second moments [in, in] of its activation."""

    def __call__(self, weight: np.ndarray, moments: np.ndarray, *, bits: int, block_size: int) -> BlockwiseWeight:
        """Bits are 4 or 8; ``block_size`` inputs share a scale."""


DAMPING = 0.01
"""Added to the diagonal, as a share of its mean: few texts leave directions that were never seen."""
_COLUMNS_AT_ONCE = 128
_SHRINKS = (1.0, 0.92, 0.84, 0.76)
"""Of each end of a block's range: clipping its largest weights may serve the others better."""
_CLIPPING_HELPS_BELOW = 255
"""Levels: with so many the largest weight costs the others nothing."""


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
    blocks, levels = -(-inputs // block_size), 2**bits - 1
    left, importance = np.ascontiguousarray(weight.T, dtype=np.float32), np.diag(moments)
    scales, zeros = np.ones((outputs, blocks), dtype=np.float32), np.zeros((outputs, blocks), dtype=np.float32)
    for block in range(blocks):
        part = slice(block * block_size, min(inputs, (block + 1) * block_size))
        grid = _symmetric_grid if symmetric else _grid
        scales[:, block], zeros[:, block] = grid(left[:, part], importance[part], levels)
    order = np.argsort(-importance, kind="stable")
    own_blocks = order // block_size
    rounded = np.full((outputs, blocks * block_size), 2 ** (bits - 1) if symmetric else 0, dtype=np.uint8)
    rounded[:, order] = _round_in_order(
        np.ascontiguousarray(left[:, order]),
        _repair_matrix(moments[np.ix_(order, order)]),
        scales[:, own_blocks],
        zeros[:, own_blocks],
        levels,
    )
    zero_points = None if symmetric else zeros.astype(np.uint8)
    return BlockwiseWeight(rounded.reshape(outputs, blocks, block_size), scales, zero_points, bits)


def _round_in_order(left: np.ndarray, repair: np.ndarray, scales: np.ndarray, zeros: np.ndarray, levels: int) -> np.ndarray:
    """Levels uint8 [out, in] of a weight [out, in], one input after the other; ``left`` is used up.

    Args:
        left: the weight.
        repair: from :func:`_repair_matrix`, in the same order of inputs.
        scales: of each input [out, in].
        zeros: of each input [out, in].
        levels: the highest one.
    """
    outputs, inputs = left.shape
    rounded = np.zeros((outputs, inputs), dtype=np.uint8)
    for start in range(0, inputs, _COLUMNS_AT_ONCE):
        stop = min(inputs, start + _COLUMNS_AT_ONCE)
        part, errors = left[:, start:stop].copy(), np.zeros((outputs, stop - start), dtype=np.float32)
        for place in range(stop - start):
            column = start + place
            scale, zero = scales[:, column], zeros[:, column]
            level = np.clip(np.rint(part[:, place] / scale) + zero, 0, levels)
            rounded[:, column] = level.astype(np.uint8)
            errors[:, place] = (part[:, place] - (level - zero) * scale) / repair[column, column]
            part[:, place:] -= np.outer(errors[:, place], repair[column, column:stop])
        left[:, stop:] -= errors @ repair[start:stop, stop:]
    return rounded


def store_compensated(
    rung: Rung,
    model: onnx_ir.Model,
    names: Collection[str],
    batches: Sequence[Feeds],
    *,
    workdir: Path,
    method: MomentRounding = compensated,
    in_channels: Collection[str] = (),
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
    """
    exact_enough = [node.name or "" for node in model.graph if node.name in names and _has_eight_bits(node, rung)]
    products = [node for node in model.graph if node.name in names and node.name not in exact_enough]
    store_nearest(rung, model, exact_enough, in_channels)
    reads = {node.name or "": node.inputs[0].name or "" for node in products if node.inputs[0] is not None}
    widths = {reads[node.name or ""]: _width(node) for node in products}
    for group in grouped(widths):
        moments = second_moments(model, group, batches, workdir=workdir)
        chosen = [name for name, activation in reads.items() if activation in moments]

        def rounding(name: str, weight: np.ndarray, own: Rung, moments: dict[str, np.ndarray] = moments) -> BlockwiseWeight:
            seen, bits, size = moments[reads[name]], own.weight_only_bits, own.block_size
            if name in in_channels:
                return in_blocks(compensated(weight, seen, bits=bits, block_size=len(weight), symmetric=True), size)
            if own.symmetric:
                return compensated(weight, seen, bits=bits, block_size=size, symmetric=True)
            return method(weight, seen, bits=bits, block_size=size)

        store_in_blocks(rung, model, chosen, rounding)


def store_nearest(rung: Rung, model: onnx_ir.Model, names: Collection[str], in_channels: Collection[str]) -> None:
    """Make the named MatMuls ``MatMulNBits`` in place, rounded to the nearest; those ``in_channels`` with one scale per channel."""
    store_in_blocks(rung, model, [name for name in names if name not in in_channels])
    chosen = [name for name in names if name in in_channels]
    store_in_blocks(rung, model, chosen, lambda _name, weight, own: round_channels(weight, own.block_size))


def _has_eight_bits(node: onnx_ir.Node, rung: Rung) -> bool:
    weight = node.inputs[1]
    return weight is not None and part_of(weight.name or "") in rung.eight_bit


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
    if size <= _COLUMNS_AT_ONCE:
        return np.triu(np.linalg.inv(matrix))
    half, inverse = size // 2, np.zeros_like(matrix)
    inverse[:half, :half] = _inverse_of_upper(matrix[:half, :half])
    inverse[half:, half:] = _inverse_of_upper(matrix[half:, half:])
    inverse[:half, half:] = -inverse[:half, :half] @ matrix[:half, half:] @ inverse[half:, half:]
    return inverse


def _symmetric_grid(weights: np.ndarray, importance: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale [out] of a block [out, inputs] whose zero is the middle level, as :func:`_grid` finds it; the middle level [out]."""
    middle = (levels + 1) // 2
    largest = np.maximum(np.abs(weights).max(axis=1), np.finfo(np.float32).tiny)
    best, scales = np.full(len(weights), np.inf), largest
    for shrink in _SHRINKS if levels < _CLIPPING_HELPS_BELOW else _SHRINKS[:1]:
        scale = (largest * shrink / (middle - 1)).astype(np.float32)
        level = np.clip(np.rint(weights / scale[:, None]), -middle, middle - 1)
        error = np.square(level * scale[:, None] - weights) @ importance
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
    return scales, np.full(len(weights), middle, dtype=np.float32)


def _grid(weights: np.ndarray, importance: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [out] of a block [out, inputs]: of some clipped ranges that with the least weighted error."""
    low, high = np.minimum(weights.min(axis=1), 0), np.maximum(weights.max(axis=1), 0)
    best = np.full(len(weights), np.inf)
    scales, zeros = np.ones_like(low), np.zeros_like(low)
    for lower in _SHRINKS:
        for upper in _SHRINKS:
            scale = (high * upper - low * lower) / levels
            scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
            zero = np.clip(np.rint(-low * lower / scale), 0, levels)
            level = np.clip(np.rint(weights / scale[:, None]) + zero[:, None], 0, levels)
            error = np.square((level - zero[:, None]) * scale[:, None] - weights) @ importance
            better = error < best
            best, scales, zeros = np.where(better, error, best), np.where(better, scale, scales), np.where(better, zero, zeros)
    return scales, zeros

"""The residual stream of a decoder is turned by an orthogonal matrix, so that no channel of it stands out.

A few channels of the stream are tens of times larger than the others, and set the scale that all of them are rounded with. A root mean
square norm does not see a rotation, so one that is put into everything that writes to the stream, and undone in everything that reads
it, changes no answer (Ashkboos et al., SliceGPT, arXiv:2401.15024; QuaRot, arXiv:2404.00456, use 1 and 2). Every normalized token is
then spread evenly over its channels, and all tokens have the same range: one scale serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.graphs import shared_initializer

if TYPE_CHECKING:
    import onnx_ir

NOT_ROTATABLE = "the residual stream cannot be rotated: it is not one that root mean square norms read and products write"
_SKIP_NORM = "SkipSimplifiedLayerNormalization"
_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")
_PASS_ON = ("GatherND",)  # picks the last token
_SUM_OUTPUT = 3
_SEED = 0
SUFFIX = "_rotated"


@dataclass
class _Stream:
    """What touches the residual stream.

    Attributes:
        width: channels.
        tables: lookups that begin it.
        writers: products that are added to it.
        biases: additions of a constant to such a product.
        norms: that read it, each with the place of its weight among its inputs.
        readers: products that read a norm, each with the norm's weight.
    """

    width: int = 0
    tables: list[onnx_ir.Node] = field(default_factory=list)
    writers: list[onnx_ir.Node] = field(default_factory=list)
    biases: list[onnx_ir.Node] = field(default_factory=list)
    norms: list[tuple[onnx_ir.Node, int]] = field(default_factory=list)
    readers: list[tuple[onnx_ir.Node, onnx_ir.Value]] = field(default_factory=list)


def rotate_residual(model: onnx_ir.Model) -> tuple[str, ...]:
    """Rotate the stream of a decoder whose norms are all root mean square norms before the products (Llama and its like).

    Returns:
        Names of the products that read a norm of the stream, in graph order; none where the stream has another form, and the graph is
        as it was: norms that subtract a mean, norms whose result is added to the stream, a head that is no product with a constant.
    """
    stream = _find_stream(model)
    if stream is None:
        return ()
    for table in stream.tables:
        _replace(model, table, 0, rotated(_array(table.inputs[0])))
    for writer in stream.writers:
        _replace(model, writer, 1, rotated(_array(writer.inputs[1])))
    for bias in stream.biases:
        place = _constant_place(bias)
        _replace(model, bias, place, rotated(_array(bias.inputs[place])))
    for reader, scale in stream.readers:
        _replace(model, reader, 1, rotated((_array(scale)[:, None] * _array(reader.inputs[1])).T).T)
    for norm, place in stream.norms:
        _replace(model, norm, place, np.ones(stream.width, dtype=np.float32))
    names = {reader.name for reader, _ in stream.readers}
    return tuple(node.name or "" for node in model.graph if node.name in names)


def can_rotate(model: onnx_ir.Model) -> bool:
    """Whether :func:`rotate_residual` knows the form of a decoder's stream."""
    return _find_stream(model) is not None


def rotated(array: np.ndarray) -> np.ndarray:
    """The last axis of an array, turned by an orthogonal matrix that spreads each channel evenly: signs, Hadamard and Hartley.

    A Hadamard matrix has entries of one size, but exists by doubling only for powers of two; the odd rest of the width is left to the
    discrete Hartley transform (Bracewell, 1983), of which no entry is larger than 1.42 times the even share. The matrix is the
    Kronecker product of both, and is applied as two small products.

    Args:
        array: float32 [..., width].
    """
    width = array.shape[-1]
    power = width & -width
    angles = 2 * np.pi * np.outer(np.arange(width // power), np.arange(width // power)) / (width // power)
    hartley = ((np.cos(angles) + np.sin(angles)) / np.sqrt(width)).astype(np.float32)
    signs = np.random.default_rng(_SEED).choice(np.array([-1, 1], dtype=np.float32), width)
    parts = (array * signs).reshape(*array.shape[:-1], power, width // power)
    return np.asarray((hadamard(power) @ (parts @ hartley)).reshape(array.shape))


def hadamard(size: int) -> np.ndarray:
    """The Hadamard matrix of a power of two (Sylvester, 1867): float32 [size, size] of 1 and -1, symmetric, its square ``size`` times the identity."""
    matrix = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _find_stream(model: onnx_ir.Model) -> _Stream | None:
    """Follow the stream from the lookup of the tokens to the head; None where it does anything else than the above."""
    ids = next((value for value in model.graph.inputs if value.name == "input_ids"), None)
    lookups = [node for node in ids.consumers() if node.op_type == "Gather"] if ids is not None else []
    if len(lookups) != 1 or not _is_matrix(lookups[0].inputs[0]):
        return None
    stream = _Stream(width=_array(lookups[0].inputs[0]).shape[1], tables=[lookups[0]])
    values, seen = [lookups[0].outputs[0]], set[str | None]()
    while values:
        value = values.pop()
        if value.is_graph_output():
            return None
        for node in value.consumers():
            if node.name in seen:
                continue
            seen.add(node.name)
            further = _follow(stream, node, value)
            if further is None:
                return None
            values += further
    weights = [node.inputs[1] for node in (*stream.writers, *(reader for reader, _ in stream.readers))]
    lone = all(len(list(weight.consumers())) == 1 for weight in weights if weight is not None)
    return stream if lone and stream.readers and len(list(_consumers(stream.tables[0].inputs[0]))) == 1 else None


def _follow(stream: _Stream, node: onnx_ir.Node, value: onnx_ir.Value) -> list[onnx_ir.Value] | None:
    """Note what a reader of the stream does; the values that are the stream after it, or None where that is not known."""
    if node.op_type in _NORMS and node.inputs[0] is value:
        return [] if _add_norm(stream, node, 1) else None
    if node.op_type == _SKIP_NORM:
        known = _add_writer(stream, _other(node, value)) and _add_norm(stream, node, 2) and len(node.inputs) == 3
        return [node.outputs[_SUM_OUTPUT]] if known and len(node.outputs) > _SUM_OUTPUT else ([] if known else None)
    if node.op_type == "Add" and _add_writer(stream, _other(node, value)):
        return [node.outputs[0]]
    factor = _other(node, value) if node.op_type == "Mul" else None
    if factor is not None and factor.const_value is not None and factor.const_value.size == 1:
        return [node.outputs[0]]
    return None


def _add_norm(stream: _Stream, node: onnx_ir.Node, place: int) -> bool:
    scale = node.inputs[place]
    if scale is None or scale.const_value is None or tuple(scale.const_value.shape.numpy()) != (stream.width,):
        return False
    values, found = [node.outputs[0]], []
    while values:
        value = values.pop()
        if value.is_graph_output():
            return False
        for reader in value.consumers():
            if reader.op_type in _PASS_ON and reader.inputs[0] is value:
                values.append(reader.outputs[0])
            elif reader.op_type == "MatMul" and reader.inputs[0] is value and _is_matrix(reader.inputs[1]):
                found.append((reader, scale))
            else:
                return False
    stream.norms.append((node, place))
    stream.readers += found
    return True


def _add_writer(stream: _Stream, value: onnx_ir.Value | None) -> bool:
    """Whether a value that is added to the stream is a product with a constant, with or without a bias."""
    node = value.producer() if value is not None else None
    if value is None or node is None or len(list(value.consumers())) != 1:
        return False
    if node.op_type == "Add":
        place = _constant_place(node)
        if place < 0 or not _add_writer(stream, node.inputs[1 - place]):
            return False
        stream.biases.append(node)
        return True
    if node.op_type != "MatMul" or not _is_matrix(node.inputs[1]):
        return False
    stream.writers.append(node)
    return True


def _other(node: onnx_ir.Node, value: onnx_ir.Value) -> onnx_ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _constant_place(node: onnx_ir.Node) -> int:
    places = (place for place, item in enumerate(node.inputs) if item is not None and item.const_value is not None)
    return next(places, -1)


def _is_matrix(value: onnx_ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 2


def _consumers(value: onnx_ir.Value | None) -> list[onnx_ir.Node]:
    return [] if value is None else list(value.consumers())


def _array(value: onnx_ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None  # found so
    return np.asarray(value.const_value.numpy(), dtype=np.float32)


def _replace(model: onnx_ir.Model, node: onnx_ir.Node, place: int, array: np.ndarray) -> None:
    old = node.inputs[place]
    assert old is not None and old.name is not None  # found so
    # Norms may share their weight, which is all ones afterwards.
    node.replace_input_with(place, shared_initializer(model, f"{old.name}{SUFFIX}", array))

"""The scheme ``weight-only``: weights in blocks of 8 or 4 bit, activations in 8 bit per token and block as they come.

The operator is onnxruntime's ``MatMulNBits``. Each block of ``block_size`` inputs of an output channel has a scale of its own, and at
accuracy level 4 the kernel gives each token a scale per block too: an outlier costs precision only inside its own token and
block, and an answer does not depend on the other rows of its batch. No calibration data is needed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.hqq import half_quadratic
from hfaccel.quant.layers import has_eight_bits
from hfaccel.quant.scheme import EXTERNAL_DATA_FROM_BYTES, embedding_lookups
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import DOMAIN, GRAPH_NAME, new_initializer, save_graph, shared_initializer

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.recipe.schema import Rung

Rounding = Callable[[str, np.ndarray, "Rung"], "BlockwiseWeight"]
"""Rounds the weight [in, out] of the MatMul of this name to the bits and blocks of a rung."""
INT8_ACTIVATIONS = 4
"""The accuracy level of ``MatMulNBits`` that computes in 8 bit; the default dequantizes and computes in float, far slower."""
EMBEDDING_BITS = 8
EIGHT_BITS = {"weight_only_bits": 8, "symmetric": True, "method": "rtn"}
"""Of a rung, for weights that have 8 bits where the others have 4: these lose so little that the nearest level will do."""
SMALLEST_BLOCK = 16
_ACTIVATION_LEVELS = 127.0
_SMALLEST_SCALE = 1e-12
_VALUES_AT_ONCE = 1 << 22
"""How many values the k-quant search works on at once: it holds some ten arrays of that size."""


@dataclass(frozen=True)
class BlockwiseWeight:
    """A weight [in, out] as ``MatMulNBits`` stores it; the last block is padded where ``in`` is no multiple of the block size.

    Attributes:
        levels: uint8 [out, blocks, block_size], 0 to 2 ** bits - 1.
        scales: float32 [out, blocks].
        zero_points: uint8 [out, blocks], the level of zero; None where it is the middle one, 2 ** (bits - 1), everywhere.
        bits: 4 or 8.
    """

    levels: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None
    bits: int

    @property
    def packed(self) -> np.ndarray:
        """uint8 [out, blocks, bytes of a block]."""
        return _pack(self.levels, self.bits)

    @property
    def packed_zero_points(self) -> np.ndarray | None:
        """uint8 [out, bytes of a row], or None."""
        return None if self.zero_points is None else _pack(self.zero_points, self.bits)

    def dequantized(self, inputs: int) -> np.ndarray:
        """What the weight stands for, float32 [inputs, out], without the padding."""
        blocks = _dequantized(self.levels, self.scales, self.zero_points, self.bits)
        return np.ascontiguousarray(blocks.reshape(len(blocks), -1)[:, :inputs].T)


def quantize_weight(weight: np.ndarray, rung: Rung, *, bits: int | None = None) -> BlockwiseWeight:
    """Round a weight [in, out] as a rung says (``bits`` overrides its own).

    Of the method ``k-quant`` each block gets whatever is closer to the weight, the search's grid or that of ``rtn``: the search
    minimizes a weighted error with zero points that are not integers yet, so rounding them can undo its gain. So it is with ``hqq``.
    Methods that look at activations round to the nearest here: :mod:`hfaccel.quant.methods` has them.
    """
    bits = bits or rung.weight_only_bits
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    nearest = _round_to_nearest(weight, bits, rung.block_size, symmetric=rung.symmetric)
    if rung.method == "hqq":
        return half_quadratic(weight, nearest)
    return nearest if rung.method != "k-quant" else _searched(weight, nearest, rung.block_size)


def write_weight_only(
    rung: Rung, floating: onnx_ir.Model, names: Collection[str], folder: Path, *, own_data_file: bool = False
) -> Path:
    """Write the graph with the weights of the named MatMuls (and the embedding tables, if the rung says so) in blocks.

    Nodes and their outputs keep their names. A weight that several MatMuls share is stored once.

    Args:
        rung: of the scheme ``weight-only``.
        floating: the float graph; it is not changed.
        names: of MatMuls with a constant weight; all others stay in float.
        folder: receives ``model.onnx``.
        own_data_file: keep the weights in a file of their own, however small.
    """
    model = floating.clone()
    store_in_blocks(rung, model, names)
    if rung.quantize_embeddings:
        quantize_tables(model, rung)
        drop_unused(model)
    return save_graph(model, folder) if own_data_file else save_compact(model, folder)


def store_in_blocks(rung: Rung, model: onnx_ir.Model, names: Collection[str], rounding: Rounding | None = None) -> None:
    """Make the named MatMuls of a graph, each with a float weight, ``MatMulNBits`` in place.

    Args:
        rung: bits and block size; the parts that its ``eight_bit`` names get 8 bits, rounded to the nearest.
        model: the graph.
        names: of the MatMuls.
        rounding: how to round the other weights; None as the rung's method says.
    """
    stored: dict[str, list[onnx_ir.Value]] = {}
    for node in model.graph:
        if node.name in names:
            _to_blocks(model, node, rung, rounding, stored)
    model.graph.opset_imports[DOMAIN] = 1
    drop_unused(model)


def save_compact(model: onnx_ir.Model, folder: Path) -> Path:
    """Write a graph with its weights in one file where it fits, else with external data; ``model`` is not to be used again."""
    import onnx_ir

    constants = (value.const_value for value in model.graph.initializers.values())
    if sum(tensor.nbytes for tensor in constants if tensor is not None) > EXTERNAL_DATA_FROM_BYTES:
        return save_graph(model, folder)
    path = folder / GRAPH_NAME
    onnx_ir.save(onnx_ir.external_data.load_to_model(model), str(path))
    return path


@dataclass(frozen=True)
class BlockwiseTrips:
    """The round trips (:class:`hfaccel.quant.switches.RoundTrips`) of a rung of the scheme ``weight-only``.

    The activation's is that of the x86 kernels; where Arm kernels of onnxruntime scale whole tokens, it is the finer one.
    """

    rung: Rung

    def weight(self, _matmul: str, weight: np.ndarray) -> np.ndarray:
        """A weight [in, out] to blocks of integers and back, in float32."""
        return quantize_weight(weight, self.rung).dequantized(len(weight))

    def activation(self, model: onnx_ir.Model, matmul: onnx_ir.Node) -> list[onnx_ir.Node]:
        """Nodes that take an activation [..., in] to 8 bit per token and block, symmetric around zero, and back."""
        import onnx_ir

        activation, weight, name = matmul.inputs[0], matmul.inputs[1], matmul.name
        assert activation is not None and weight is not None and weight.const_value is not None  # the caller named such MatMuls
        size, inputs = self.rung.block_size, weight.const_value.shape.numpy()[0]
        blocks = -(-inputs // size)
        nodes: list[onnx_ir.Node] = []

        def add(operator: str, what: str, *operands: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
            nodes.append(onnx_ir.node(operator, operands, attributes=attributes, name=f"{name}_{what}"))
            return nodes[-1].outputs[0]

        def integers(*values: int) -> onnx_ir.Value:
            return _shared_constant(model, "integers_" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

        largest_level = _shared_constant(model, "activation_levels", np.array(_ACTIVATION_LEVELS, dtype=np.float32))
        smallest = _shared_constant(model, "smallest_scale", np.array(_SMALLEST_SCALE, dtype=np.float32))
        shape = add("Shape", "shape", activation)
        tokens = add("Reshape", "tokens", activation, integers(-1, inputs))
        if inputs % size:
            tokens = add("Pad", "padded", tokens, integers(0, 0, 0, blocks * size - inputs))
        parts = add("Reshape", "blocks", tokens, integers(-1, blocks, size))
        largest = add("ReduceMax", "largest", add("Abs", "magnitudes", parts), integers(2), keepdims=1)
        scale = add("Max", "step", add("Div", "exact_step", largest, largest_level), smallest)
        levels = add("Round", "levels", add("Div", "scaled", parts, scale))
        back = add("Reshape", "back", add("Mul", "rounded_blocks", levels, scale), integers(-1, blocks * size))
        if inputs % size:
            back = add("Slice", "unpadded", back, integers(0), integers(inputs), integers(1))
        add("Reshape", "rounded_activation", back, shape)
        return nodes


def read_blocks(node: onnx_ir.Node) -> BlockwiseWeight:
    """The weight of a ``MatMulNBits`` whose weight is a constant."""
    packed, scales, *zeros = (value.const_value.numpy() for value in node.inputs[1:] if value is not None and value.const_value)
    bits, size = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    outputs, blocks = packed.shape[:2]
    zero_points = _unpack(zeros[0].reshape(outputs, -1), bits, blocks) if zeros else None
    return BlockwiseWeight(_unpack(packed, bits, size), scales.reshape(outputs, blocks), zero_points, bits)


def _to_blocks(
    model: onnx_ir.Model, node: onnx_ir.Node, rung: Rung, rounding: Rounding | None, stored: dict[str, list[onnx_ir.Value]]
) -> None:
    """Make a MatMul a ``MatMulNBits``; ``stored`` are the constants made so far, by name of the float weight."""
    import onnx_ir

    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None and weight.name is not None  # matmul_sites names only such
    inputs, outputs = weight.const_value.shape.numpy()
    if has_eight_bits(weight.name, rung.eight_bit):
        rung, rounding = rung.model_copy(update=EIGHT_BITS), None
    if weight.name not in stored:
        exact = weight.const_value.numpy()
        rounded = quantize_weight(exact, rung) if rounding is None else rounding(node.name or "", exact, rung)
        stored[weight.name] = _constants(model, weight.name, rounded)
    sizes = {"K": inputs, "N": outputs, "bits": rung.weight_only_bits, "block_size": rung.block_size}
    node.op_type, node.domain = "MatMulNBits", DOMAIN
    for name, value in {**sizes, "accuracy_level": INT8_ACTIVATIONS}.items():
        node.attributes[name] = onnx_ir.AttrInt64(name, value)
    _set_inputs(node, [node.inputs[0], *stored[weight.name]])


def quantize_tables(model: onnx_ir.Model, rung: Rung) -> None:
    """Make lookups in embedding tables ``GatherBlockQuantized``, where nothing but lookups reads the table.

    openvino reads such a table only in whole blocks, so the block size is the largest up to the rung's that divides the channels.
    """
    import onnx_ir

    lookups, stored = set(embedding_lookups(model)), dict[str, list[onnx_ir.Value]]()
    for node in model.graph:
        table = node.inputs[0] if node.name in lookups else None
        if table is None or table.const_value is None or table.name is None:
            continue
        if node.attributes.get_int("axis", 0) != 0 or not all(reader.name in lookups for reader in table.consumers()):
            continue  # no lookup of rows, or the float table would stay beside the new one
        block_size = math.gcd(table.const_value.shape.numpy()[1], rung.block_size)
        if block_size < SMALLEST_BLOCK:
            continue
        if table.name not in stored:
            rows = np.ascontiguousarray(table.const_value.numpy().T, dtype=np.float32)
            made = _round_to_nearest(rows, EMBEDDING_BITS, block_size, symmetric=rung.symmetric)
            stored[table.name] = _constants(model, table.name, made, made.packed.reshape(table.const_value.shape.numpy()))
        values = stored[table.name]
        node.op_type, node.domain = "GatherBlockQuantized", DOMAIN
        sizes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block_size, "bits": EMBEDDING_BITS}
        node.attributes.clear()
        for name, value in sizes.items():
            node.attributes[name] = onnx_ir.AttrInt64(name, value)
        _set_inputs(node, [values[0], node.inputs[1], *values[1:]])


def _constants(model: onnx_ir.Model, name: str, weight: BlockwiseWeight, packed: np.ndarray | None = None) -> list[onnx_ir.Value]:
    values = [
        new_initializer(model, f"{name}_blocks", weight.packed if packed is None else packed),
        new_initializer(model, f"{name}_block_scales", weight.scales),
    ]
    if weight.packed_zero_points is not None:
        values.append(new_initializer(model, f"{name}_block_zero_points", weight.packed_zero_points))
    return values


def _set_inputs(node: onnx_ir.Node, values: list[onnx_ir.Value | None]) -> None:
    node.resize_inputs(len(values))
    for position, value in enumerate(values):
        node.replace_input_with(position, value)


def _shared_constant(model: onnx_ir.Model, name: str, array: np.ndarray) -> onnx_ir.Value:
    """One constant for all nodes that need it, so that equal chains of nodes are known to be equal and run once."""
    return shared_initializer(model, f"blockwise_{name}", array)


def _round_to_nearest(weight: np.ndarray, bits: int, block_size: int, *, symmetric: bool) -> BlockwiseWeight:
    """Let onnxruntime round a weight [in, out]; not ``symmetric`` gives each block a zero point."""
    with _logging_left_alone():
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=symmetric, bits=bits)
    packed, scales, zero_points = DefaultWeightOnlyQuantizer(config).qbits_block_quant(weight)
    unpacked = None if symmetric else _unpack(zero_points, bits, scales.shape[1])
    return BlockwiseWeight(_unpack(packed, bits, block_size), scales, unpacked, bits)


@contextmanager
def _logging_left_alone() -> Iterator[None]:
    """The module of onnxruntime's quantizer sets up logging for the whole process, unless the root has a handler already."""
    placeholder = logging.NullHandler()
    logging.root.addHandler(placeholder)
    try:
        yield
    finally:
        logging.root.removeHandler(placeholder)


def _searched(weight: np.ndarray, nearest: BlockwiseWeight, block_size: int) -> BlockwiseWeight:
    """Of each block the better of ``nearest``, which has zero points, and what k-quant finds."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    assert nearest.zero_points is not None  # a contradiction of the rung otherwise
    outputs, blocks = nearest.scales.shape
    exact = np.zeros((outputs, blocks * block_size), dtype=np.float32)
    exact[:, : len(weight)] = weight.T
    counts = (np.arange(blocks * block_size) < len(weight)).reshape(blocks, block_size)  # what pads the last block does not
    levels, scales, zero_points = nearest.levels.copy(), nearest.scales.copy(), nearest.zero_points.copy()
    step = max(1, _VALUES_AT_ONCE // exact.shape[1])
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        wanted = exact[part].reshape(-1, blocks, block_size)
        with np.errstate(
            divide="ignore", invalid="ignore", over="ignore"
        ):  # what it finds for blocks of one value may be no number
            found = quant_tensor_k_quant_cpu(wanted, nearest.bits, block_size)
            new_levels = found[0].reshape(wanted.shape).astype(np.uint8)
        new_scales, new_zero_points = (item.reshape(wanted.shape[:2]) for item in (found[1].astype(np.float32), found[2]))

        def errors(levels: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, wanted: np.ndarray = wanted) -> np.ndarray:
            difference = _dequantized(levels, scales, zero_points, nearest.bits) - wanted
            return np.asarray(np.square(difference * counts).sum(axis=2))

        better = errors(new_levels, new_scales, new_zero_points) < errors(levels[part], scales[part], zero_points[part])
        levels[part][better], scales[part][better] = new_levels[better], new_scales[better]
        zero_points[part][better] = new_zero_points[better]
    return BlockwiseWeight(levels, scales, zero_points, nearest.bits)


def _dequantized(levels: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, bits: int) -> np.ndarray:
    """float32 [out, blocks, block_size]."""
    zeros = np.float32(1 << (bits - 1)) if zero_points is None else zero_points[..., None].astype(np.float32)
    return np.asarray((levels.astype(np.float32) - zeros) * scales[..., None])


def _pack(levels: np.ndarray, bits: int) -> np.ndarray:
    """Levels along the last axis into bytes, for 4 bit the first of two in the low half; an odd one out is paired with 0."""
    if bits == 8:
        return levels
    if levels.shape[-1] % 2:
        levels = np.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, 1)])
    return np.asarray(levels[..., ::2] | levels[..., 1::2] << 4)


def _unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of :func:`_pack`, of ``count`` levels."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)[..., :count]

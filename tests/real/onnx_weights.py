"""Turn the initializers of a quantized ONNX graph back into a float state dict.

A traced linear layer is ``MatMul`` + ``Add``: the bias keeps its name (``encoder.layer.0.intermediate.dense.bias``) while the
weight gets a generated one, so the weight of a MatMul is named after the bias that is added to its product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

FloatArray = npt.NDArray[np.float32]
QUANTIZE_OPERATORS = ("QuantizeLinear", "DequantizeLinear")


class QuantizedGraph:
    """An ONNX graph indexed by tensor name.

    Args:
        blob: the serialized model, weights included.
    """

    def __init__(self, blob: bytes) -> None:
        graph = onnx.load_from_string(blob).graph
        self.nodes: list[Any] = list(graph.node)
        self.constants: dict[str, npt.NDArray[Any]] = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        self._producer: dict[str, Any] = {name: node for node in self.nodes for name in node.output}
        self._consumers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)

    def module_of(self, node: Any) -> str:
        """Module path of the linear layer whose product ``node`` computes."""
        waiting = [node.output[0]]
        while waiting:
            for consumer in self._consumers.get(waiting.pop(), []):
                if consumer.op_type in QUANTIZE_OPERATORS:
                    waiting.append(consumer.output[0])
                elif consumer.op_type == "Add":
                    for name in map(self._origin, consumer.input):
                        if ".bias" in name:
                            return name.split(".bias")[0]
        raise ValueError(f"no bias is added to the product of node {node.name!r}")

    def _origin(self, name: str) -> str:
        """Follow a tensor back through quantize and dequantize nodes."""
        while name not in self.constants and name in self._producer and self._producer[name].op_type in QUANTIZE_OPERATORS:
            name = self._producer[name].input[0]
        return name

    def matmul_weight(self, name: str) -> FloatArray | None:
        """Constant right-hand side of a MatMul, dequantized, ``[in, out]``; None when it is computed from the inputs."""
        if name in self.constants:
            return self.constants[name].astype(np.float32)
        node = self._producer.get(name)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self.constants:
            return None
        values, scale, zero_point = (self.constants[item] for item in node.input)
        if scale.size > 1:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            shape = [-1 if index == axis else 1 for index in range(values.ndim)]
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        return dequantize(values, scale, zero_point)


def dequantize(values: npt.NDArray[Any], scale: npt.NDArray[Any], zero_point: npt.NDArray[Any]) -> FloatArray:
    """``(values - zero_point) * scale`` in float32; the three shapes broadcast."""
    result: FloatArray = (values.astype(np.float32) - zero_point.astype(np.float32)) * scale.astype(np.float32)
    return result


def unpack_matmul_nbits(node: Any, packed: npt.NDArray[np.uint8], scales: npt.NDArray[Any]) -> FloatArray:
    """Weight ``[out, in]`` of a symmetric 4-bit ``MatMulNBits``.

    Args:
        node: the node; its attributes K (in), N (out) and block_size describe the layout.
        packed: ``[out, blocks, block_size / 2]``, two values a byte, the lower half first.
        scales: ``out * blocks`` values, one a block.
    """
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    if sizes["bits"] != 4 or len(node.input) != 3:
        raise ValueError(f"node {node.name!r}: only symmetric 4-bit weights are understood")
    pairs = np.stack([packed & 15, packed >> 4], axis=-1).reshape(sizes["N"], -1, sizes["block_size"])
    # Unsigned storage: 8 stands for zero.
    blocks = (pairs.astype(np.float32) - 8.0) * scales.astype(np.float32).reshape(sizes["N"], -1, 1)
    weight: FloatArray = blocks.reshape(sizes["N"], -1)[:, : sizes["K"]]
    return weight


def float_state_dict(blob: bytes) -> dict[str, FloatArray]:
    """All parameters of the traced module, by their torch names, dequantized to float32."""
    graph = QuantizedGraph(blob)
    state = {
        name: value.astype(np.float32)
        for name, value in graph.constants.items()
        if name.endswith((".weight", ".bias")) and value.dtype == np.float32
    }
    for node in graph.nodes:
        if node.op_type == "MatMul":
            weight = graph.matmul_weight(node.input[1])
            if weight is not None and weight.ndim == 2:
                state[f"{graph.module_of(node)}.weight"] = weight.T
        elif node.op_type == "MatMulNBits":
            packed, scales = graph.constants[node.input[1]], graph.constants[node.input[2]]
            state[f"{graph.module_of(node)}.weight"] = unpack_matmul_nbits(node, packed, scales)
    for name, value in graph.constants.items():
        if name.endswith(".weight_quantized"):  # embedding tables: X.weight_quantized, X.weight_scale, X.weight_zero_point
            base = name.removesuffix("_quantized")
            state[base] = dequantize(value, graph.constants[f"{base}_scale"], graph.constants[f"{base}_zero_point"])
    return state

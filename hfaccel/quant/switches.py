"""One graph whose MatMuls can be switched to 8 bit one by one while it runs, to ask "what if" without building a graph for each.

A switched-on MatMul reads activation and weight through the same 8-bit round trips that the real kernels make (scale and zero
point per tensor for the activation, one scale per output channel for the weight); only the order of summation differs.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.scheme import new_initializer
from hfaccel.rewrites.graphs import save_graph
from hfaccel.runtime.session import GraphSession

if TYPE_CHECKING:
    import onnx_ir

FLAGS = "quantize_flags"
_ACTIVATION_LEVELS = 255
_SMALLEST_SCALE = 1e-12


class SwitchedGraph:
    """A :class:`hfaccel.runtime.session.Runner` whose MatMuls are in 8 bit as the last :meth:`switch_on` said; none at first.

    Args:
        model: the float graph; it is not changed.
        names: of the MatMuls that can be switched, each with a constant weight.
        ranges: of the activations by name, for static quantization; None quantizes with the range of each call (dynamic).
        weight_bits: 7 or 8.
        per_channel: one scale per output channel of a weight, else one for all of it.
        workdir: where the graph may lie meanwhile.

    Attributes:
        names: the MatMuls, in the order given.
    """

    def __init__(
        self,
        model: onnx_ir.Model,
        names: Sequence[str],
        *,
        ranges: Mapping[str, tuple[float, float]] | None,
        weight_bits: int,
        per_channel: bool,
        workdir: Path,
    ) -> None:
        self.names = tuple(names)
        workdir.mkdir(parents=True, exist_ok=True)
        switched = _with_switches(model, self.names, ranges, weight_bits, per_channel=per_channel)
        path = save_graph(switched, workdir)
        del switched
        gc.collect()  # graphs are full of reference cycles, and the session is about to hold all weights once more
        self._session = GraphSession(path)
        self.input_names = tuple(name for name in self._session.input_names if name != FLAGS)
        self._flags = np.zeros(len(self.names), dtype=bool)

    def switch_on(self, names: Sequence[str]) -> None:
        """Put exactly these MatMuls in 8 bit."""
        wanted = set(names)
        self._flags = np.array([name in wanted for name in self.names], dtype=bool)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, see :meth:`hfaccel.runtime.session.GraphSession.run`."""
        return self._session.run({**feeds, FLAGS: self._flags})


def round_trip(weight: np.ndarray, *, bits: int, per_channel: bool) -> np.ndarray:
    """A weight [in, out] as signed integers of ``bits`` bits hold it, symmetric around zero, back in float32."""
    largest = np.abs(weight).max(axis=0) if per_channel else np.abs(weight).max()
    scale = np.maximum(largest / (2 ** (bits - 1) - 1), _SMALLEST_SCALE)
    return np.asarray(np.round(weight / scale) * scale, dtype=np.float32)


def _with_switches(
    model: onnx_ir.Model,
    names: Sequence[str],
    ranges: Mapping[str, tuple[float, float]] | None,
    weight_bits: int,
    *,
    per_channel: bool,
) -> onnx_ir.Model:
    import onnx_ir

    copy = model.clone()
    flags = onnx_ir.Value(name=FLAGS, shape=onnx_ir.Shape([len(names)]), type=onnx_ir.TensorType(onnx_ir.DataType.BOOL))
    copy.graph.inputs.append(flags)
    nodes = {node.name: node for node in copy.graph}
    for index, name in enumerate(names):
        matmul = nodes[name]
        activation, weight = matmul.inputs
        assert activation is not None and weight is not None and weight.const_value is not None  # the caller named such MatMuls
        rounded = round_trip(weight.const_value.numpy(), bits=weight_bits, per_channel=per_channel)
        position = new_initializer(copy, f"{name}_flag_index", np.array(index, dtype=np.int64))
        flag = onnx_ir.node("Gather", [flags, position], name=f"{name}_flag")
        trip = _activation_round_trip(copy, matmul, ranges)
        choose = onnx_ir.node("Where", [flag.outputs[0], trip[-1].outputs[0], activation], name=f"{name}_choose")
        new_weight = new_initializer(copy, f"{name}_rounded", rounded)
        choose_weight = onnx_ir.node("Where", [flag.outputs[0], new_weight, weight], name=f"{name}_choose_weight")
        added = [flag, *trip, choose, choose_weight]
        for node in added:
            for number, output in enumerate(node.outputs):
                output.name = f"{node.name}_{number}"
        copy.graph.insert_before(matmul, added)
        matmul.replace_input_with(0, choose.outputs[0])
        matmul.replace_input_with(1, choose_weight.outputs[0])
    return copy


def _activation_round_trip(
    model: onnx_ir.Model, matmul: onnx_ir.Node, ranges: Mapping[str, tuple[float, float]] | None
) -> list[onnx_ir.Node]:
    """Nodes that quantize and dequantize the activation of a MatMul, the result being that of the last one."""
    import onnx_ir

    activation, name = matmul.inputs[0], matmul.name
    assert activation is not None
    if ranges is None:
        quantize = onnx_ir.node("DynamicQuantizeLinear", [activation], num_outputs=3, name=f"{name}_quantize")
        return [quantize, onnx_ir.node("DequantizeLinear", list(quantize.outputs), name=f"{name}_dequantize")]
    low, high = ranges[activation.name or ""]
    step = max((high - low) / _ACTIVATION_LEVELS, _SMALLEST_SCALE)
    scale = new_initializer(model, f"{name}_scale", np.array(step, dtype=np.float32))
    zero = new_initializer(model, f"{name}_zero", np.array(round(-low / step), dtype=np.uint8))
    quantize = onnx_ir.node("QuantizeLinear", [activation, scale, zero], name=f"{name}_quantize")
    return [quantize, onnx_ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}_dequantize")]

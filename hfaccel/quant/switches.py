"""One graph whose MatMuls can be quantized one by one while it runs, to ask "what if" without building a graph for each.

A switched-on MatMul reads activation and weight through the same round trips to integers and back that the real kernels make; only
the order of summation differs. What a round trip is depends on the scheme: :class:`RoundTrips`.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hfaccel.quant.channel_weight import ChannelWeight
from hfaccel.quant.scheme import activation_grid
from hfaccel.rewrites.graphs import new_initializer, save_graph
from hfaccel.runtime.session import GraphSession

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.recipe.weight_format import WeightFormat

FLAGS = "quantize_flags"


class RoundTrips(Protocol):
    """How the kernels of a scheme see the two factors of a MatMul."""

    def weight(self, matmul: str, weight: np.ndarray) -> np.ndarray:
        """The weight [in, out] of the MatMul of this name to integers and back, in float32."""

    def activation(self, model: onnx_ir.Model, matmul: onnx_ir.Node) -> list[onnx_ir.Node]:
        """Nodes, not yet in the graph, that take the MatMul's activation to integers and back, the last one giving the result.

        Constants that they need are registered in ``model``. Nodes are named after the MatMul, their outputs are not named yet.
        """


@dataclass(frozen=True)
class EightBitTrips:
    """Of the schemes dynamic and static: scale and zero point per tensor for the activation, scales alone for the weight.

    Attributes:
        ranges: of the activations by name, for static quantization; None quantizes with the range of each call (dynamic).
        weights: how they are stored.
        per_channel: one scale per output channel of a weight, else one for all of it.
    """

    ranges: Mapping[str, tuple[float, float]] | None
    weights: WeightFormat
    per_channel: bool

    def weight(self, _matmul: str, weight: np.ndarray) -> np.ndarray:
        """See :meth:`RoundTrips.weight`; symmetric around zero."""
        return ChannelWeight.nearest(weight, self.weights, per_channel=self.per_channel).dequantized()

    def activation(self, model: onnx_ir.Model, matmul: onnx_ir.Node) -> list[onnx_ir.Node]:
        """See :meth:`RoundTrips.activation`."""
        import onnx_ir

        activation, name = matmul.inputs[0], matmul.name
        assert activation is not None  # a MatMul has two inputs
        if self.ranges is None:
            quantize = onnx_ir.node("DynamicQuantizeLinear", [activation], num_outputs=3, name=f"{name}_quantize")
            return [quantize, onnx_ir.node("DequantizeLinear", list(quantize.outputs), name=f"{name}_dequantize")]
        step, zero_level = activation_grid(*self.ranges[activation.name or ""])
        scale, zero = new_initializer(model, f"{name}_scale", step), new_initializer(model, f"{name}_zero", zero_level)
        quantize = onnx_ir.node("QuantizeLinear", [activation, scale, zero], name=f"{name}_quantize")
        return [quantize, onnx_ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}_dequantize")]


class SwitchedGraph:
    """A :class:`hfaccel.runtime.session.Runner` whose MatMuls are quantized as the last :meth:`switch_on` said; none at first.

    Args:
        model: the float graph; it is not changed.
        names: of the MatMuls that can be switched, each with a constant weight.
        trips: what quantizing does to the factors of a MatMul.
        workdir: where the graph may lie meanwhile.

    Attributes:
        names: the MatMuls, in the order given.
    """

    def __init__(self, model: onnx_ir.Model, names: Sequence[str], trips: RoundTrips, *, workdir: Path) -> None:
        self.names = tuple(names)
        workdir.mkdir(parents=True, exist_ok=True)
        switched = _with_switches(model, self.names, trips)
        path = save_graph(switched, workdir)
        del switched
        gc.collect()  # graphs are full of reference cycles, and the session is about to hold all weights once more
        self._session = GraphSession(path)
        self.input_names = tuple(name for name in self._session.input_names if name != FLAGS)
        self._flags = np.zeros(len(self.names), dtype=bool)

    def switch_on(self, names: Sequence[str]) -> None:
        """Quantize exactly these MatMuls."""
        wanted = set(names)
        self._flags = np.array([name in wanted for name in self.names], dtype=bool)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, see :meth:`hfaccel.runtime.session.GraphSession.run`."""
        return self._session.run({**feeds, FLAGS: self._flags})


def _with_switches(model: onnx_ir.Model, names: Sequence[str], trips: RoundTrips) -> onnx_ir.Model:
    import onnx_ir

    copy = model.clone()
    flags = onnx_ir.Value(name=FLAGS, shape=onnx_ir.Shape([len(names)]), type=onnx_ir.TensorType(onnx_ir.DataType.BOOL))
    copy.graph.inputs.append(flags)
    nodes = {node.name: node for node in copy.graph}
    for index, name in enumerate(names):
        matmul = nodes[name]
        activation, weight = matmul.inputs
        assert activation is not None and weight is not None and weight.const_value is not None  # the caller named such MatMuls
        rounded = trips.weight(name, weight.const_value.numpy())
        position = new_initializer(copy, f"{name}_flag_index", np.array(index, dtype=np.int64))
        flag = onnx_ir.node("Gather", [flags, position], name=f"{name}_flag")
        trip = trips.activation(copy, matmul)
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

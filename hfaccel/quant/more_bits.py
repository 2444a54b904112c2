"""MatMuls of a graph in 4 bit that get 8 bits after all, for the answers feel their rounding most."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.weight_only import EIGHT_BITS, read_blocks, save_compact, store_in_blocks
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import load_graph, new_initializer, save_graph

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir

    from hfaccel.recipe.schema import Rung


def float_weights(model: onnx_ir.Model, names: Collection[str]) -> dict[str, np.ndarray]:
    """The weights [in, out] of the named MatMuls of a float graph."""
    weights = {node.name: node.inputs[1] for node in model.graph if node.name in names}
    return {
        name: weight.const_value.numpy()
        for name, weight in weights.items()
        if name is not None and weight is not None and weight.const_value is not None
    }


def write_with_eight_bits(
    graph: Path, weights: Mapping[str, np.ndarray], rung: Rung, folder: Path, *, own_data_file: bool = False
) -> Path:
    """Write a graph whose MatMuls are stored in blocks, some of them anew from their float weights with 8 bits.

    Args:
        graph: in 4 bit; it is not changed, unless it lies in ``folder``.
        weights: by name of the MatMul, from :func:`float_weights`.
        rung: its block size.
        folder: receives the graph.
        own_data_file: keep the weights in a file of their own, however small.
    """
    model = load_graph(graph)
    for node in model.graph:
        name = node.name or ""
        if name in weights:
            weight = new_initializer(model, f"{name}_anew", weights[name])
            node.op_type, node.domain = "MatMul", ""
            node.attributes.clear()
            node.resize_inputs(2)
            node.replace_input_with(1, weight)
    drop_unused(model)
    store_in_blocks(rung.model_copy(update={**EIGHT_BITS, "eight_bit": ()}), model, weights)
    return save_graph(model, folder) if own_data_file else save_compact(model, folder)


@dataclass(frozen=True)
class StoredTrips:
    """The round trips (:class:`hfaccel.quant.switches.RoundTrips`) of weights as a graph has stored them in blocks.

    Activations stay as they are: rounding them turns any difference into one of its own size, in which those of single weights drown.

    Attributes:
        nodes: ``MatMulNBits`` by name.
    """

    nodes: Mapping[str, onnx_ir.Node]

    def weight(self, matmul: str, weight: np.ndarray) -> np.ndarray:
        """The stored weight [in, out]."""
        return read_blocks(self.nodes[matmul]).dequantized(len(weight))

    def activation(self, _model: onnx_ir.Model, matmul: onnx_ir.Node) -> list[onnx_ir.Node]:
        """What gives the activation back."""
        import onnx_ir

        assert matmul.inputs[0] is not None  # a MatMul has two inputs
        return [onnx_ir.node("Identity", [matmul.inputs[0]], name=f"{matmul.name}_as_it_is")]

"""Feed-forward blocks written by hand, and what runs of them show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir

from hfaccel.quant.calibration import ActivationStatistics, observe
from hfaccel.quant.scheme import matmul_sites
from hfaccel.rewrites.graphs import save_graph
from hfaccel.runtime.session import GraphSession


def finish_graph(model: onnx_ir.Model, value: onnx_ir.Value, widths: Mapping[onnx_ir.Node, int]) -> onnx_ir.Model:
    """The model from its input ``x`` over nodes, each with the width of its result, to ``y``, which is the last result negated."""
    for node, width in widths.items():
        output = node.outputs[0]
        output.name, output.type = f"{node.name}_value", value.type
        output.shape = onnx_ir.Shape(["batch", "sequence", width])
    *_, last = widths
    result = onnx_ir.node("Neg", last.outputs, outputs=[onnx_ir.val("y", onnx_ir.DataType.FLOAT, None)])
    model.graph.extend([*widths, result])
    model.graph.inputs.append(value)
    model.graph.outputs.extend(result.outputs)
    return model


def statistics_of(model: onnx_ir.Model, values: np.ndarray, workdir: Path) -> dict[str, ActivationStatistics]:
    return observe(model, [site.activation for site in matmul_sites(model)], [{"x": values}], workdir=workdir)


def answers(model: onnx_ir.Model, values: np.ndarray, folder: Path) -> np.ndarray:
    folder.mkdir()
    return GraphSession(save_graph(model, folder)).run({"x": values})["y"]

"""Which MatMuls move the model's answers most when only they are quantized: one session, no labels.

Every candidate MatMul reads its activation through an 8-bit round trip that a flag switches on. So a graph is built once and
run once per MatMul, instead of one quantized graph each. The rounding of weights (per channel, far finer) is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.calibration import Feeds
from hfaccel.quant.scheme import matmul_sites, new_initializer
from hfaccel.rewrites.graphs import save_graph
from hfaccel.runtime.session import GraphSession

if TYPE_CHECKING:
    import onnx_ir

FLAGS = "quantize_flags"


def rank_by_sensitivity(
    model: onnx_ir.Model,
    batches: Sequence[Feeds],
    *,
    exclude: Collection[str],
    workdir: Path,
) -> list[tuple[str, float]]:
    """MatMul names with the relative squared error of the outputs when only that one is quantized, worst first."""
    names = [site.node for site in matmul_sites(model) if site.node not in exclude]
    workdir.mkdir(parents=True, exist_ok=True)
    session = GraphSession(save_graph(_with_switches(model, names), workdir))

    def outputs(flags: np.ndarray) -> list[np.ndarray]:
        return [array for feeds in batches for array in session.run({**feeds, FLAGS: flags}).values()]

    reference = outputs(np.zeros(len(names), dtype=bool))
    errors = []
    for index in range(len(names)):
        flags = np.zeros(len(names), dtype=bool)
        flags[index] = True
        errors.append(_relative_error(reference, outputs(flags)))
    return sorted(zip(names, errors, strict=True), key=lambda item: -item[1])


def _with_switches(model: onnx_ir.Model, names: Sequence[str]) -> onnx_ir.Model:
    import onnx_ir

    copy = model.clone()
    flags = onnx_ir.Value(name=FLAGS, shape=onnx_ir.Shape([len(names)]), type=onnx_ir.TensorType(onnx_ir.DataType.BOOL))
    copy.graph.inputs.append(flags)
    nodes = {node.name: node for node in copy.graph}
    for index, name in enumerate(names):
        matmul = nodes[name]
        position = new_initializer(copy, f"{name}_flag_index", np.array(index, dtype=np.int64))
        flag = onnx_ir.node("Gather", [flags, position], name=f"{name}_flag")
        quantize = onnx_ir.node("DynamicQuantizeLinear", [matmul.inputs[0]], num_outputs=3, name=f"{name}_quantize")
        dequantize = onnx_ir.node("DequantizeLinear", list(quantize.outputs), name=f"{name}_dequantize")
        choose = onnx_ir.node("Where", [flag.outputs[0], dequantize.outputs[0], matmul.inputs[0]], name=f"{name}_choose")
        for node in (flag, quantize, dequantize, choose):
            for number, output in enumerate(node.outputs):
                output.name = f"{node.name}_{number}"
        copy.graph.insert_before(matmul, [flag, quantize, dequantize, choose])
        matmul.replace_input_with(0, choose.outputs[0])
    return copy


def _relative_error(reference: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    difference = sum(float(np.square(a - b).sum()) for a, b in zip(reference, actual, strict=True))
    return difference / max(1e-30, sum(float(np.square(a).sum()) for a in reference))

"""Ask a part of a graph what it computes by running it: for rewrites whose pattern is a matter of numbers, not of names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

_LARGEST_CONSTANT = 4096
"""Elements; masks and shapes are made of small constants, and what reads a larger one is more than that."""


def ancestors(
    value: onnx_ir.Value, stop: Collection[onnx_ir.Value], *, largest: int | None = _LARGEST_CONSTANT
) -> list[onnx_ir.Node] | None:
    """The nodes that compute ``value`` from the values in ``stop`` and small constants, in no order; None if it needs others.

    Args:
        value: to be computed.
        stop: values that are given.
        largest: elements of a constant that still counts as small; None: all do.
    """
    found: dict[onnx_ir.Node, None] = {}
    todo = [value]
    while todo:
        current = todo.pop()
        if current in stop:
            continue
        if current.const_value is not None:
            if largest is not None and current.const_value.size > largest:
                return None
            continue
        node = current.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node not in found:
            found[node] = None
            todo.extend(item for item in node.inputs if item is not None)
    return list(found)


def reads_more_than_shapes(nodes: Collection[onnx_ir.Node], values: Collection[onnx_ir.Value]) -> bool:
    """Whether any of the nodes reads the elements of one of the values, not just its shape."""
    return any(value in node.inputs and node.op_type != "Shape" for node in nodes for value in values)


def run_part(
    model: onnx_ir.Model, value: onnx_ir.Value, feeds: Mapping[onnx_ir.Value, np.ndarray], nodes: Collection[onnx_ir.Node]
) -> np.ndarray | None:
    """What ``value`` is when the values in ``feeds`` are what they say; None if the nodes cannot be run on them.

    Args:
        model: the graph.
        value: to compute.
        feeds: value -> array.
        nodes: from :func:`ancestors`.
    """
    import onnx
    import onnx_ir
    import onnxruntime

    members = set(nodes)
    ordered = [node for node in model.graph if node in members]
    read = [item for node in ordered for item in node.inputs if item is not None]
    constants = {item.name: item.const_value.numpy() for item in read if item.const_value is not None}
    inputs = [
        onnx.helper.make_tensor_value_info(item.name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for item, array in feeds.items()
    ]
    output = onnx.helper.make_empty_tensor_value_info(value.name)
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph([onnx_ir.to_proto(node) for node in ordered], "part", inputs, [output], initializers)
    opsets = [onnx.helper.make_opsetid("", model.graph.opset_imports.get("", 20))]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        wanted = {item.name for item in session.get_inputs()}
        return np.asarray(session.run(None, {item.name: array for item, array in feeds.items() if item.name in wanted})[0])
    except Exception:  # its errors have no base class below; a graph that fits no such feeds is not the pattern
        return None

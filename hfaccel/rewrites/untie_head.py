"""A language model's head that reads the transposed embedding table gets a weight of its own.

A quantizer looks for constants, and a product with a transposed constant is none: the head, the largest product of a decoding step, would
stay in float. The float graph grows by the table; quantized, head and table are stored in different forms anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.graphs import new_initializer

if TYPE_CHECKING:
    import onnx_ir

HEAD_SUFFIX = "_untied"


def untie_head(model: onnx_ir.Model) -> int:
    """Make constants of the transposed constants that MatMuls read; returns how many."""
    changed = 0
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Transpose" else None
        if table is None or table.const_value is None or table.name is None or len(table.const_value.shape) != 2:
            continue
        if not all(reader.op_type == "MatMul" for reader in node.outputs[0].consumers()):
            continue
        transposed = np.ascontiguousarray(table.const_value.numpy().T)
        weight = new_initializer(model, f"{table.name}{HEAD_SUFFIX}", transposed)
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        changed += 1
    return changed

"""A decoder needs the logits of the last token only: its head then runs on one token per row instead of the whole prompt.

The last token of a row is found by counting its attention mask, because shorter prompts of a batch are padded on the right. The
accuracy gate needs all logits: :func:`all_token_logits` takes the rewrite back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.graphs import new_initializer

if TYPE_CHECKING:
    import onnx_ir

_PICK = "last_token"


def last_token_logits(model: onnx_ir.Model) -> int:
    """Let the product that makes ``logits`` read the last token of each row; returns 1, or 0 where there is no such product.

    ``logits`` become [batch, 1, vocabulary].
    """
    import onnx_ir

    inputs = {value.name: value for value in model.graph.inputs}
    head = _head(model)
    hidden = head.inputs[0] if head is not None else None
    if head is None or hidden is None or any(node.name == _PICK for node in model.graph):
        return 0
    nodes: list[onnx_ir.Node] = []

    def add(operator: str, name: str, *operands: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
        nodes.append(onnx_ir.node(operator, operands, attributes=attributes, name=f"{_PICK}{name}"))
        nodes[-1].outputs[0].name = f"{_PICK}{name}_value"
        return nodes[-1].outputs[0]

    def integers(name: str, values: int | list[int]) -> onnx_ir.Value:
        return new_initializer(model, f"{_PICK}_{name}", np.array(values, dtype=np.int64))

    prefix = "decoder_" if "decoder_input_ids" in inputs else ""  # of encoder and decoder together
    ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
    one, rows, last_axes = integers("one", 1), integers("rows", [1]), integers("axes", [1, 2])
    length = add("ReduceSum", "_length", mask, rows, keepdims=0)
    total = add("Gather", "_total", add("Shape", "_mask_shape", mask), one)
    new = add("Gather", "_new", add("Shape", "_ids_shape", ids), one)
    past = add("Sub", "_past", total, new)
    # Tokens of a row lie at its start: with a past, the row may have fewer than the mask is wide.
    index = add("Sub", "_index", add("Sub", "_own", length, past), one)
    bounded = add("Max", "_at_least_first", index, integers("zero", 0))
    indices = add("Unsqueeze", "_indices", bounded, last_axes)
    picked = add("GatherND", "", hidden, indices, batch_dims=1)
    model.graph.insert_before(head, nodes)
    head.replace_input_with(0, picked)
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    logits.shape = onnx_ir.Shape(["batch", 1, logits.shape[2] if logits.shape is not None else "vocabulary"])
    return 1


def all_token_logits(model: onnx_ir.Model) -> int:
    """The inverse: the logits of all new tokens; returns 1, or 0 where the rewrite was not made."""
    import onnx_ir

    pick = next((node for node in model.graph if node.name == _PICK), None)
    if pick is None:
        return 0
    hidden = pick.inputs[0]
    assert hidden is not None  # made by the function above
    for reader in list(pick.outputs[0].consumers()):
        for position, value in enumerate(reader.inputs):
            if value is pick.outputs[0]:
                reader.replace_input_with(position, hidden)
    logits = next(value for value in model.graph.outputs if value.name == "logits")
    logits.shape = onnx_ir.Shape(["batch", "sequence", logits.shape[2] if logits.shape is not None else "vocabulary"])
    return 1


def _head(model: onnx_ir.Model) -> onnx_ir.Node | None:
    """The product whose result is ``logits``, seen through what works on each value alone (a bias, a soft cap)."""
    value = next((value for value in model.graph.outputs if value.name == "logits"), None)
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type in ("MatMul", "MatMulNBits", "Gemm"):
            return node
        if node.op_type not in ("Add", "Mul", "Div", "Tanh", "Cast"):
            return None
        value = next((item for item in node.inputs if item is not None and item.const_value is None), None)
    return None

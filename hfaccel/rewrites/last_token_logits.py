"""A decoder needs the logits of the last token only: its head then runs on one token per row instead of the whole prompt.

The last token of a row is found by counting its attention mask, because shorter prompts of a batch are padded on the right. Who
checks guessed tokens asks for the output ``kept_logits`` instead, the logits of the last few tokens: the input ``logits_to_keep``
says how many. It has a default, as ONNX allows for inputs that are initializers too, so nobody else needs to know of either.
The accuracy gate needs all logits: :func:`all_token_logits` takes the rewrite back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.graphs import new_initializer
from hfaccel.runtime.generation.decoding import KEPT_LOGITS, LOGITS_TO_KEEP

if TYPE_CHECKING:
    import onnx_ir

LAST_TOKEN = "last_token"
"""Name of the node that picks it."""
_LOGITS = "logits"
_LAST_ROW = f"{LAST_TOKEN}_row"


def last_token_logits(model: onnx_ir.Model) -> int:
    """Let the product that makes ``logits`` read the last token of each row; returns 1, or 0 where there is no such product.

    ``logits`` become [batch, 1, vocabulary], and ``kept_logits`` [batch, logits_to_keep, vocabulary].
    """
    import onnx_ir

    inputs = {value.name: value for value in model.graph.inputs}
    head = _head(model)
    hidden = head.inputs[0] if head is not None else None
    if head is None or hidden is None or any(node.name == LAST_TOKEN for node in model.graph):
        return 0
    nodes: list[onnx_ir.Node] = []

    def add(operator: str, name: str, *operands: onnx_ir.Value, **attributes: int) -> onnx_ir.Value:
        nodes.append(onnx_ir.node(operator, operands, attributes=attributes, name=f"{LAST_TOKEN}{name}"))
        nodes[-1].outputs[0].name = f"{LAST_TOKEN}{name}_value"
        return nodes[-1].outputs[0]

    def integers(name: str, values: int | list[int]) -> onnx_ir.Value:
        return new_initializer(model, f"{LAST_TOKEN}_{name}", np.array(values, dtype=np.int64))

    prefix = "decoder_" if "decoder_input_ids" in inputs else ""  # of encoder and decoder together
    ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}attention_mask"]
    one, columns, last_axis = integers("one", 1), integers("columns", [1]), integers("last_axis", [2])
    kept = new_initializer(model, LOGITS_TO_KEEP, np.array(1, dtype=np.int64))
    model.graph.inputs.append(kept)
    length = add("ReduceSum", "_length", mask, columns, keepdims=1)
    total = add("Gather", "_total", add("Shape", "_mask_shape", mask), one)
    new = add("Gather", "_new", add("Shape", "_ids_shape", ids), one)
    past = add("Sub", "_past", total, new)
    # Tokens of a row lie at its start: with a past, the row may have fewer than the mask is wide.
    end = add("Sub", "_end", length, past)
    counted = add("Range", "_counted", add("Neg", "_first", kept), integers("zero", 0), one)
    bounded = add("Max", "_at_least_first", add("Add", "_index", end, counted), integers("first", 0))
    picked = add("GatherND", "", hidden, add("Unsqueeze", "_indices", bounded, last_axis), batch_dims=1)
    model.graph.insert_before(head, nodes)
    head.replace_input_with(0, picked)
    _give_last_row(model, integers)
    return 1


def all_token_logits(model: onnx_ir.Model) -> int:
    """The inverse: the logits of all new tokens; returns 1, or 0 where the rewrite was not made."""
    pick = next((node for node in model.graph if node.name == LAST_TOKEN), None)
    if pick is None:
        return 0
    hidden = pick.inputs[0]
    assert hidden is not None  # made by the function above
    for reader in list(pick.outputs[0].consumers()):
        for position, value in enumerate(reader.inputs):
            if value is pick.outputs[0]:
                reader.replace_input_with(position, hidden)
    graph = model.graph
    graph.inputs[:] = [value for value in graph.inputs if value.name != LOGITS_TO_KEEP]
    every = last = next(value for value in graph.outputs if value.name == _LOGITS)
    row = last.producer()
    if row is not None and row.name == _LAST_ROW:  # graphs of older versions have no such node
        every = next(value for value in graph.outputs if value.name == KEPT_LOGITS)
        graph.outputs[:] = [every if value is last else value for value in graph.outputs if value is not every]
        graph.remove(row, safe=True)
        every.name = _LOGITS
    every.shape = _logits_shape(every, "sequence")
    return 1


def _give_last_row(model: onnx_ir.Model, integers: Callable[[str, list[int]], onnx_ir.Value]) -> None:
    """Make what was ``logits`` the further output ``kept_logits``, and its last row ``logits``."""
    import onnx_ir

    graph = model.graph
    kept = next(value for value in graph.outputs if value.name == _LOGITS)
    kept.name, kept.shape = KEPT_LOGITS, _logits_shape(kept, LOGITS_TO_KEEP)
    bounds = (integers("row", [-1]), integers("no_row", [np.iinfo(np.int64).max]), integers("row_axis", [1]))
    row = onnx_ir.node("Slice", [kept, *bounds], name=_LAST_ROW)
    last = row.outputs[0]
    last.name, last.type, last.shape = _LOGITS, kept.type, _logits_shape(kept, 1)
    graph.append(row)
    graph.outputs[:] = [*(last if value is kept else value for value in graph.outputs), kept]


def _logits_shape(logits: onnx_ir.Value, tokens: str | int) -> onnx_ir.Shape:
    import onnx_ir

    return onnx_ir.Shape(["batch", tokens, logits.shape[2] if logits.shape is not None else "vocabulary"])


def _head(model: onnx_ir.Model) -> onnx_ir.Node | None:
    """The product whose result is ``logits``, seen through what works on each value alone (a bias, a soft cap)."""
    value = next((value for value in model.graph.outputs if value.name == _LOGITS), None)
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

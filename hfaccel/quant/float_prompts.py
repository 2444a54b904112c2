"""Several new tokens at once attend in float, although the cache that they are stored in holds 8-bit integers.

    GroupQueryAttention(8-bit past)  ->  If(several new tokens,
                                           GroupQueryAttention(float past), what is new rounded to 8 bit,
                                           GroupQueryAttention(8-bit past))

onnxruntime's kernel for a cache of integers is made for one new token: it reads a quarter of the bytes, and 32 rows of 192 tokens take 14 ms
in place of 24 (SmolLM2). For a prompt it computes one dot product after the other where a float cache gets a matrix product: 34 ms in place of 10
for 128 tokens, 400 in place of 82 for 512. So a graph that reads prompts turns what it finds of the past into float (nothing, mostly), and only
what it adds is rounded, with the scales of :mod:`hfaccel.quant.quantize_cache` and as that kernel rounds.

The cache is then not written in place where several tokens are new: the graph gives the tokens from the first to the last, and the run time
takes the new ones. The input ``attend_in_float``, true unless it is fed, lets the accuracy gate read many tokens as steps do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.cached_attention import CACHE_BITS, PASTS, QUANTIZATION_KINDS, SCALES, attentions
from hfaccel.rewrites.graphs import PROMPT_INTEGERS, new_initializer, read_instead, shared_initializer, shared_integers
from hfaccel.runtime.generation.decoding import ATTEND_IN_FLOAT

if TYPE_CHECKING:
    import onnx_ir

_TOKENS = 2
"""Axis of keys and values [batch, heads, tokens, channels]."""


def attend_in_float(model: onnx_ir.Model) -> int:
    """Rewrite every attention of a graph whose cache has 8 bits; returns their number."""
    chosen = [node for node in attentions(model) if node.attributes.get_int(CACHE_BITS, 0) == 8]
    if chosen:
        several, past_length = _lengths(model, chosen[0])
        for node in chosen:
            _choose(model, node, several, past_length)
    return len(chosen)


def _lengths(model: onnx_ir.Model, first: onnx_ir.Node) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """Whether several tokens are new and attend in float, and how many tokens [1] are not new, computed before the first attention."""
    import onnx_ir

    inputs = {value.name: value for value in model.graph.inputs}
    nodes = _Nodes("prompt_lengths")
    wanted = new_initializer(model, ATTEND_IN_FLOAT, np.array(True))
    model.graph.inputs.append(wanted)
    columns = shared_integers(model, PROMPT_INTEGERS, 1)
    new, total = (
        nodes.add("Gather", what, nodes.add("Shape", f"{what}_shape", inputs[name]), columns)
        for what, name in (("new", "input_ids"), ("total", "attention_mask"))
    )
    several = nodes.add("Greater", "several", new, columns)  # [1]
    chosen = nodes.add("And", "in_float", several, wanted)
    past_length = nodes.add("Sub", "past", total, new)
    for value, dtype in ((chosen, onnx_ir.DataType.BOOL), (past_length, onnx_ir.DataType.INT64)):
        value.type, value.shape = onnx_ir.TensorType(dtype), onnx_ir.Shape([1])
    model.graph.insert_before(first, nodes.made)
    return chosen, past_length


def _choose(model: onnx_ir.Model, node: onnx_ir.Node, several: onnx_ir.Value, past_length: onnx_ir.Value) -> None:
    """Put an attention into the branch for single tokens, beside one in float."""
    import onnx_ir

    name = node.name or ""
    choice = onnx_ir.node("If", [several], num_outputs=len(node.outputs), name=f"{name}_of_several")
    model.graph.insert_before(node, choice)
    for before, value in zip(node.outputs, choice.outputs, strict=True):
        read_instead(before, value)
    in_float = _in_float(model, node, past_length)
    model.graph.remove(node)
    in_integers = onnx_ir.Graph([], list(node.outputs), nodes=[node], name=f"{name}_in_integers")
    for branch, graph in (("then_branch", in_float), ("else_branch", in_integers)):
        choice.attributes[branch] = onnx_ir.AttrGraph(branch, graph)


def _in_float(model: onnx_ir.Model, node: onnx_ir.Node, past_length: onnx_ir.Value) -> onnx_ir.Graph:
    """The branch of an attention in which keys and values are float; its results are those of the attention."""
    import onnx_ir

    name = f"{node.name}_in_float"
    nodes = _Nodes(name)
    from_first, tokens = shared_integers(model, PROMPT_INTEGERS, 0), shared_integers(model, PROMPT_INTEGERS, _TOKENS)
    to_last = shared_integers(model, PROMPT_INTEGERS, np.iinfo(np.int64).max)
    operands, pasts = list(node.inputs[: SCALES[0]]), []
    for place, index, what in zip(PASTS, SCALES, ("key", "value"), strict=True):
        stored, scale = node.inputs[place], node.inputs[index]
        pasts.append(nodes.add("Slice", f"past_{what}", stored, from_first, past_length, tokens))
        levels = nodes.add("Cast", f"past_{what}_levels", pasts[-1], to=onnx_ir.DataType.FLOAT)
        operands[place] = nodes.add("Mul", f"past_{what}_in_float", levels, scale)
    attributes = [attribute for key, attribute in node.attributes.items() if key not in (*QUANTIZATION_KINDS, CACHE_BITS)]
    attention = onnx_ir.Node(node.domain, node.op_type, operands, attributes, num_outputs=len(node.outputs), name=name)
    nodes.take(attention, "attended", "key", "value")
    one = shared_initializer(model, "unit_scale", np.array(1, dtype=np.float32))
    zero = shared_initializer(model, "zero_level", np.array(0, dtype=np.int8))
    presents = []
    for past, index, present, what in zip(pasts, SCALES, attention.outputs[1:], ("key", "value"), strict=True):
        new = nodes.add("Slice", f"new_{what}", present, past_length, to_last, tokens)
        levels = nodes.add("Div", f"new_{what}_levels", new, node.inputs[index])
        rounded = nodes.add("QuantizeLinear", f"new_{what}_rounded", levels, one, zero)
        presents.append(nodes.add("Concat", f"present_{what}", past, rounded, axis=_TOKENS))
    for value, known in zip((attention.outputs[0], *presents), node.outputs, strict=True):
        value.type = known.type
    return onnx_ir.Graph([], [attention.outputs[0], *presents], nodes=nodes.made, name=name)


class _Nodes:
    """New nodes in order, whose names begin alike."""

    def __init__(self, prefix: str) -> None:
        self.made: list[onnx_ir.Node] = []
        self._prefix = prefix

    def add(self, operator: str, what: str, *operands: onnx_ir.Value | None, **attributes: int) -> onnx_ir.Value:
        """A node of one result, which is given back."""
        import onnx_ir

        node = onnx_ir.node(operator, operands, attributes=attributes, name=f"{self._prefix}_{what}")
        self.take(node, what)
        return node.outputs[0]

    def take(self, node: onnx_ir.Node, *results: str) -> None:
        """A node that is made already, and what its results are called."""
        for value, what in zip(node.outputs, results, strict=True):
            value.name = f"{self._prefix}_{what}_value"
        self.made.append(node)

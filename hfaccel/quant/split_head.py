"""A decoder's head in three products, so that the rows of rare tokens can be coarser than the others.

Tokenizers number tokens by how often their training text had them, and tokens added by hand come first or last. What a rounded row costs is the
share of the text that its token is: of SmolLM2's 49,152 tokens the first sixth are 82 % of a news text. In 4 bit, and rounded by what the
calibration texts show (GPTQ), the whole head loses 1.9 % of perplexity there, the rest of it without the ends 0.6 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfaccel.quant.layers import HEAD_PARTS, part_of

if TYPE_CHECKING:
    import onnx_ir

_FIRST, _LAST = 6, 32
"""The sixth of the tokens that comes first and the 32nd that comes last are not rare."""
_ALIGNMENT = 16
"""Kernels compute so many outputs at once."""


def split_head(model: onnx_ir.Model) -> dict[str, tuple[str, ...]]:
    """Split the products of the head; each becomes three and a ``Concat``. The float weights are views, not copies.

    Returns:
        Names of the products that each became; none where the vocabulary is too small for it.
    """
    heads = [node for node in model.graph if node.op_type == "MatMul" and _is_head(node)]
    return {head.name or "": parts for head in heads if (parts := _split(model, head))}


def _is_head(node: onnx_ir.Node) -> bool:
    weight = node.inputs[1]
    return weight is not None and weight.const_value is not None and part_of(weight.name or "") == "head"


def _split(model: onnx_ir.Model, head: onnx_ir.Node) -> tuple[str, ...]:
    import onnx_ir

    weight, logits = head.inputs[1], head.outputs[0]
    assert weight is not None and weight.const_value is not None  # heads are such
    rows = weight.const_value.numpy()  # [channels, vocabulary]
    tokens = rows.shape[1]
    first, last = (tokens // share // _ALIGNMENT * _ALIGNMENT for share in (_FIRST, _LAST))
    if not last:
        return ()
    parts = []
    bounds = (0, first, tokens - last, tokens)
    for name, start, stop in zip(HEAD_PARTS, bounds, bounds[1:], strict=False):
        value = onnx_ir.val(f"{weight.name}{name}", const_value=onnx_ir.Tensor(rows[:, start:stop]))
        model.graph.register_initializer(value)
        parts.append(onnx_ir.node("MatMul", [head.inputs[0], value], name=f"{head.name}{name}"))
    whole = onnx_ir.node("Concat", [part.outputs[0] for part in parts], attributes={"axis": -1}, name=f"{head.name}_all_tokens")
    whole.outputs[0].type, whole.outputs[0].shape = logits.type, logits.shape
    model.graph.insert_before(head, [*parts, whole])
    logits.replace_all_uses_with(whole.outputs[0], replace_graph_outputs=True)
    logits.name, whole.outputs[0].name = None, logits.name
    model.graph.remove(head, safe=True)
    return tuple(part.name or "" for part in parts)

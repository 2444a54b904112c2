"""The attention of an encoder becomes one operator a layer, that looks at the mask only where there is something to mask.

    Reshape, Transpose (query, key, value) -> MatMul -> Add(mask) -> Softmax -> MatMul -> Transpose -> Reshape
    If(every token counts): MultiHeadAttention(query, key, value), else: MultiHeadAttention(query, key, value, mask)

Without a mask onnxruntime computes block by block and never writes down the scores (FlashAttention, Dao et al., arXiv:2205.14135); with one
it adds the mask where it multiplies. A text alone, or texts of one length, have nothing to mask. What computed the mask from the
``attention_mask`` goes as well: two dozen small operators. Whether it masks padding and nothing else is found out by running it.

Exact but for the order of summation. On two cores with AVX2 attention takes 0.73 to 0.95 of the time with nothing to mask, 0.85 to 0.97
with padding; deciding costs some 10 microseconds a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.graphs import shared_initializer
from hfaccel.rewrites.probe import ancestors, reads_more_than_shapes, run_part

if TYPE_CHECKING:
    import onnx_ir

DOMAIN = "com.microsoft"
OPERATOR = "MultiHeadAttention"
_LENGTH = 1100
"""Tokens; windows of local attention are some hundred wide."""
_NEVER = float(np.finfo(np.float32).min)
_MASKED = -1e4
"""What is added to a score that is masked is no larger."""
_PARTS, _KEYS = (0, 2, 1, 3), (0, 2, 3, 1)
"""Permutations that bring [batch, sequence, heads, size] into the layouts of queries and values, and of keys."""


@dataclass(frozen=True)
class _Attention:
    """One attention as it was exported.

    Attributes:
        parts: query, key and value [batch, sequence, heads x size].
        mask: that is added to the scores.
        heads: how many.
        end: gives [batch, sequence, heads x size].
    """

    parts: tuple[onnx_ir.Value, ...]
    mask: onnx_ir.Value
    heads: int
    end: onnx_ir.Node


def fuse_attention(model: onnx_ir.Model) -> int:
    """Fuse every attention of this form whose mask is that of the padding; returns their number."""
    from hfaccel.rewrites.drop_unused import drop_unused

    mask = next((value for value in model.graph.inputs if value.name == "attention_mask"), None)
    found = [_attention(node) for node in model.graph if node.op_type == "Softmax"] if mask is not None else []
    verdicts: dict[onnx_ir.Value, bool] = {}
    fused = 0
    for attention in found:
        if attention is None or mask is None:
            continue
        if attention.mask not in verdicts:
            verdicts[attention.mask] = _masks_padding_only(model, attention.mask, mask)
        if verdicts[attention.mask]:
            _fuse(model, attention, mask)
            fused += 1
    if fused:
        model.graph.opset_imports[DOMAIN] = 1
        drop_unused(model)
    return fused


def _attention(softmax: onnx_ir.Node) -> _Attention | None:
    """What is around a Softmax, if it is an attention with a mask and without a scale of its own."""
    add = _producer(softmax.inputs[0], "Add")
    if add is None or softmax.attributes.get_int("axis", -1) != -1:
        return None
    sides = list(add.inputs)
    products = [_producer(side, "MatMul") for side in sides]
    scores = next((node for node in products if node is not None), None)
    mix, last = _reader(softmax, "MatMul", position=0), None
    if mix is not None:
        last = _reader(mix, "Transpose", position=0)
    end = _reader(last, "Reshape", position=0) if last is not None and _axes(last) == _PARTS else None
    if scores is None or mix is None or end is None or any(_users(node) != 1 for node in (add, scores, softmax, mix)):
        return None
    masks = [side for side, node in zip(sides, products, strict=True) if node is not scores]
    query, key, value = scores.inputs[0], scores.inputs[1], mix.inputs[1]
    split = [_split(item, axes) for item, axes in ((query, _PARTS), (key, _KEYS), (value, _PARTS))]
    if len(masks) != 1 or masks[0] is None or any(item is None for item in split):
        return None
    heads = {item[1] for item in split if item is not None}
    if len(heads) != 1:
        return None
    return _Attention(tuple(item[0] for item in split if item is not None), masks[0], heads.pop(), end)


def _split(value: onnx_ir.Value | None, axes: tuple[int, ...]) -> tuple[onnx_ir.Value, int] | None:
    """What was parted into heads and transposed so, [batch, sequence, heads x size], and the number of heads."""
    transpose = _producer(value, "Transpose")
    reshape = _producer(transpose.inputs[0], "Reshape") if transpose is not None and _axes(transpose) == axes else None
    source = reshape.inputs[0] if reshape is not None else None
    if reshape is None or source is None or source.shape is None or len(source.shape) != 3:
        return None
    parted, width = reshape.outputs[0].shape, source.shape[2]
    if parted is None or len(parted) != 4:
        return None
    heads, size = parted[2], parted[3]
    fits = isinstance(heads, int) and isinstance(size, int) and isinstance(width, int) and heads * size == width
    return (source, heads) if fits and isinstance(heads, int) else None


def _fuse(model: onnx_ir.Model, attention: _Attention, mask: onnx_ir.Value) -> None:
    import onnx_ir

    padding, complete = _conditions(model, mask)
    end, name = attention.end, attention.end.name or ""
    before = end.outputs[0]
    settings = {"num_heads": attention.heads, "scale": 1.0, "mask_filter_value": _NEVER}

    def branch(what: str, *more: onnx_ir.Value | None) -> onnx_ir.Graph:
        node = onnx_ir.node(OPERATOR, [*attention.parts, *more], settings, domain=DOMAIN, name=f"{name}_{what}")
        result = node.outputs[0]
        result.name, result.type, result.shape = f"{before.name}_{what}", before.type, before.shape
        return onnx_ir.Graph([], [result], nodes=[node], name=f"{name}_{what}_graph")

    branches = [
        onnx_ir.AttrGraph("then_branch", branch("complete")),
        onnx_ir.AttrGraph("else_branch", branch("padded", None, padding)),
    ]
    made = onnx_ir.Node("", "If", [complete], branches, name=f"{name}_attention")
    result = made.outputs[0]
    result.type, result.shape = before.type, before.shape
    model.graph.insert_before(end, made)
    before_name = before.name
    before.replace_all_uses_with(result, replace_graph_outputs=True)
    model.graph.remove(end, safe=True)
    result.name = before_name


def _conditions(model: onnx_ir.Model, mask: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Value]:
    """The mask as the operator reads it, int32 [batch, sequence], and whether every token counts; made once for all layers."""
    import onnx_ir

    for node in model.graph:
        if node.name == "attention_complete":
            return _named(model, "attention_padding"), node.outputs[0]
    axes = shared_initializer(model, "attention_axes", np.array([0, 1], dtype=np.int64))
    padding = onnx_ir.node("Cast", [mask], {"to": onnx_ir.DataType.INT32}, name="attention_padding")
    least = onnx_ir.node("ReduceMin", [mask, axes], {"keepdims": 0}, name="attention_least")
    complete = onnx_ir.node("Cast", [least.outputs[0]], {"to": onnx_ir.DataType.BOOL}, name="attention_complete")
    for node in (padding, least, complete):
        node.outputs[0].name = f"{node.name}_value"
    model.graph.insert_before(model.graph[0], [padding, least, complete])
    return padding.outputs[0], complete.outputs[0]


def _named(model: onnx_ir.Model, name: str) -> onnx_ir.Value:
    return next(node.outputs[0] for node in model.graph if node.name == name)


def _masks_padding_only(model: onnx_ir.Model, added: onnx_ir.Value, mask: onnx_ir.Value) -> bool:
    """Whether what is added to scores is 0 for a token that counts and very small for another, whoever looks at it."""
    nodes = ancestors(added, model.graph.inputs)
    if nodes is None or not any(mask in node.inputs for node in nodes):
        return False
    if reads_more_than_shapes(nodes, [value for value in model.graph.inputs if value is not mask]):
        return False  # it depends on the tokens too
    counts = (np.random.default_rng(0).random((3, _LENGTH)) < 0.5).astype(np.int64)
    counts[:, :2], counts[0] = 1, 1
    feeds = {value: counts if value is mask else np.zeros_like(counts) for value in model.graph.inputs}
    bias = run_part(model, added, feeds, nodes)
    if bias is None or bias.ndim != 4 or bias.shape[1] != 1 or bias.shape[3] != _LENGTH:
        return False
    seen = counts[:, None, None, :] == 1
    return bool(np.where(seen, bias == 0, bias <= _MASKED).all())


def _producer(value: onnx_ir.Value | None, operator: str) -> onnx_ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator and node.domain in ("", "ai.onnx") else None


def _reader(node: onnx_ir.Node, operator: str, *, position: int) -> onnx_ir.Node | None:
    """The one that reads what a node gives there, if it is the only one and such an operator."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    reader, place = uses[0]
    return reader if reader.op_type == operator and place == position else None


def _users(node: onnx_ir.Node) -> int:
    return len(list(node.outputs[0].uses()))


def _axes(transpose: onnx_ir.Node) -> tuple[int, ...]:
    return tuple(transpose.attributes.get_ints("perm", ()))

"""What a traced decoder needs before the stages can work on it: constant weights under their parameters' names, fused operators."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.layers import parameter_digests
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import computed_input, new_initializer
from hfaccel.trace.attention_inputs import pack_attention_inputs, rotate_in_attention
from hfaccel.trace.reshapes import merge_reshapes

if TYPE_CHECKING:
    import onnx_ir

HEAD = "lm_head.weight"
_OPSET_OF_RMS_NORM = 23


def tidy(model: onnx_ir.Model, parameters: Mapping[str, np.ndarray], *, positions: int) -> None:
    """Bring a traced decoder into the form of a constructed one, in place.

    Args:
        model: with the names of the contract.
        parameters: of the torch model, by name.
        positions: that a text may have.
    """
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    transpose_weights(model)
    merge_reshapes(model)
    split_gemms(model)
    fuse_for_onnxruntime(model, "cpu")
    split_scaled_products(model)
    standard_norms(model)
    drop_unused(model)
    name_weights(model, parameters)
    # Each step looks at who reads a value: what nobody needs any more must be gone.
    for step in (merge_reshapes, partial(rotate_in_attention, positions=positions), merge_reshapes, pack_attention_inputs):
        step(model)
        drop_unused(model)
    # The operator counts positions by itself.
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.uses() or value.name != "position_ids"]


def transpose_weights(model: onnx_ir.Model) -> None:
    """Make constants of transposed constants: quantizers look for those."""
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        fresh = new_initializer(model, f"{weight.name}.{node.outputs[0].name}", weight.const_value.numpy().T)
        node.outputs[0].replace_all_uses_with(fresh)
        model.graph.remove(node, safe=True)


def split_gemms(model: onnx_ir.Model) -> None:
    """A product with a bias becomes a product and a sum, for the same reason."""
    import onnx_ir

    for node in list(model.graph):
        if node.op_type != "Gemm" or node.attributes.get_int("transA", 0) == 1:
            continue
        if any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            continue
        value, weight, *rest = node.inputs
        if value is None or weight is None or weight.const_value is None:
            continue
        if node.attributes.get_int("transB", 0) == 1:
            weight = new_initializer(model, f"{weight.name}.{node.outputs[0].name}", weight.const_value.numpy().T)
        value, shape = _unflattened(value, node.outputs[0])
        product = onnx_ir.node("MatMul", [value, weight])
        last, made = product.outputs[0], [product]
        if rest and rest[0] is not None:
            made.append(onnx_ir.node("Add", [last, rest[0]]))
        old = node.outputs[0]
        for item in made:
            item.outputs[0].name = f"{old.name}_{item.op_type.lower()}"
            item.outputs[0].type, item.outputs[0].shape = old.type, shape
        model.graph.insert_before(node, made)
        old.replace_all_uses_with(made[-1].outputs[0], replace_graph_outputs=True)
        made[-1].outputs[0].name = old.name
        model.graph.remove(node, safe=True)


def _unflattened(value: onnx_ir.Value, product: onnx_ir.Value) -> tuple[onnx_ir.Value, onnx_ir.Shape | None]:
    """The operand of a product before rows and tokens were merged, where they are parted right after it; and the product's shape."""
    import onnx_ir

    flatten = value.producer()
    whole = flatten.inputs[0] if flatten is not None and flatten.op_type == "Reshape" else None
    if whole is None or whole.shape is None or len(whole.shape) != 3 or value.shape is None or product.shape is None:
        return value, product.shape
    if whole.shape[2] != value.shape[1]:
        return value, product.shape
    for reader in product.consumers():
        target = reader.inputs[1] if reader.op_type == "Reshape" else None
        if target is None or (target.const_value is not None and 0 in target.const_value.numpy()):
            return value, product.shape
    return whole, onnx_ir.Shape([*whole.shape[:2], product.shape[1]])


def split_scaled_products(model: onnx_ir.Model) -> None:
    """A product with a factor becomes a product and a multiplication (a head with a soft cap is one), for the same reason."""
    import onnx_ir

    for node in list(model.graph):
        flags = ("transA", "transB", "transBatchA", "transBatchB")
        if node.op_type != "FusedMatMul" or any(node.attributes.get_int(flag, 0) for flag in flags):
            continue
        old, alpha = node.outputs[0], node.attributes.get_float("alpha", 1.0)
        product = onnx_ir.node("MatMul", node.inputs, name=node.name)
        factor = new_initializer(model, f"{old.name}_factor", np.array(alpha, dtype=np.float32))
        scaled = onnx_ir.node("Mul", [product.outputs[0], factor])
        product.outputs[0].name = f"{old.name}_product"
        for made in (product, scaled):
            made.outputs[0].type, made.outputs[0].shape = old.type, old.shape
        model.graph.insert_before(node, [product, scaled])
        old.replace_all_uses_with(scaled.outputs[0], replace_graph_outputs=True)
        scaled.outputs[0].name = old.name
        model.graph.remove(node, safe=True)


def standard_norms(model: onnx_ir.Model) -> None:
    """The norm without a mean under its name in ONNX: onnxruntime's own stands in the standard domain, where no checker knows it."""
    changed = [node for node in model.graph if node.op_type == "SimplifiedLayerNormalization" and node.domain == ""]
    for node in changed:
        node.op_type = "RMSNormalization"
    if changed:
        opsets = model.graph.opset_imports
        opsets[""] = max(opsets[""], _OPSET_OF_RMS_NORM)  # what else a decoder has means the same in both


def name_weights(model: onnx_ir.Model, parameters: Mapping[str, np.ndarray]) -> None:
    """Give each matrix of the graph the name of the parameter that it is, or begins with, and the head's the name of a head."""
    digests, head = parameter_digests(parameters.items()), _head(model)
    names: dict[onnx_ir.Value, str] = {}
    for value in model.graph.initializers.values():
        array = value.const_value
        if array is None or len(array.shape) != 2 or not array.dtype.is_floating_point():
            continue
        widths = _widths(value)
        matrix = array.numpy()[:, : widths[0]] if widths else array.numpy()
        name = next((digests[digest] for digest in parameter_digests([("", matrix)]) if digest in digests), None)
        if head is not None and head.inputs[1] is value:
            name = HEAD
        if name is not None and widths:
            name += "_and_up" if len(widths) == 2 and "gate_proj" in name else f"_and_{len(widths) - 1}"
        if name is not None:
            names[value] = name
    for number, value in enumerate(names):  # out of each other's way: tied weights have one name at first
        value.name = f"renamed_{number}"
    taken = set(model.graph.initializers)
    for value, name in names.items():
        while name in taken:
            name = f"{name}_again"
        taken.add(name)
        value.name = name


def _head(model: onnx_ir.Model) -> onnx_ir.Node | None:
    """The product that gives the logits, behind what works on each value alone."""
    node = model.graph.outputs[0].producer()
    while node is not None and node.op_type in ("Add", "Mul", "Div", "Tanh", "Cast"):
        value = computed_input(node)
        node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "MatMul" else None


def _widths(weight: onnx_ir.Value) -> list[int]:
    """Columns of the weights that a packed one was made of; empty where it is none."""
    readers = list(weight.consumers())
    if len(readers) != 1 or readers[0].op_type != "MatMul" or not (weight.name or "").startswith("packed_"):
        return []
    reader = next(iter(readers[0].outputs[0].consumers()), None)
    if reader is not None and reader.op_type == "GroupQueryAttention" and weight.shape is not None:
        heads, groups = (reader.attributes.get_int(name, 1) for name in ("num_heads", "kv_num_heads"))
        size = int(str(weight.shape[1])) // (heads + 2 * groups)
        return [heads * size, groups * size, groups * size]
    sizes = reader.inputs[1] if reader is not None and reader.op_type == "Split" and len(reader.inputs) > 1 else None
    return list(sizes.const_value.numpy().tolist()) if sizes is not None and sizes.const_value is not None else []

"""Which layer and part of the model each MatMul of a graph is: exporters forget it, the weights tell.

The exported graph holds the parameters of the checkpoint bit for bit (transposed, mostly), so a digest of a MatMul's constant
finds the parameter's name, and the name says where it belongs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.scheme import matmul_sites

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.recipe.schema import Part

_LAYER = re.compile(r"\.(?:layers?|h|blocks?|albert_layers|layer_groups)\.(\d+)\.")
# The first pattern that occurs in a parameter's name names its role; order matters (output.dense is in attention.output.dense).
_ROLES = (
    ("query", r"\b(query|query_proj|q_lin|q_proj|q)\b"),
    ("key", r"\b(key|key_proj|k_lin|k_proj|k)\b"),
    ("value", r"\b(value|value_proj|v_lin|v_proj|v)\b"),
    ("query, key, value", r"\b(Wqkv|qkv)\b"),
    ("gate, up", r"gate_proj\.weight.*_and_up"),
    ("gate", r"\bgate_proj"),
    ("output", r"\b(attention\.output|attn\.(o|Wo|out_proj)|out_lin|attention\.dense|o_proj)\b"),
    ("up", r"\b(intermediate\.dense|lin1|mlp\.Wi|ffn|up_proj|fc1)\b"),
    ("down", r"\b(output\.dense|lin2|mlp\.Wo|ffn_output|down_proj|fc2)\b"),
)


RARE_TOKENS = "_rare_tokens"
HEAD_PARTS = ("_first_tokens", RARE_TOKENS, "_last_tokens")
"""Suffixes of a head in parts, of products and of weights, see :mod:`hfaccel.quant.split_head`."""
_HEAD = re.compile(rf"lm_head|embed_out|_untied(_rotated)?({'|'.join(HEAD_PARTS)})?$")
_PARTS: Mapping[str, Part] = {
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "query, key, value": "attention",
    "output": "attention",
    "down": "down",
}


@dataclass(frozen=True)
class MatMulPlace:
    """A MatMul of the float graph; ``layer`` is None beside the layers, ``role`` then the parameter's name or ``other``."""

    name: str
    layer: int | None
    role: str

    @property
    def part(self) -> Part | None:
        """Which part of a decoder it belongs to; None where no rung has a word for it."""
        if self.layer is None:
            return "head" if _HEAD.search(self.role) else None
        return _PARTS.get(self.role)


def parameter_digests(parameters: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
    """Digest -> parameter name, of all matrices, as they are and transposed."""
    digests: dict[str, str] = {}
    for name, array in parameters:
        if array.ndim == 2:
            digests.setdefault(_digest(array), name)
            digests.setdefault(_digest(array.T), name)
    return digests


def matmul_places(model: onnx_ir.Model, digests: Mapping[str, str]) -> tuple[MatMulPlace, ...]:
    """Where each quantizable MatMul of a float graph belongs, in graph order.

    Args:
        model: a float graph that no rewrite of weights has touched.
        digests: from :func:`parameter_digests`; empty where the graph's weights have the names of the parameters.
    """
    nodes = {node.name: node for node in model.graph}
    places = []
    for site in matmul_sites(model):
        weight = nodes[site.node].inputs[1]
        assert weight is not None and weight.const_value is not None  # matmul_sites names only such
        parameter = digests.get(_digest(weight.const_value.numpy()), "") if digests else weight.name or ""
        places.append(_place(site.node, parameter))
    return tuple(places)


def part_of(parameter: str) -> Part | None:
    """Which part of a decoder a parameter belongs to, by its name."""
    return _place("", parameter).part


def weight_name(matmul: onnx_ir.Node) -> str:
    """Name of the constant that a product multiplies by, which may be its parameter's."""
    weight = matmul.inputs[1]
    return "" if weight is None else weight.name or ""


def has_eight_bits(parameter: str, parts: Collection[Part]) -> bool:
    """Whether a parameter is of one of the parts that have 8 bits whatever the others have; of a head in parts, not the rare tokens."""
    return part_of(parameter) in parts and not parameter.endswith(RARE_TOKENS)


def _place(node: str, parameter: str) -> MatMulPlace:
    layer = _LAYER.search(parameter)
    if layer is None:
        return MatMulPlace(node, None, parameter or "other")
    role = next((role for role, pattern in _ROLES if re.search(pattern, parameter)), "other")
    return MatMulPlace(node, int(layer.group(1)), role)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.shape}".encode() + np.ascontiguousarray(array, dtype=np.float32).tobytes()).hexdigest()

"""What mobius 0.1.0 gets wrong in the decoders that it constructs, corrected after the config and the torch module.

Where layers differ in attention (Gemma 2 and 3, Qwen with some sliding layers) its fusion into ``GroupQueryAttention`` drops the mask
that holds the sliding window (of Gemma 2 it would have been that of the other layers), and gives all layers the rotary tables of the
first. Gemma 3's attention is scaled by the head's size whatever the config says, and the scale of Gemma's embeddings is rounded.

Short texts do not show a lost window, so the parity gate alone would not see it: :func:`check_windows` reads the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.errors import ExportError
from hfaccel.rewrites.graphs import constant_input, new_initializer

if TYPE_CHECKING:
    import onnx_ir
    import torch

WINDOW = "local_window_size"
"""Of ``GroupQueryAttention``: how many tokens a token sees, itself included, as ``sliding_window`` of the configs counts them."""
SLIDING, FULL = "sliding_attention", "full_attention"
_PAST_KEY, _COSINES, _SINES = 3, 7, 8
_CHANGING_ROTARY_TYPES = ("dynamic", "longrope")
_NO_WINDOW = -1


def correct_decoder(model: onnx_ir.Model, module: torch.nn.Module) -> None:
    """Windows, rotary tables and scales as the source has them.

    Args:
        model: a decoder that mobius constructed; changed in place.
        module: the source in torch, with its ``config``.

    Raises:
        ExportError: the graph cannot be made to do what the config says.
    """
    config: Any = module.config
    windows = sliding_windows(config)
    attentions = attention_nodes(model)
    for layer, node in attentions.items():
        _set_window(node, windows.get(layer))
    check_windows(attentions, windows)
    _correct_rotary_tables(model, attentions, module)
    if _declared(config, "query_pre_attn_scalar") is not None:
        _set_scale(attentions, float(config.query_pre_attn_scalar) ** -0.5)
    _correct_embedding_scale(model, module)


def sliding_windows(config: Any) -> dict[int, int]:
    """Layers that see a window only, and its tokens.

    Raises:
        ExportError: a layer attends in another way than to all or to a window.
    """
    window, kinds = _declared(config, "sliding_window"), _declared(config, "layer_types")
    layers = range(int(config.num_hidden_layers))
    if kinds is None:
        return {} if window is None else dict.fromkeys(layers, int(window))
    unknown = sorted(set(kinds) - {SLIDING, FULL})
    if unknown or len(kinds) != len(layers):
        found = f"layer_types has {', '.join(unknown)}" if unknown else f"layer_types names {len(kinds)} of {len(layers)} layers"
        raise ExportError(
            f"{found}; only {FULL} and {SLIDING} can be constructed, one for each layer",
            where=f"config of model_type {config.model_type}",
            hint="this checkpoint cannot be compiled as a decoder yet",
        )
    sliding = [layer for layer in layers if kinds[layer] == SLIDING]
    if sliding and window is None:
        raise ExportError(
            f"layer {sliding[0]} is of {SLIDING}, and there is no sliding_window",
            where=f"config of model_type {config.model_type}",
            hint="add sliding_window to config.json",
        )
    return {layer: int(window) for layer in sliding}


def attention_nodes(model: onnx_ir.Model) -> dict[int, onnx_ir.Node]:
    """``GroupQueryAttention`` of each layer, known by the cache that it reads."""
    found: dict[int, onnx_ir.Node] = {}
    for node in model.graph:
        past = node.inputs[_PAST_KEY] if node.op_type == "GroupQueryAttention" else None
        if past is not None and past.name is not None:
            found[int(past.name.split(".")[1])] = node
    return found


def check_windows(attentions: Mapping[int, onnx_ir.Node], windows: Mapping[int, int]) -> None:
    """Refuse a graph in which a sliding layer sees everything, or any layer another window than its own.

    Args:
        attentions: node of each layer.
        windows: tokens of each sliding layer.

    Raises:
        ExportError: naming the first such layer.
    """
    for layer in sorted({*attentions, *windows}):
        expected = windows.get(layer, _NO_WINDOW)
        node = attentions.get(layer)
        found = node.attributes.get_int(WINDOW, _NO_WINDOW) if node is not None else _NO_WINDOW
        if found != expected:
            told = f"a window of {expected} tokens" if expected != _NO_WINDOW else "no window"
            seen = f"a window of {found}" if found != _NO_WINDOW else "none"
            raise ExportError(
                f"by its config layer {layer} has {told}, in the graph it has {seen}: longer texts would be read wrongly",
                where="exporter mobius",
                hint="this architecture cannot be compiled as a decoder yet",
            )


def _declared(config: Any, name: str) -> Any:
    """A value of a config whose class knows it: configs keep stray keys of config.json, which the model never reads."""
    known = hasattr(type(config), name) or name in inspect.signature(type(config).__init__).parameters
    return getattr(config, name, None) if known else None


def _set_window(node: onnx_ir.Node, window: int | None) -> None:
    import onnx_ir

    node.attributes.pop(WINDOW, None)
    if window is not None:
        node.attributes[WINDOW] = onnx_ir.AttrInt64(WINDOW, window)


def _set_scale(attentions: Mapping[int, onnx_ir.Node], scale: float) -> None:
    import onnx_ir

    for node in attentions.values():
        node.attributes["scale"] = onnx_ir.AttrFloat32("scale", scale)


def _correct_rotary_tables(model: onnx_ir.Model, attentions: Mapping[int, onnx_ir.Node], module: torch.nn.Module) -> None:
    """Tables for each kind of layer, where the config has rotary parameters for each kind."""
    config: Any = module.config
    kinds, parameters = _declared(config, "layer_types"), getattr(config, "rope_parameters", None)
    if kinds is None or not isinstance(parameters, Mapping) or not set(kinds) <= set(parameters):
        return
    tables: dict[str, tuple[onnx_ir.Value, onnx_ir.Value]] = {}
    for layer, node in sorted(attentions.items()):
        if node.attributes.get_int("do_rotary", 0) == 0:
            continue
        kind = kinds[layer]
        if kind not in tables:
            rotary = str(parameters[kind].get("rope_type", "default"))
            if rotary in _CHANGING_ROTARY_TYPES:
                raise ExportError(
                    f"rotary embedding of type '{rotary}' changes with the length of the text; tables cannot express it",
                    where=f"rope_parameters of {kind} in config.json",
                    hint="this checkpoint cannot be compiled as a decoder yet",
                )
            cosines, sines = _rotary_tables(module, kind, int(config.max_position_embeddings))
            tables[kind] = (
                new_initializer(model, f"rotary.{kind}.cos", cosines),
                new_initializer(model, f"rotary.{kind}.sin", sines),
            )
        for position, table in zip((_COSINES, _SINES), tables[kind], strict=True):
            node.replace_input_with(position, table)


def _rotary_tables(module: torch.nn.Module, kind: str, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines float32 [positions, rotated channels / 2] of a kind of layer, from the frequencies of the torch module."""
    rotary: Any = next((part for part in module.modules() if hasattr(part, f"{kind}_inv_freq")), None)
    if rotary is None:
        raise ExportError(
            f"the source has no rotary frequencies of its own for {kind}, though its config has",
            where="exporter mobius",
            hint="compile with the version of transformers that hfaccel names",
        )
    frequencies = getattr(rotary, f"{kind}_inv_freq").detach().float().numpy()
    scale = np.float32(getattr(rotary, f"{kind}_attention_scaling", 1.0))
    angles = np.outer(np.arange(positions, dtype=np.float32), frequencies)
    return np.cos(angles) * scale, np.sin(angles) * scale


def _correct_embedding_scale(model: onnx_ir.Model, module: torch.nn.Module) -> None:
    """The factor behind the embedding table without mobius' rounding, where the source has one."""
    hf_model: Any = module.hf_model
    scale = getattr(hf_model.get_input_embeddings(), "scalar_embed_scale", None)
    if scale is None:
        return
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    gather = next((node for node in ids.consumers() if node.op_type == "Gather"), None)
    factor = next((node for node in gather.outputs[0].consumers() if node.op_type == "Mul"), None) if gather is not None else None
    old = constant_input(factor) if factor is not None else None
    if factor is None or old is None:
        raise ExportError(
            f"the source multiplies its embeddings by {float(scale):g}, and the graph does not",
            where="exporter mobius",
            hint="this architecture cannot be compiled as a decoder yet",
        )
    exact = new_initializer(model, "embedding_scale", np.array(scale, dtype=np.float32))
    factor.replace_input_with(next(position for position, value in enumerate(factor.inputs) if value is old), exact)

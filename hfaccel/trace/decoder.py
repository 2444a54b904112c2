"""A decoder's graph from torch: looked at in one run, then traced. Imports torch at its top: import it late."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hfaccel.errors import ExportError, HfaccelError
from hfaccel.trace.attention import AttentionProbe, AttentionWriter, LayerAttention, PassingCache, attention_by

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.artifact.generation import GenerationSettings

CHANGING_ROTARY_TYPES = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on the length of the whole text."""
_PROBED_TOKENS = 3
# Sizes that no two axes share, so that none is taken for another: batch, new tokens, tokens of the past, width of the mask.
_BATCH, _NEW, _PAST, _TOTAL = 2, 3, 5, 8
_MOST_ROWS, _MOST_TOKENS = 1 << 16, 1 << 24


class DecoderModule(torch.nn.Module):
    """A causal language model with the inputs and outputs of the graph, to be traced only.

    Args:
        hf_model: as transformers loaded it.
        layers: how each of its layers attends.
    """

    def __init__(self, hf_model: Any, layers: Sequence[LayerAttention]) -> None:
        super().__init__()
        self.hf_model = hf_model
        self._layers = {item.layer: item for item in layers}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Logits [batch, sequence, vocabulary], then keys and values of each layer.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, total].
            position_ids: int64 [batch, sequence].
            past: float32 [batch, heads, past, head_size], keys before values.
        """
        cache = PassingCache(len(self._layers))
        pairs = list(zip(past[::2], past[1::2], strict=True))
        writer = AttentionWriter(cache, self._layers, pairs, attention_mask)
        with attention_by(self.hf_model, writer):
            logits = _call(self.hf_model, input_ids, position_ids, cache).logits
        return [logits, *(value for layer in range(len(pairs)) for value in writer.present[layer])]


def probe_layers(hf_model: Any, layers: int, context: int) -> tuple[LayerAttention, ...]:
    """How each layer of a causal language model attends, in their order.

    Args:
        hf_model: as transformers loaded it.
        layers: with a cache.
        context: most tokens of a text.

    Raises:
        ExportError: it keeps another state than keys and values, or attends otherwise than to those before a token.
    """
    _refuse_unknown_positions(hf_model)
    cache = PassingCache(layers)
    probe = AttentionProbe(cache, context)
    ids = torch.ones((1, _PROBED_TOKENS), dtype=torch.int64)
    try:
        with torch.inference_mode(), attention_by(hf_model, probe):
            _call(hf_model, ids, torch.arange(_PROBED_TOKENS)[None], cache)
    except HfaccelError:
        raise
    except Exception as error:  # models fail in any way on a cache that is none of theirs
        raise _refused(
            hf_model, f"it does not run on a cache of keys and values alone ({type(error).__name__}: {error})"
        ) from error
    found = [item.layer for item in probe.layers]
    if found != list(range(layers)):
        raise _refused(hf_model, f"{layers} layers have a cache, and {len(found)} of them ask for attention where it can be seen")
    return tuple(probe.layers)


def export_decoder(hf_model: Any, settings: GenerationSettings, *, opset: int) -> onnx_ir.Model:
    """The traced graph as torch's exporter gives it, with the names of the contract.

    Args:
        hf_model: as transformers loaded it.
        settings: the cache that the graph shall have.
        opset: of ONNX.

    Raises:
        ExportError: see :func:`probe_layers`; or the cache of a layer is of another shape.
    """
    layers = probe_layers(hf_model, settings.layers, settings.context_length)
    for item in layers:
        if (item.key_value_heads, item.head_size) != (settings.key_value_heads, settings.head_size):
            raise _refused(
                hf_model,
                f"layer {item.layer} caches {item.key_value_heads} heads of {item.head_size} channels, and the first "
                f"{settings.key_value_heads} of {settings.head_size}",
            )
    shape = (_BATCH, settings.key_value_heads, _PAST, settings.head_size)
    past = [torch.zeros(shape) for _ in range(2 * settings.layers)]
    positions = torch.arange(_PAST, _PAST + _NEW).repeat(_BATCH, 1)
    ids = torch.ones((_BATCH, _NEW), dtype=torch.int64)
    batch = torch.export.Dim("batch", min=1, max=_MOST_ROWS)
    new, seen, total = (
        torch.export.Dim(name, min=1, max=_MOST_TOKENS) for name in ("sequence", "past_sequence", "total_sequence")
    )
    shapes = ({0: batch, 1: new}, {0: batch, 1: total}, {0: batch, 1: new}, [{0: batch, 2: seen} for _ in past])
    try:
        exported = torch.onnx.export(
            DecoderModule(hf_model, layers).eval(),
            (ids, torch.ones((_BATCH, _TOTAL), dtype=torch.int64), positions, past),
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=opset,
            verbose=False,
        )
    except Exception as error:  # torch wraps what went wrong in pages of advice
        raise _refused(hf_model, f"torch cannot export it: {_reason(error)}") from error
    assert exported is not None  # None is returned only when a file name is given
    model: onnx_ir.Model = exported.model
    _name(model, settings.layers)
    return model


def _call(hf_model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Any) -> Any:
    return hf_model(
        input_ids=input_ids,
        attention_mask=None,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
    )


def _refuse_unknown_positions(hf_model: Any) -> None:
    """Refuse what cannot be told the positions of its tokens, or has angles that no position alone determines."""
    if "position_ids" not in inspect.signature(hf_model.forward).parameters:
        raise _refused(hf_model, "it takes no position_ids (ALiBi and other biases of positions are not traced)")
    parameters = getattr(hf_model.config, "rope_parameters", None)
    kinds = [parameters, *parameters.values()] if isinstance(parameters, Mapping) else []
    for kind in kinds:
        rotary = kind.get("rope_type") if isinstance(kind, Mapping) else None
        if rotary in CHANGING_ROTARY_TYPES:
            raise _refused(hf_model, f"rotary embedding of type '{rotary}' changes with the length of the text")


def _reason(error: BaseException) -> str:
    """First line of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _name(model: onnx_ir.Model, layers: int) -> None:
    for value in list(model.graph.initializers.values()):
        value.name = (value.name or "").removeprefix("hf_model.")
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    inputs = ("input_ids", "attention_mask", "position_ids", *(f"past_key_values.{part}" for part in parts))
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, ("logits", *(f"present.{part}" for part in parts)), strict=True):
        value.name = name


def _refused(hf_model: Any, what: str) -> ExportError:
    return ExportError(
        f"the decoder cannot be traced: {what}",
        where=f"exporter traced, model_type {hf_model.config.model_type}",
        hint="this architecture cannot be compiled as a decoder yet",
    )

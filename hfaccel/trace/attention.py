"""Stand-ins for a causal model's attention and cache while it is looked at and traced. Imports torch at its top: import it late.

transformers calls attention through a table of functions, and masks through another (``AttentionInterface``). Under a name of our own
both go to an :class:`AttentionProbe`, which finds out what each layer attends to, or to an :class:`AttentionWriter`, which writes one
``GroupQueryAttention`` a layer into the trace. The cache that the model is handed keeps nothing: that operator does.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hfaccel.errors import ExportError

IMPLEMENTATION = "hfaccel_cached"
"""Under this name our functions stand in the tables of transformers, for as long as a model is traced."""
DOMAIN = "com.microsoft"
_INLINE_ATTENTION = ("GPTJAttention", "CodeGenAttention", "GPTNeoSelfAttention")
"""Classes that compute attention in a method ``_attn(query, key, value, mask)`` of their own instead of asking the table."""


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends.

    Attributes:
        layer: index of its cache.
        heads: of queries.
        key_value_heads: of keys and values, as they are kept.
        head_size: channels of a key.
        value_size: channels of a value.
        scale: of the scores.
        softcap: scores go through ``softcap * tanh(scores / softcap)``; 0 where they do not.
        window: tokens that a token sees, itself included; None for all before it.
        repeats: attention is given keys that were repeated for every head of the queries; what is kept are those before.
    """

    layer: int
    heads: int
    key_value_heads: int
    head_size: int
    value_size: int
    scale: float
    softcap: float = 0.0
    window: int | None = None
    repeats: bool = False


class PassingCache(Cache):  # type: ignore[misc]  # transformers has no types
    """A cache that is always empty, hands new keys and values on, and remembers whose they were.

    Args:
        layers: how many the model has.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(layers)])
        self._last: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values [batch, heads, sequence, channels] as they are."""
        self._last = (layer_idx, key_states, value_states)
        return key_states, value_states

    def take(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Layer, keys and values of the last update, for the attention that follows it.

        Raises:
            ExportError: there was none: the layer attends to keys of another.
        """
        if self._last is None:
            raise ExportError(
                "a layer attends to keys that it did not put into the cache",
                where="exporter traced",
                hint="this architecture cannot be compiled as a decoder yet",
            )
        last, self._last = self._last, None
        return last


class Attending(Protocol):
    """What stands in for attention: query [batch, heads, sequence, channels] in, the same of the values out."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scale: float,
        softcap: float,
        extra: Mapping[str, Any],
    ) -> torch.Tensor:
        """The attention of new tokens."""
        ...

    def mask(self, function: Callable[..., torch.Tensor]) -> torch.Tensor | None:
        """What the model shall hand to :meth:`attend` as its mask."""
        ...


class AttentionProbe:
    """Finds out, in a run on a few tokens, what each layer attends to.

    Args:
        cache: that the model is handed.
        context: most tokens of a text.

    Attributes:
        layers: what was found, in the order of the layers' calls.
    """

    def __init__(self, cache: PassingCache, context: int) -> None:
        self.layers: list[LayerAttention] = []
        self._cache = cache
        self._context = context

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scale: float,
        softcap: float,
        extra: Mapping[str, Any],
    ) -> torch.Tensor:
        """Note the layer; the values of this run are of no interest."""
        layer, cached, _ = self._cache.take()
        _refuse_unknown(layer, extra)
        repeats = _is_repeated(key, cached)
        heads, groups = query.shape[1], cached.shape[1] if repeats else key.shape[1]
        if key.shape[-1] != query.shape[-1] or key.shape[-2] != query.shape[-2] or heads % groups:
            raise _refused(layer, f"its queries are of shape {tuple(query.shape)} and its keys of {tuple(key.shape)}")
        if value.shape[-1] > key.shape[-1]:
            raise _refused(layer, f"its values have {value.shape[-1]} channels and its keys {key.shape[-1]}")
        window = self._window(layer, mask)
        sizes = (heads, groups, key.shape[-1], value.shape[-1])
        self.layers.append(LayerAttention(layer, *sizes, scale, softcap=softcap, window=window, repeats=repeats))
        return query.new_zeros((*query.shape[:3], value.shape[-1]))

    def mask(self, function: Callable[..., torch.Tensor]) -> torch.Tensor:
        """A mask whose every value is the number of tokens that a token sees; 0 where it sees all before it.

        Raises:
            ExportError: the model wants another mask.
        """
        window = self._context
        for query in (self._context - 1, self._context // 2):
            keys = torch.arange(self._context)
            first = torch.zeros((), dtype=torch.int64)
            seen = function(first, first, torch.full((), query, dtype=torch.int64), keys).broadcast_to(keys.shape)
            window = int(seen.sum()) if query == self._context - 1 else window
            if not torch.equal(seen, (keys <= query) & (keys > query - window)):
                raise ExportError(
                    "a token attends to others than those before it, or those of a window before it",
                    where="exporter traced",
                    hint="this architecture cannot be compiled as a decoder yet",
                )
        return torch.full((1, 1, 1, 1), 0.0 if window == self._context else float(window))

    def _window(self, layer: int, mask: torch.Tensor | None) -> int | None:
        values = [] if mask is None else sorted(set(mask.flatten().tolist()))
        if len(values) != 1 or values[0] != int(values[0]) or not 0 <= values[0] < self._context:
            raise _refused(layer, "its mask is not the model's causal mask")
        return int(values[0]) or None


class AttentionWriter:
    """Writes each layer's attention into the trace as one ``GroupQueryAttention`` over its cache.

    Args:
        cache: that the model is handed.
        layers: by index, as the probe found them.
        past: keys and values of each layer, float32 [batch, heads, past, head_size].
        attention_mask: int64 [batch, total].

    Attributes:
        present: of each layer that has been traced, keys and values.
    """

    def __init__(
        self,
        cache: PassingCache,
        layers: Mapping[int, LayerAttention],
        past: Sequence[tuple[torch.Tensor, torch.Tensor]],
        attention_mask: torch.Tensor,
    ) -> None:
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._cache = cache
        self._layers = layers
        self._past = past
        self._total = attention_mask.shape[1]
        self._last_places = (attention_mask.sum(dim=1) - 1).to(torch.int32)
        width = torch.onnx.ops.symbolic("Shape", (attention_mask,), {"start": 1, "end": 2}, dtype=torch.int64, shape=(1,))
        self._width = width.to(torch.int32)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scale: float,
        softcap: float,
        extra: Mapping[str, Any],
    ) -> torch.Tensor:
        """The attention of the new tokens to themselves and to the past."""
        number, *cached = self._cache.take()
        layer = self._layers[number]
        if layer.repeats:
            key, value = cached
        if layer.value_size < layer.head_size:
            value = torch.nn.functional.pad(value, (0, layer.head_size - layer.value_size))
        batch, _, sequence, _ = query.shape
        past_key, past_value = self._past[number]
        attributes: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.key_value_heads, "scale": layer.scale}
        if layer.softcap:
            attributes["softcap"] = layer.softcap
        if layer.window is not None:
            attributes["local_window_size"] = layer.window
        present_shape = (batch, layer.key_value_heads, self._total, layer.head_size)
        attended, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::GroupQueryAttention",
            (*map(_merged, (query, key, value)), past_key, past_value, self._last_places, self._width, *_sinks(extra)),
            attributes,
            dtypes=[torch.float32] * 3,
            shapes=[(batch, sequence, layer.heads * layer.head_size), present_shape, present_shape],
            version=1,
        )
        self.present[number] = (present_key, present_value)
        split: torch.Tensor = attended.view(batch, sequence, layer.heads, layer.head_size).transpose(1, 2)
        return split[..., : layer.value_size] if layer.value_size < layer.head_size else split

    def mask(self, function: Callable[..., torch.Tensor]) -> None:
        """None: the operator knows what to mask."""
        return


@contextmanager
def attention_by(hf_model: Any, attending: Attending) -> Iterator[None]:
    """Let the attention of a model be computed by ``attending`` inside.

    Args:
        hf_model: as transformers loaded it.
        attending: stands in.
    """

    def function(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **options: Any) -> tuple[Any, None]:
        scaling = options.pop("scaling", None)
        scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
        softcap = float(options.pop("softcap", None) or 0.0)
        attended = attending.attend(query, key, value, attention_mask, scale=scale, softcap=softcap, extra=options)
        return attended.transpose(1, 2), None

    def masking(*_: Any, mask_function: Any, **__: Any) -> Any:
        return attending.mask(mask_function)

    before = hf_model.config._attn_implementation
    AttentionInterface.register(IMPLEMENTATION, function)
    AttentionMaskInterface.register(IMPLEMENTATION, masking)
    hf_model.config._attn_implementation = IMPLEMENTATION
    inline = [module for module in hf_model.modules() if type(module).__name__ in _INLINE_ATTENTION]
    for module in inline:
        module._attn = types.MethodType(_inline(attending), module)
    try:
        yield
    finally:
        for module in inline:
            del module._attn
        hf_model.config._attn_implementation = before
        AttentionInterface._global_mapping.pop(IMPLEMENTATION)
        AttentionMaskInterface._global_mapping.pop(IMPLEMENTATION)


def _inline(attending: Attending) -> Callable[..., tuple[torch.Tensor, None]]:
    """The method ``_attn`` of modules that have one: scaled by ``scale_attn`` if at all, with a table of the mask in ``bias``."""

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None) -> tuple[torch.Tensor, None]:
        divisor, table = getattr(module, "scale_attn", None), getattr(module, "bias", None)
        mask = attention_mask
        if isinstance(attending, AttentionProbe) and table is not None:
            mask = attending.mask(lambda _, __, row, columns: table[0, 0, row, columns])
        scale = 1.0 if divisor is None else 1.0 / float(divisor)
        return attending.attend(query, key, value, mask, scale=scale, softcap=0.0, extra={}), None

    return attend


def _refuse_unknown(layer: int, extra: Mapping[str, Any]) -> None:
    if extra.get("position_bias") is not None or extra.get("is_causal") is False:
        raise _refused(layer, "it does not attend causally, or has a bias of positions")


def _refused(layer: int, what: str) -> ExportError:
    return ExportError(
        f"the attention of layer {layer} cannot be traced: {what}",
        where="exporter traced",
        hint="this architecture cannot be compiled as a decoder yet",
    )


def _is_repeated(key: torch.Tensor, cached: torch.Tensor) -> bool:
    """Whether the keys are the cached ones, each repeated for a group of query heads."""
    times, rest = divmod(key.shape[1], cached.shape[1])
    return times > 1 and rest == 0 and torch.equal(key, cached.repeat_interleave(times, dim=1))


def _sinks(extra: Mapping[str, Any]) -> tuple[torch.Tensor | None, ...]:
    """What follows the width of the mask among the operator's inputs, where a layer has a logit of nothing for each head."""
    sinks = extra.get("s_aux")
    return () if sinks is None else (None, None, None, None, sinks)


def _merged(states: torch.Tensor) -> torch.Tensor:
    """[batch, heads, sequence, channels] -> [batch, sequence, heads * channels]."""
    return states.transpose(1, 2).flatten(2)

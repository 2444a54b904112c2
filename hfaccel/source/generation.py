"""What a decoder's config and ``generation_config.json`` say about its cache and about how tokens are chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfaccel.artifact.contract import ENCODER_DECODER_TASKS, TensorSpec, TextSettings
from hfaccel.artifact.generation import GenerationDefaults, GenerationSettings
from hfaccel.errors import ExportError
from hfaccel.source.encoder_decoder import encoder_decoder_settings
from hfaccel.source.model import read_object

if TYPE_CHECKING:
    from hfaccel.source.model import SourceModel

GENERATION_FILE = "generation_config.json"


def generation_settings(source: SourceModel, model: Any, text: TextSettings) -> GenerationSettings:
    """The cache of a decoder, how its tokens are chosen, and what comes before it.

    Args:
        source: the checkpoint.
        model: as transformers loaded it; its config knows the common names of sizes that config files call differently.
        text: of the checkpoint.
    """
    if source.task in ENCODER_DECODER_TASKS:
        return encoder_decoder_settings(source, model.hf_model, text)
    config, wishes = model.config, read_object(source.folder / GENERATION_FILE)
    layers, heads, head_size = _cache_shape(
        model.hf_model, int(config.num_hidden_layers), text.max_length
    ) or _stated_cache_shape(config)
    return GenerationSettings(
        layers=layers,
        key_value_heads=heads,
        head_size=head_size,
        context_length=text.max_length,
        vocabulary_size=int(config.vocab_size),
        end_token_ids=_ids(wishes.get("eos_token_id", config.eos_token_id)),
        pad_token_id=text.pad_token_id,
        defaults=_defaults(wishes),
    )


def _cache_shape(hf_model: Any, layers: int, context: int) -> tuple[int, int, int] | None:
    """Layers, heads and channels of a head as the model itself attends to them; None where that cannot be seen.

    Configs do not always tell: some have one head for all queries under a name of their own, or keys of two parts.
    """
    from hfaccel.trace.decoder import probe_layers

    try:
        first = probe_layers(hf_model, layers, context)[0]
    except ExportError:
        return None
    return layers, first.key_value_heads, first.head_size


def _stated_cache_shape(config: Any) -> tuple[int, int, int]:
    heads = int(config.num_attention_heads)
    head_size = int(getattr(config, "head_dim", None) or int(config.hidden_size) // heads)
    return int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads), head_size


def cache_inputs(settings: GenerationSettings) -> tuple[TensorSpec, ...]:
    """The past of each layer, key before value."""
    return _cache(settings, "past_key_values", "past_sequence")


def cache_outputs(settings: GenerationSettings) -> tuple[TensorSpec, ...]:
    """The present of each layer, key before value."""
    return _cache(settings, "present", "total_sequence")


def _cache(settings: GenerationSettings, name: str, length: str) -> tuple[TensorSpec, ...]:
    shape = ("batch", settings.key_value_heads, length, settings.head_size)
    names = (f"{name}.{layer}.{part}" for layer in range(settings.layers) for part in ("key", "value"))
    return tuple(TensorSpec(item, "float32", shape) for item in names)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in (value if isinstance(value, list) else [value]))


def _defaults(wishes: Mapping[str, Any]) -> GenerationDefaults:
    """As transformers reads the file: what is null or absent has no effect."""
    return GenerationDefaults(
        do_sample=bool(wishes.get("do_sample") or False),
        temperature=float(wishes.get("temperature") or 1.0),
        top_k=int(wishes.get("top_k") or 0),
        top_p=float(wishes.get("top_p") or 1.0),
        min_p=float(wishes.get("min_p") or 0.0),
        repetition_penalty=float(wishes.get("repetition_penalty") or 1.0),
    )

"""What the files of an encoder-decoder say about its sizes, about how an answer begins, and about sound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfaccel.artifact.contract import TensorSpec, TextSettings
from hfaccel.artifact.generation import EncoderSettings, GenerationDefaults, GenerationSettings, SpeechSettings
from hfaccel.errors import SourceError
from hfaccel.source.model import PREPROCESSOR_FILE, read_object

if TYPE_CHECKING:
    from hfaccel.source.model import SourceModel

_LONGEST_ANSWER = 512
"""Of models without a table of positions."""


def encoder_decoder_settings(source: SourceModel, hf_model: Any, text: TextSettings) -> GenerationSettings:
    """Cache, choice of tokens and encoder of a model.

    Args:
        source: the checkpoint.
        hf_model: as transformers loaded it, with its ``generation_config``.
        text: of the checkpoint.

    Raises:
        SourceError: the files of a speech model do not say what its tokens or its features are.
    """
    config, wishes = hf_model.config, hf_model.generation_config
    heads = int(_first(config, "decoder_attention_heads", "num_heads"))
    return GenerationSettings(
        layers=int(_first(config, "decoder_layers", "num_decoder_layers")),
        key_value_heads=heads,
        head_size=int(getattr(config, "d_kv", None) or config.d_model // heads),
        context_length=int(_first(config, "max_target_positions", "max_position_embeddings", otherwise=_LONGEST_ANSWER)),
        vocabulary_size=int(config.vocab_size),
        end_token_ids=_ids(wishes.eos_token_id),
        pad_token_id=text.pad_token_id,
        defaults=_defaults(wishes),
        encoder=_encoder(source, wishes, text),
    )


def decoder_inputs(settings: GenerationSettings) -> tuple[TensorSpec, ...]:
    """What the graph of encoder and decoder together reads beside the cache."""
    new, ids = ("batch", "decoder_sequence"), ("batch", "sequence")
    assert settings.encoder is not None  # asked of encoder-decoders only
    speech = settings.encoder.speech
    frames = 0 if speech is None else speech.window_seconds * speech.sampling_rate_hz // speech.hop_samples
    source = (
        (TensorSpec("input_ids", "int64", ids), TensorSpec("attention_mask", "int64", ids))
        if speech is None
        else (TensorSpec("input_features", "float32", ("batch", speech.mel_bins, frames)),)
    )
    return (
        *source,
        TensorSpec("decoder_input_ids", "int64", new),
        TensorSpec("decoder_attention_mask", "int64", ("batch", "decoder_total")),
        TensorSpec("decoder_position_ids", "int64", new),
    )


def cross_outputs(settings: GenerationSettings) -> tuple[TensorSpec, ...]:
    """Keys and values that the decoder reads of the encoder."""
    shape = ("batch", settings.key_value_heads, "encoded_sequence", settings.head_size)
    names = (f"cross.{layer}.{part}" for layer in range(settings.layers) for part in ("key", "value"))
    return tuple(TensorSpec(name, "float32", shape) for name in names)


def _encoder(source: SourceModel, wishes: Any, text: TextSettings) -> EncoderSettings:
    bad_words = tuple(int(words[0]) for words in wishes.bad_words_ids or () if len(words) == 1)
    start = wishes.decoder_start_token_id if wishes.decoder_start_token_id is not None else wishes.bos_token_id
    if start is None:
        raise SourceError(
            "the files do not say what an answer begins with",
            where=source.id,
            hint="add decoder_start_token_id to generation_config.json",
        )
    return EncoderSettings(
        source_length=text.max_length,
        start_token_ids=_ids(start)[:1],
        forced_first_token_id=_optional(wishes.forced_bos_token_id),
        forced_last_token_id=_optional((_ids(wishes.forced_eos_token_id) or (None,))[0]),
        suppressed_token_ids=(*_ids(wishes.suppress_tokens), *bad_words),
        suppressed_first_token_ids=_ids(wishes.begin_suppress_tokens),
        speech=_speech(source, wishes) if source.task == "automatic-speech-recognition" else None,
    )


def _speech(source: SourceModel, wishes: Any) -> SpeechSettings:
    features = read_object(source.folder / PREPROCESSOR_FILE)
    bins = features.get("feature_size") or source.config.get("num_mel_bins")
    no_timestamps = getattr(wishes, "no_timestamps_token_id", None)
    if not features or bins is None or no_timestamps is None:
        lacking = f"no {PREPROCESSOR_FILE}" if not features else "no no_timestamps_token_id in generation_config.json"
        raise SourceError(f"the checkpoint of a speech model has {lacking}", where=source.id, hint="download it again, whole")
    languages, tasks = getattr(wishes, "lang_to_id", None) or {}, getattr(wishes, "task_to_id", None) or {}
    return SpeechSettings(
        sampling_rate_hz=int(features.get("sampling_rate", 16_000)),
        mel_bins=int(bins),
        fft_samples=int(features.get("n_fft", 400)),
        hop_samples=int(features.get("hop_length", 160)),
        window_seconds=int(features.get("chunk_length", 30)),
        end_of_text_token_id=_ids(wishes.eos_token_id)[0],
        start_of_transcript_token_id=int(wishes.decoder_start_token_id),
        no_timestamps_token_id=int(no_timestamps),
        previous_text_token_id=_optional(getattr(wishes, "prev_sot_token_id", None)),
        most_initial_timestamp=_optional(getattr(wishes, "max_initial_timestamp_index", 50)),
        languages=tuple((str(name).strip("<|>"), int(number)) for name, number in sorted(languages.items())),
        tasks=tuple((str(name), int(number)) for name, number in sorted(tasks.items())),
    )


def _defaults(wishes: Any) -> GenerationDefaults:
    """As transformers resolved them: of ``generation_config.json``, or of old checkpoints of ``config.json``."""
    return GenerationDefaults(
        do_sample=bool(wishes.do_sample or False),
        temperature=float(wishes.temperature or 1.0),
        top_k=int(wishes.top_k or 0) if wishes.do_sample else 0,
        top_p=float(wishes.top_p or 1.0),
        min_p=float(wishes.min_p or 0.0),
        repetition_penalty=float(wishes.repetition_penalty or 1.0),
        num_beams=int(wishes.num_beams or 1),
        length_penalty=float(wishes.length_penalty if wishes.length_penalty is not None else 1.0),
        early_stopping=bool(wishes.early_stopping or False),
        no_repeat_ngram_size=int(wishes.no_repeat_ngram_size or 0),
        min_new_tokens=int(wishes.min_new_tokens or max(0, int(wishes.min_length or 0) - 1)),
    )


def _first(config: Any, *names: str, otherwise: int | None = None) -> Any:
    """The value under the first name that the config has."""
    found = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), otherwise)
    assert found is not None  # every encoder-decoder that can be constructed has one of them
    return found


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in (value if isinstance(value, list | tuple) else [value]))


def _optional(value: Any) -> int | None:
    return None if value is None else int(value)

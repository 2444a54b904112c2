"""The part of a contract that generative models have: the cache, how tokens are chosen, and what comes before the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GenerationDefaults:
    """How tokens are chosen unless a call says otherwise; from ``generation_config.json`` of the checkpoint.

    The last five are of encoder-decoders only; decoders search no beams.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0


@dataclass(frozen=True)
class SpeechSettings:
    """How sound becomes log-mel features, and what the special tokens of a Whisper model mean.

    Attributes:
        sampling_rate_hz: of the sound that the features are made of.
        mel_bins: rows of the features [batch, mel_bins, frames].
        fft_samples: length of a window of the short-time Fourier transform.
        hop_samples: from one window to the next; a frame.
        window_seconds: of sound that the encoder reads at once; shorter sound is padded with silence.
        end_of_text_token_id: ends a transcript.
        start_of_transcript_token_id: begins it.
        no_timestamps_token_id: asks for text without times; the ids after it are times.
        timestamp_step_seconds: between two of these.
        previous_text_token_id: before the text of an earlier window; None where the model has none.
        most_initial_timestamp: as an index of the times; the first time of a window may not be later. None allows any.
        languages: (code, token id) of multilingual models, else empty.
        tasks: (name, token id) of ``transcribe`` and ``translate`` of multilingual models, else empty.
    """

    sampling_rate_hz: int
    mel_bins: int
    fft_samples: int
    hop_samples: int
    window_seconds: int
    end_of_text_token_id: int
    start_of_transcript_token_id: int
    no_timestamps_token_id: int
    timestamp_step_seconds: float = 0.02
    previous_text_token_id: int | None = None
    most_initial_timestamp: int | None = 50
    languages: tuple[tuple[str, int], ...] = ()
    tasks: tuple[tuple[str, int], ...] = ()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SpeechSettings:
        """The inverse of ``dataclasses.asdict``."""
        pairs = {name: tuple((str(key), int(number)) for key, number in data[name]) for name in ("languages", "tasks")}
        return cls(**{**data, **pairs})


@dataclass(frozen=True)
class EncoderSettings:
    """What an encoder-decoder reads before it answers. Its answer does not go on with the text: it begins with ``start_token_ids``.

    Attributes:
        source_length: most tokens of text that the encoder reads; of sound see ``speech``.
        start_token_ids: what the decoder reads first.
        forced_first_token_id: first token of every answer (BART's ``forced_bos_token_id``); None leaves it to the model.
        forced_last_token_id: token that ends an answer which has as many tokens as it may have (``forced_eos_token_id``).
        suppressed_token_ids: never chosen.
        suppressed_first_token_ids: not chosen as the first token of an answer.
        speech: of models that read sound, else None.
    """

    source_length: int
    start_token_ids: tuple[int, ...]
    forced_first_token_id: int | None = None
    forced_last_token_id: int | None = None
    suppressed_token_ids: tuple[int, ...] = ()
    suppressed_first_token_ids: tuple[int, ...] = ()
    speech: SpeechSettings | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EncoderSettings:
        """The inverse of ``dataclasses.asdict``."""
        lists = {name: tuple(data[name]) for name in ("start_token_ids", "suppressed_token_ids", "suppressed_first_token_ids")}
        speech = SpeechSettings.from_json(data["speech"]) if data.get("speech") is not None else None
        return cls(**{**data, **lists, "speech": speech})


@dataclass(frozen=True)
class GenerationSettings:
    """A decoder and its cache. Past and present of layer n are ``past_key_values.n.key``, ``.value`` and ``present.n.key``, ``.value``.

    Shape of each: [batch, key_value_heads, capacity, head_size], float32; where the graph stores them in 8 bit int8, and in 4 bit
    uint8 of half that size, two channels in a byte. Tokens of a row lie at its start whatever the length of the
    others: the graph counts the ones of ``attention_mask`` [batch, past + new], so a batch of prompts is padded on the right.

    Attributes:
        layers: with a cache.
        key_value_heads: heads of keys and values.
        head_size: channels of a head.
        context_length: most tokens of a sequence, prompt and answer together.
        vocabulary_size: logits per token.
        end_token_ids: any of them ends the answer.
        pad_token_id: what fills shorter prompts; any id does, it is masked.
        defaults: how tokens are chosen.
        encoder: of encoder-decoders, else None.
        guess_price: time of one more token in a step of a single row, as a part of the step's: how far guessing ahead pays.
        prompt_graph_rows: from so many rows a step runs on the graph for prompts, which is faster then and holds the accuracy gate; None
            where there is no such graph, or one of the two was not shown.
    """

    layers: int
    key_value_heads: int
    head_size: int
    context_length: int
    vocabulary_size: int
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    defaults: GenerationDefaults = GenerationDefaults()
    encoder: EncoderSettings | None = None
    guess_price: float = 0.25
    prompt_graph_rows: int | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GenerationSettings:
        """The inverse of ``dataclasses.asdict``."""
        ends, defaults = tuple(data["end_token_ids"]), GenerationDefaults(**data["defaults"])
        encoder = EncoderSettings.from_json(data["encoder"]) if data.get("encoder") is not None else None
        return cls(**{**data, "end_token_ids": ends, "defaults": defaults, "encoder": encoder})

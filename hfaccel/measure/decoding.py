"""What is timed of a decoder: reading a prompt, and writing an answer after it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hfaccel.errors import UsageError
from hfaccel.runtime.generation.cache import KeyValueCache
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.decoding import Decoding
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder

_REQUEST = re.compile(r"([1-9][0-9]{0,5})\s*\+\s*([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class Request:
    """One sequence: a prompt of so many tokens, and so many new ones; of sound the prompt is counted in seconds."""

    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.prompt}+{self.new}"


def parse_requests(points: Sequence[str]) -> tuple[Request, ...]:
    """Read ``prompt+new`` points such as ``128+32``; repeated ones count once.

    Raises:
        UsageError: a point is not of that form.
    """
    found = []
    for point in points:
        match = _REQUEST.fullmatch(point.strip())
        if match is None:
            raise UsageError(
                f"'{point}' is no workload of text generation",
                where="workload",
                hint="write prompt+new tokens, for example 128+32",
            )
        found.append(Request(int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(found))


def decoding_calls(
    decoders: Mapping[str, Decoder], requests: Sequence[Request], *, seed: int
) -> Iterator[tuple[str, dict[str, Callable[[], None]]]]:
    """What to time, by name of the point: each prompt as a whole, then the answer to it as a whole.

    Args:
        decoders: by name.
        requests: cut to what the model reads.
        seed: the same seed gives the same tokens.
    """
    for request in requests:
        yield f"prompt of {request.prompt}", {name: _prompt(decoder, request, seed) for name, decoder in decoders.items()}
        answers = {name: _answer(decoder, request, seed) for name, decoder in decoders.items()}
        yield f"{request.new} tokens after {request.prompt}", answers


def answering_calls(
    models: Mapping[str, EncoderDecoder], requests: Sequence[Request], *, seed: int
) -> Iterator[tuple[str, dict[str, Callable[[], None]]]]:
    """What to time of encoder-decoders, by name of the point: the source as a whole, then the answer as a whole.

    Args:
        models: by name.
        requests: cut to what the model reads; a window of sound is always read whole.
        seed: the same seed gives the same sources and tokens.
    """
    for request in requests:
        named = next((_source_name(model, request) for model in models.values()), "")
        yield named, {name: _source(model, request, seed) for name, model in models.items()}
        yield f"{request.new} tokens after it", {name: _answer_of_source(model, request, seed) for name, model in models.items()}


def _source_name(model: EncoderDecoder, request: Request) -> str:
    encoder = model.settings.encoder
    speech = encoder.speech if encoder is not None else None
    return f"source of {request.prompt}" if speech is None else f"{speech.window_seconds} s of sound"


def _source(model: EncoderDecoder, request: Request, seed: int) -> Callable[[], None]:
    feeds = _source_feeds(model, request, seed)

    def read() -> None:
        model.encode(feeds)

    return read


def _answer_of_source(model: EncoderDecoder, request: Request, seed: int) -> Callable[[], None]:
    encoder = model.settings.encoder
    assert encoder is not None  # of encoder-decoders
    start, memory = list(encoder.start_token_ids), model.encode(_source_feeds(model, request, seed))
    cache = model.prefill(memory, [start], room=request.new).cache
    count = max(1, min(request.new, model.settings.context_length - len(start)))
    tokens = np.random.default_rng(seed + 1).integers(0, model.settings.vocabulary_size, count)

    def write() -> None:
        decoding = Decoding(model, cache, start, memory)
        for token in tokens:
            decoding.step(np.array([token], dtype=np.int64))

    return write


def _source_feeds(model: EncoderDecoder, request: Request, seed: int) -> dict[str, np.ndarray]:
    encoder = model.settings.encoder
    assert encoder is not None  # of encoder-decoders
    generator = np.random.default_rng(seed)
    if encoder.speech is not None:
        speech = encoder.speech
        frames = speech.window_seconds * speech.sampling_rate_hz // speech.hop_samples
        return {"input_features": generator.standard_normal((1, speech.mel_bins, frames), dtype=np.float32)}
    length = max(1, min(request.prompt, encoder.source_length))
    ids = generator.integers(0, model.settings.vocabulary_size, (1, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _prompt(decoder: Decoder, request: Request, seed: int) -> Callable[[], None]:
    tokens = _tokens(decoder, request.prompt, seed)

    def read() -> None:
        decoder.prefill([tokens])

    return read


def _answer(decoder: Decoder, request: Request, seed: int) -> Callable[[], None]:
    prompt = _tokens(decoder, request.prompt, seed)
    cache = decoder.prefill([prompt], room=request.new).cache
    return functools.partial(_write, decoder, cache, prompt, _tokens(decoder, request.new, seed + 1))


def _write(decoder: Decoder, cache: KeyValueCache, prompt: list[int], answer: list[int]) -> None:
    """Step over the same tokens each time: what was written before is overwritten."""
    decoding = Decoding(decoder, cache, prompt)
    for token in answer:
        decoding.step(np.array([token], dtype=np.int64))


def _tokens(decoder: Decoder, count: int, seed: int) -> list[int]:
    settings = decoder.settings
    count = max(1, min(count, settings.context_length // 2))
    drawn: list[int] = np.random.default_rng(seed).integers(0, settings.vocabulary_size, count).tolist()
    return drawn

"""Keys and values of a decoder's cache in 8 or 4 bit, each channel of each head with a scale of its own.

A token of a long text reads the whole cache, so its bytes cost memory and time. onnxruntime's ``GroupQueryAttention`` stores keys after
their rotation by position and values as they come: symmetric integers -128 to 127, or -8 to 7 with two channels in a byte, the first in the
lower half. What is outside the range is clipped. Scales are constants of the graph; they come from what the float graph stores on calibration
texts. Keys have channels that are larger than others by far (Liu et al., KIVI, arXiv:2402.02750), so one scale per tensor would lose the small
ones. A prompt is read through the integers as well where one graph does both; beside a cache of 8 bit the graph for prompts reads its own
tokens in float (:mod:`hfaccel.quant.float_prompts`). Either way a row says the same in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from hfaccel.quant.cached_attention import ATTENTION, CACHE_BITS, COS, PASTS, QUANTIZATION_KINDS, SCALES, SIN, attentions
from hfaccel.quant.float_prompts import attend_in_float
from hfaccel.rewrites.graphs import load_graph, new_initializer
from hfaccel.rewrites.score_at_once import score_at_once, scores_at_once
from hfaccel.runtime.generation.decoder import PROMPT_GRAPH_NAME
from hfaccel.runtime.session import GraphSession

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.artifact.contract import Contract, TensorSpec
    from hfaccel.quant.calibration import Feeds

CacheBits = Literal[4, 8]
_QUARTER_TURN = np.pi / 2
_HEADROOMS = tuple(np.linspace(1.05, 1.25, 21))
"""Of the range in 8 bit: a little coarser costs less than clipping what no calibration text has shown."""
_SMALLEST = 1e-6
"""Share of the largest channel: a channel that was never in use gets a scale all the same."""
_SHRINKS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65, 0.58, 0.51)
"""Of a channel's range in 4 bit: clipping the few largest may serve all others better."""
_BATCHES = 4
"""Of calibration: twice as many take twice the time and make no difference that is seen, on other kinds of text either."""
_SAMPLED_TOKENS = 64
"""Of each batch, to choose among these."""


@dataclass
class _Seen:
    """What the float graph stored of one buffer.

    Attributes:
        largest: magnitudes [heads, channels].
        radius: largest length of the pair of channels that are rotated into each other, at both of them; [heads, channels].
        sample: values [tokens, heads, channels] of some tokens.
        first: values [texts, heads, channels] of the first token of each text.
    """

    largest: np.ndarray
    radius: np.ndarray
    sample: list[np.ndarray] = field(default_factory=list)
    first: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class _Rotation:
    """How the operator rotates the keys of a layer.

    Attributes:
        partners: [channels], for each channel the one that it is rotated into; itself where it is not rotated.
        spans: [channels], radians from the first position that the model reads to the last one.
    """

    partners: np.ndarray
    spans: np.ndarray


def why_no_quantized_cache(model: onnx_ir.Model) -> str | None:
    """Why a graph can have no such cache, as a sentence; None where it can."""
    inputs = {value.name or "": value for value in model.graph.inputs}
    if "decoder_input_ids" in inputs:
        return (
            "of encoder-decoders the cache is not quantized yet: its share is small, for what the encoder says is kept beside it"
        )
    pasts = [value for name, value in inputs.items() if name.startswith("past_key_values.")]
    if not pasts:
        return "the model writes no text and keeps no keys and values"
    read = {node.inputs[index] for node in attentions(model) for index in PASTS}
    others = [
        value
        for value in pasts
        if value not in read or any(node.op_type not in (ATTENTION, "Shape") for node in value.consumers())
    ]
    if others:
        return f"{others[0].name} is not read by {ATTENTION} alone, which is what can store integers"
    return None


def quantize_cache(graph: Path, floating: Path, batches: Sequence[Feeds], bits: CacheBits) -> None:
    """Let a decoder's graph, and the one for prompts beside it, store keys and values in integers.

    Args:
        graph: with a float cache; written anew, its file of weights is left as it is.
        floating: the graph that it was made of, whose keys and values the scales are for.
        batches: calibration texts.
        bits: of a key or value.
    """
    store_cache(graph, cache_scales(floating, batches, bits), bits)


def store_cache(graph: Path, scales: Mapping[str, np.ndarray], bits: CacheBits) -> None:
    """:func:`quantize_cache` with scales that are known."""
    import onnx_ir

    steps, prompt_path = load_graph(graph), graph.with_name(PROMPT_GRAPH_NAME)
    if prompt_path.is_file():
        prompts = load_graph(prompt_path)
        if scores_at_once(prompts):
            score_at_once(steps)  # a single token is faster in blocks with a float cache only
        store_in_integers(prompts, scales, bits)
        attend_in_float(prompts)
        onnx_ir.save(prompts, str(prompt_path))  # weights that lie in a file of their own stay there
    store_in_integers(steps, scales, bits)
    onnx_ir.save(steps, str(graph))


def cache_scales(graph: Path, batches: Sequence[Feeds], bits: CacheBits) -> dict[str, np.ndarray]:
    """Scale of every channel, float32 [1, heads, 1, channels], by name of the graph's output (``present.0.key``).

    The range holds all that was seen, and whatever the same keys would be at other positions that the model reads: the texts are shorter
    than what may come. In 4 bit it is clipped where the error over all tokens is the smallest. In 8 bit it is made 5 % to 25 % wider, by
    what gives the first tokens of texts back best. Attention rests on the first token wherever it has nothing to look for, so most
    of its weight falls on one small key and value (an *attention sink*, Xiao et al., arXiv:2309.17453), which hardly depend on the text: rounded
    to few levels their error is the largest part of all, while others average out. It halves the divergence (SmolLM2: 0.0023 with 25 %,
    0.0018 with 10 %, 0.0013 so).

    Args:
        graph: a decoder with a float cache.
        batches: feeds with an ``attention_mask`` and an empty past; the first few are read.
        bits: of a key or value.
    """
    rotations = dict(_rotations(load_graph(graph)))
    seen = _observe(GraphSession(graph), rotations, batches[:_BATCHES])
    scales: dict[str, np.ndarray] = {}
    for name, values in seen.items():
        limits = _limits(values, rotations[name])
        least = max(_SMALLEST * float(limits.max()), float(np.finfo(np.float32).tiny))
        steps = np.maximum(limits, least) / (2 ** (bits - 1) - 1)
        factors, tokens = (_HEADROOMS, values.first) if bits == 8 else (_SHRINKS, values.sample)
        steps = _best_fit(steps, factors, np.concatenate(tokens), bits)
        scales[name] = steps[None, :, None, :].astype(np.float32)
    return scales


def store_in_integers(model: onnx_ir.Model, scales: Mapping[str, np.ndarray], bits: CacheBits) -> None:
    """Give every ``GroupQueryAttention`` its scales, and the graph's past and present their type.

    Args:
        model: a decoder that :func:`why_no_quantized_cache` says nothing of.
        scales: from :func:`cache_scales`.
        bits: of a key or value.
    """
    import onnx_ir

    dtype = onnx_ir.DataType.INT8 if bits == 8 else onnx_ir.DataType.UINT8
    for node in attentions(model):
        node.resize_inputs(max(len(node.inputs), SCALES[-1] + 1))
        for past, index, kind, present in zip(PASTS, SCALES, QUANTIZATION_KINDS, node.outputs[1:3], strict=True):
            name = present.name or ""
            node.replace_input_with(index, new_initializer(model, f"{name}.scale", scales[name]))
            node.attributes[kind] = onnx_ir.AttrString(kind, "PER_CHANNEL")
            width = scales[name].shape[-1] * bits // 8
            for value in (node.inputs[past], present):
                assert value is not None  # why_no_quantized_cache has looked
                value.type = onnx_ir.TensorType(dtype)
                if value.shape is not None:
                    value.shape = onnx_ir.Shape([*value.shape[:-1], width])
        node.attributes[CACHE_BITS] = onnx_ir.AttrInt64(CACHE_BITS, bits)


def with_cache_of(contract: Contract, graph: Path) -> Contract:
    """The contract with type and shape of past and present as a graph has them."""
    import onnx_ir

    types = {onnx_ir.DataType.INT8: ("int8", 1), onnx_ir.DataType.UINT8: ("uint8", 2)}
    model = load_graph(graph)
    known = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}

    def stored(spec: TensorSpec) -> TensorSpec:
        dtype = known.get(spec.name)
        if contract.generation is None or dtype not in types:
            return spec
        name, in_one = types[dtype]
        return replace(spec, dtype=name, shape=(*spec.shape[:-1], contract.generation.head_size // in_one))

    return replace(contract, inputs=tuple(map(stored, contract.inputs)), outputs=tuple(map(stored, contract.outputs)))


def _rotations(model: onnx_ir.Model) -> Iterator[tuple[str, _Rotation | None]]:
    """By name of what is stored: how it was rotated; None of values, and of keys that the operator stores as they come."""
    for node in attentions(model):
        key, value = (present.name or "" for present in node.outputs[1:3])
        yield value, None
        tables = [node.inputs[index] if len(node.inputs) > index else None for index in (COS, SIN)]
        if not node.attributes.get_int("do_rotary", 0) or any(table is None or table.const_value is None for table in tables):
            yield key, None
            continue
        cos, sin = (table.const_value.numpy() for table in tables if table is not None and table.const_value is not None)
        yield key, _rotation(cos, sin, interleaved=bool(node.attributes.get_int("rotary_interleaved", 0)))


def _rotation(cos: np.ndarray, sin: np.ndarray, *, interleaved: bool) -> _Rotation:
    """Of the rotated channels, from the operator's tables [positions, rotated channels / 2]."""
    pairs = cos.shape[1]
    first = np.arange(pairs) * 2 if interleaved else np.arange(pairs)
    second = first + 1 if interleaved else first + pairs
    partners, spans = np.zeros(2 * pairs, dtype=np.int64), np.zeros(2 * pairs)
    partners[first], partners[second] = second, first
    step = np.abs(np.arctan2(sin[min(1, len(sin) - 1)], cos[min(1, len(cos) - 1)])) * (len(cos) - 1)
    spans[first], spans[second] = step, step
    return _Rotation(partners, spans)


def _observe(session: GraphSession, rotations: Mapping[str, _Rotation | None], batches: Sequence[Feeds]) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    for feeds in batches:
        mask = feeds["attention_mask"].astype(bool)
        outputs = session.run(feeds)
        for name, rotation in rotations.items():
            tokens = outputs[name].transpose(0, 2, 1, 3)[mask]  # [tokens, heads, channels]
            largest, radius = np.abs(tokens).max(axis=0), _radius(tokens, rotation)
            known = seen.setdefault(name, _Seen(largest, radius))
            known.largest, known.radius = np.maximum(known.largest, largest), np.maximum(known.radius, radius)
            known.first.append(outputs[name][:, :, 0])
            known.sample.append(tokens[:: max(1, len(tokens) // _SAMPLED_TOKENS)].copy())
    return seen


def _radius(tokens: np.ndarray, rotation: _Rotation | None) -> np.ndarray:
    squares = np.square(tokens)
    if rotation is not None:
        rotated = len(rotation.partners)
        squares[..., :rotated] += np.square(tokens[..., rotation.partners])
    return np.asarray(np.sqrt(squares.max(axis=0)))


def _limits(seen: _Seen, rotation: _Rotation | None) -> np.ndarray:
    """Largest magnitudes [heads, channels] at any position, if the tokens seen stood there."""
    limits = seen.largest.copy()
    if rotation is not None:
        rotated = len(rotation.partners)
        turned = limits[:, :rotated] + seen.largest[:, rotation.partners] * np.sin(np.minimum(rotation.spans, _QUARTER_TURN))
        limits[:, :rotated] = np.minimum(turned, seen.radius[:, :rotated])
    return limits


def _best_fit(steps: np.ndarray, factors: Sequence[float], tokens: np.ndarray, bits: CacheBits) -> np.ndarray:
    """The step [heads, channels] times the factor that gives the tokens [tokens, heads, channels] back best, in each channel."""
    best, least, half = steps, np.full(steps.shape, np.inf), 2 ** (bits - 1)
    for factor in factors:
        step = steps * factor
        error = np.square(np.clip(np.rint(tokens / step), -half, half - 1) * step - tokens).mean(axis=0)
        best, least = np.where(error < least, step, best), np.minimum(error, least)
    return best

"""Runs a decoder's graph as it is used, prompt first and then token by token with its cache, and gathers the logits of all of it.

So a parity check against the source, which reads the whole text at once and has no cache, covers the cache as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from hfaccel.artifact.contract import Contract, SessionSettings
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.rewrites.graphs import load_graph, save_graph
from hfaccel.rewrites.last_token_logits import all_token_logits
from hfaccel.rewrites.split_encoder_decoder import split_encoder_decoder
from hfaccel.runtime.engines import open_graph
from hfaccel.runtime.generation.cache import cache_names, float_format, format_of
from hfaccel.runtime.generation.decoding import ATTEND_IN_FLOAT
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder, EncoderGraph, open_encoder
from hfaccel.runtime.session import GraphSession, Runner

POSITION_IDS = "position_ids"
_DEFAULT_SETTINGS = SessionSettings()


def open_for_parity(graph: Path, contract: Contract) -> Runner:
    """What to compare with the source: the graph itself, or of a decoder its way through prompt and steps."""
    if contract.generation is not None and contract.generation.encoder is not None:
        return CachedAnswering(*open_parts(graph, _DEFAULT_SETTINGS, all_logits=True), contract.generation)
    runner = open_with_all_logits(graph, contract)
    return runner if contract.generation is None else CachedDecoding(runner, contract.generation)


def open_parts(graph: Path, settings: SessionSettings, *, all_logits: bool = False) -> tuple[EncoderGraph, GraphSession]:
    """Encoder and decoder of a graph that holds both, as a compiled folder has them.

    Args:
        graph: of an encoder-decoder, as the stages hand it on.
        settings: of both sessions.
        all_logits: let the decoder give the logits of all its new tokens, where it gives those of the last one only.
    """
    import onnx_ir

    model = load_graph(graph)
    if all_logits:
        all_token_logits(model)
    encoder, decoder = split_encoder_decoder(model)
    steps = GraphSession(graph, settings, content=onnx_ir.to_proto(decoder).SerializeToString())
    if settings.encoder_engine == "onnxruntime":
        return GraphSession(graph, settings, content=onnx_ir.to_proto(encoder).SerializeToString()), steps
    with tempfile.TemporaryDirectory() as folder:  # other engines read weights beside a graph from a file only
        return open_encoder(save_graph(encoder, Path(folder)), settings), steps


def open_with_all_logits(graph: Path, contract: Contract, settings: SessionSettings = _DEFAULT_SETTINGS) -> Runner:
    """The graph as its settings say; of a decoder, which gives the logits of the last token only, edited to give those of all."""
    if contract.generation is None:
        return open_graph(graph, settings)
    import onnx_ir

    model = load_graph(graph)
    if not all_token_logits(model):
        return open_graph(graph, settings)
    return GraphSession(graph, settings, content=onnx_ir.to_proto(model).SerializeToString())


def open_encoder_decoder(graph: Path, session: SessionSettings, settings: GenerationSettings) -> EncoderDecoder:
    """The run time of an encoder-decoder whose parts are still in one graph.

    Args:
        graph: as the stages hand it on.
        session: of both parts.
        settings: shape of the cache.
    """
    return EncoderDecoder(*open_parts(graph, session), settings)


class CachedAnswering:
    """Like :class:`CachedDecoding` for encoder-decoders: the encoder runs once, then the decoder on ``decoder_input_ids``.

    Args:
        encoder: gives ``cross.n.key`` and ``cross.n.value``.
        decoder: gives the logits of all its new tokens.
        settings: shape of the cache.
    """

    def __init__(self, encoder: Runner, decoder: Runner, settings: GenerationSettings) -> None:
        self.input_names: tuple[str, ...] = (*encoder.input_names, "decoder_input_ids", "decoder_attention_mask")
        self._encoder = encoder
        self._decoder = decoder
        self._settings = settings

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``logits`` float32 [batch, decoder_sequence, vocabulary] for a source and the tokens of its answer."""
        fixed = dict(self._encoder.run(feeds))
        if "attention_mask" in feeds:
            fixed["encoder_attention_mask"] = feeds["attention_mask"]
        decoding = CachedDecoding(self._decoder, self._settings, fixed)
        return decoding.run({"input_ids": feeds["decoder_input_ids"], "attention_mask": feeds["decoder_attention_mask"]})


class CachedDecoding:
    """A :class:`hfaccel.runtime.session.Runner` with the inputs of a whole text, over a graph with a cache.

    Half of each row is the prompt, the rest goes one token at a time. Rows may be of different lengths, padded on the right.

    Args:
        graph: reads ``input_ids``, ``attention_mask``, the past of each layer and possibly ``position_ids``; gives the logits of all
            its new tokens and the present of each layer.
        settings: shape of the cache.
        fixed: what the graph reads beside, the same at each step.
    """

    def __init__(
        self, graph: Runner, settings: GenerationSettings, fixed: Mapping[str, np.ndarray] = MappingProxyType({})
    ) -> None:
        self.input_names: tuple[str, ...] = ("input_ids", "attention_mask")
        self._fixed = fixed
        self._graph = graph
        self._settings = settings

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``logits`` float32 [batch, sequence, vocabulary] for ids and mask [batch, sequence]; zero where the mask is."""
        ids, lengths = feeds["input_ids"], feeds["attention_mask"].sum(axis=1)
        batch, width = ids.shape
        rows = np.arange(batch)
        prompts = np.maximum(1, lengths // 2)
        prompt_width = int(prompts.max())
        mask = (np.arange(prompt_width) < prompts[:, None]).astype(np.int64)
        positions = np.broadcast_to(np.arange(prompt_width), mask.shape)
        found, past = self._call(ids[:, :prompt_width], mask, positions, empty_past(batch, self._settings, self._graph))
        logits = np.zeros((batch, width, found.shape[-1]), dtype=np.float32)
        for row, length in enumerate(prompts):
            logits[row, :length] = found[row, :length]
        for step in range(int((lengths - prompts).max(initial=0))):
            position = prompts + step
            mask = np.concatenate([mask, np.ones((batch, 1), dtype=np.int64)], axis=1)
            # A row that has ended goes on with any token; what it gives is not looked at.
            token = ids[rows, np.minimum(position, width - 1)][:, None]
            found, past = self._call(token, mask, position[:, None], past)
            alive = rows[position < lengths]
            logits[alive, position[alive]] = found[alive, 0]
        return {"logits": logits}

    def _call(
        self, ids: np.ndarray, mask: np.ndarray, positions: np.ndarray, past: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        feeds = {"input_ids": np.ascontiguousarray(ids), "attention_mask": mask, POSITION_IDS: positions.astype(np.int64)}
        return _logits_and_past(self._graph.run({**feeds, **past, **self._fixed}))


MANY_ROWS_LOGITS = "many_rows_logits"


_HALF, _LITTLE = 2, 8
"""The prompt of a text is one part of so many."""


class PromptThenSteps:
    """A :class:`hfaccel.runtime.session.Runner` over two graphs of one decoder: one reads the prompt of a text, the other goes on.

    Then the first one goes on as well, as it does for steps of many rows.

    Args:
        prompts: reads prompts; gives the logits of all tokens, as the other one does.
        steps: goes on with the cache.
        settings: shape of the cache.
        steps_are_coarser: an eighth of a text is the prompt in place of half: else what is exact would hide what is not.
    """

    def __init__(self, prompts: Runner, steps: Runner, settings: GenerationSettings, *, steps_are_coarser: bool = False) -> None:
        self.input_names: tuple[str, ...] = ("input_ids", "attention_mask", POSITION_IDS)
        self._prompts = prompts
        self._steps = steps
        self._settings = settings
        self._parts = _LITTLE if steps_are_coarser else _HALF

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``logits`` and ``many_rows_logits``, float32 [1, sequence, vocabulary], of one text.

        Graphs with fused attention go on with one row only.
        """
        length = max(1, feeds["input_ids"].shape[1] // self._parts)
        own = {name: feeds[name] for name in self.input_names}
        first = {name: np.ascontiguousarray(value[:, :length]) for name, value in own.items()}
        read = self._prompts.run({**first, **empty_past(1, self._settings, self._prompts)})
        logits, past = _logits_and_past(read)
        if length == own["input_ids"].shape[1]:
            return {"logits": logits, MANY_ROWS_LOGITS: logits}
        rest = {name: np.ascontiguousarray(value[:, length:]) for name, value in own.items()}
        # The graph for prompts attends in its own way to several tokens of a row, but one of each row is a step.
        feeds = {**rest, "attention_mask": own["attention_mask"], **past, ATTEND_IN_FLOAT: np.array(False)}
        return {
            name: np.concatenate([logits, graph.run(feeds)["logits"]], axis=1)
            for name, graph in (("logits", self._steps), (MANY_ROWS_LOGITS, self._prompts))
        }


def _logits_and_past(outputs: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits of a run, and its present as the past of the next one."""
    past = {name.replace("present.", "past_key_values."): value for name, value in outputs.items() if name != "logits"}
    return outputs["logits"], past


def empty_past(batch: int, settings: GenerationSettings, reader: Runner | None = None) -> dict[str, np.ndarray]:
    """A cache without tokens, for a session that is fed arrays.

    Args:
        batch: rows.
        settings: shape of the cache.
        reader: what will read it, and says how keys and values are stored; None for a float graph.
    """
    stored = format_of(reader.session, settings) if isinstance(reader, GraphSession) else float_format(settings)
    shape = (batch, settings.key_value_heads, 0, stored.width)
    return {past: np.zeros(shape, dtype=stored.dtype) for past, _ in cache_names(settings.layers)}

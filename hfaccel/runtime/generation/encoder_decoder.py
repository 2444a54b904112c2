"""Runs the two graphs of an encoder-decoder: sources at once, then a token of every row at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime

from hfaccel.artifact.contract import SessionSettings
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.errors import DataError, IntegrityError
from hfaccel.runtime.engines import open_graph
from hfaccel.runtime.generation.cache import KeyValueCache, cache_names
from hfaccel.runtime.generation.decoding import LOGITS_TO_KEEP, POSITIONS, TOKEN_INPUTS, Decoding, check_prompts
from hfaccel.runtime.generation.memory import Memory
from hfaccel.runtime.openvino_session import OpenVinoSession
from hfaccel.runtime.session import GraphSession, read_feeds

EncoderGraph = GraphSession | OpenVinoSession

_SOURCE_MASK = "attention_mask"
_MEMORY_MASK = "encoder_attention_mask"


class EncoderDecoder:
    """An open encoder graph and an open decoder graph. May be shared by threads.

    Args:
        encoder: reads text (``input_ids``, ``attention_mask``) or sound (``input_features``) and gives ``cross.N.key`` and
            ``cross.N.value`` of each layer of the decoder.
        decoder: reads these beside its tokens and its cache, and of text the ``encoder_attention_mask``.
        generation_settings: shape of the cache and limits.

    Attributes:
        settings: ``generation_settings``.
        session: the ``onnxruntime.InferenceSession`` of the decoder.
        prompt_session: None: an answer begins with a few tokens.
        reads_positions: whether the decoder has the input ``position_ids``.
        gives_several_logits: whether it has the input ``logits_to_keep``.
        encoder_inputs: names of what the encoder reads.

    Raises:
        IntegrityError: the graphs are no such pair.
    """

    def __init__(self, encoder: EncoderGraph, decoder: GraphSession, generation_settings: GenerationSettings) -> None:
        _check_encoder(encoder, generation_settings.layers)
        _check_decoder(decoder, generation_settings.layers, masked=_SOURCE_MASK in encoder.input_names)
        self.settings = generation_settings
        self.session = decoder.session
        self.prompt_session = None
        self.reads_positions = POSITIONS in decoder.input_names
        self.gives_several_logits = LOGITS_TO_KEEP in decoder.optional_input_names
        self.encoder_inputs = encoder.input_names
        self._encoder = encoder

    @classmethod
    def open(
        cls,
        encoder_path: Path,
        decoder_path: Path,
        session_settings: SessionSettings,
        generation_settings: GenerationSettings,
    ) -> EncoderDecoder:
        """Open both graphs from their files.

        Raises:
            IntegrityError: a file is missing, its engine cannot open it, or the graphs are no such pair.
            MissingExtraError: the engine of the encoder is not installed.
        """
        # Threads of the one that wait actively after its run would take the cores from the other.
        shared = replace(session_settings, spin_after_run=False)
        decoder = GraphSession(decoder_path, shared)
        return cls(open_encoder(encoder_path, shared), decoder, generation_settings)

    def encode(self, feeds: Mapping[str, np.ndarray]) -> Memory:
        """Read the sources.

        Args:
            feeds: what the encoder reads, by name; the first axis is the batch. Others are dropped.

        Raises:
            DataError: there is no source, or the sources have no tokens.
            IntegrityError: the encoder reads an input that ``feeds`` does not hold.
        """
        given = {
            name: np.ascontiguousarray(array)
            for name, array in read_feeds(self.encoder_inputs, feeds, self._encoder.path).items()
        }
        if any(array.size == 0 for array in given.values()):
            raise DataError("there is nothing to encode", hint="give at least one source that is not empty")
        values = _bound_outputs(self._encoder, given)
        if _SOURCE_MASK in given:
            values[_MEMORY_MASK] = _shared(given[_SOURCE_MASK])
        return Memory(values)

    def prefill(self, memory: Memory, rows: Sequence[Sequence[int]], *, room: int = 0) -> Decoding:
        """Read what each answer begins with.

        Args:
            memory: of as many rows.
            rows: token ids that the decoder reads first; they need not be of one length.
            room: tokens that will follow, so that the cache need not grow on the way.

        Returns:
            The batch on its way; its ``logits`` are those of the first new token.

        Raises:
            DataError: there is no row, or one that has no tokens, or more than the model reads, or not one row per source.
        """
        check_prompts(rows, self.settings.context_length)
        if len(rows) != memory.batch:
            raise DataError(f"there are {len(rows)} rows of tokens for {memory.batch} sources", hint="give one for each")
        tokens = min(max(map(len, rows)) + room, self.settings.context_length)
        decoding = Decoding(self, KeyValueCache(len(rows), tokens, self.settings), memory=memory)
        decoding.read(rows)
        return decoding


def cross_names(layers: int) -> list[str]:
    """Outputs of the encoder and inputs of the decoder."""
    return [f"cross.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def open_encoder(path: Path, settings: SessionSettings) -> EncoderGraph:
    """Open the encoder of an encoder-decoder in the engine that its settings name for it.

    Raises:
        IntegrityError: the file is missing, or its engine cannot open it.
        MissingExtraError: the engine is not installed.
    """
    return open_graph(path, replace(settings, engine=settings.encoder_engine))


def _bound_outputs(encoder: EncoderGraph, given: Mapping[str, np.ndarray]) -> dict[str, onnxruntime.OrtValue]:
    """Outputs of an encoder by name, each on memory of its own, as onnxruntime hands it on without a copy."""
    if isinstance(encoder, OpenVinoSession):
        return {name: _shared(array) for name, array in encoder.run(given).items()}
    binding = encoder.session.io_binding()
    for name, array in given.items():
        binding.bind_cpu_input(name, array)
    for name in encoder.output_names:
        binding.bind_output(name, "cpu")
    encoder.session.run_with_iobinding(binding)
    return dict(zip(encoder.output_names, binding.get_outputs(), strict=True))


def _shared(array: np.ndarray) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _check_encoder(graph: EncoderGraph, layers: int) -> None:
    named, given = set(cross_names(layers)), set(graph.output_names)
    if named != given:
        lacks = sorted(named - given)
        _refuse(
            f"encoder for a decoder of {layers} layers", "lacks" if lacks else "gives", lacks or sorted(given - named), graph.path
        )


def _check_decoder(graph: GraphSession, layers: int, *, masked: bool) -> None:
    pairs = cache_names(layers)
    past, present = {name for name, _ in pairs}, {name for _, name in pairs}
    fixed = past | set(cross_names(layers)) | ({_MEMORY_MASK} if masked else set())
    missing = sorted(({"input_ids", "attention_mask"} | fixed) - set(graph.input_names))
    missing += sorted(({"logits"} | present) - set(graph.output_names))
    unknown = sorted(set(graph.input_names) - fixed - set(TOKEN_INPUTS))
    if missing or unknown:
        _refuse(f"decoder of {layers} layers beside an encoder", "lacks" if missing else "reads", missing or unknown, graph.path)


def _refuse(kind: str, verb: str, names: Sequence[str], path: Path) -> None:
    raise IntegrityError(
        f"the graph is no {kind}: it {verb} {', '.join(names)}"
        + (", which the run time does not make" if verb == "reads" else ""),
        where=str(path),
        hint="use the hfaccel version that made the folder, or compile the model again",
    )

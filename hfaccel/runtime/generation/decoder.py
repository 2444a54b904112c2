"""Runs a decoder graph: a batch of prompts at once, then a token of every row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

from hfaccel.artifact.contract import SessionSettings
from hfaccel.artifact.generation import GenerationSettings
from hfaccel.errors import IntegrityError
from hfaccel.runtime.generation.cache import KeyValueCache, cache_names, format_of
from hfaccel.runtime.generation.decoding import LOGITS_TO_KEEP, POSITIONS, TOKEN_INPUTS, Decoding, check_prompts
from hfaccel.runtime.session import GraphSession

PROMPT_GRAPH_NAME = "prompt.onnx"
"""A graph that may lie beside a decoder's: the same model and weights, computed the way that is fastest for many tokens at once."""


class Decoder:
    """An open decoder graph. May be shared by threads: what belongs to a batch is in its :class:`Decoding`.

    It remembers the keys and values of one row that was handed to :meth:`keep`, so that a chat that grows is not read again.

    Args:
        graph_path: the ONNX graph; external data, and a graph for prompts, are looked for beside it.
        session_settings: how onnxruntime runs it.
        generation_settings: shape of the cache and limits.

    Attributes:
        settings: ``generation_settings``.
        session: the ``onnxruntime.InferenceSession``.
        prompt_session: that of the graph for prompts, or None.
        reads_positions: whether the graph has the input ``position_ids``.
        stored: how it stores keys and values.

    Raises:
        IntegrityError: the file is missing, onnxruntime cannot open it, or it is no decoder with such a cache.
    """

    def __init__(self, graph_path: Path, session_settings: SessionSettings, generation_settings: GenerationSettings) -> None:
        graph = GraphSession(graph_path, session_settings)
        _check_graph(graph, generation_settings, graph_path)
        self.settings = generation_settings
        self.session = graph.session
        self.stored = format_of(graph.session, generation_settings)
        self.prompt_session = _prompt_session(graph_path, session_settings, generation_settings)
        self.reads_positions = POSITIONS in graph.input_names
        self.gives_several_logits = LOGITS_TO_KEEP in graph.optional_input_names
        self._kept: Decoding | None = None
        # Reentrant: the garbage collector may close a stream that was left, which keeps its row, while the lock is held.
        self._lock = RLock()

    def prefill(self, rows: Sequence[Sequence[int]], *, room: int = 0) -> Decoding:
        """Read prompts.

        Args:
            rows: token ids of each prompt; they need not be of one length.
            room: tokens that will follow, so that the cache need not grow on the way.

        Returns:
            The batch on its way; its ``logits`` are those of the first new token.

        Raises:
            DataError: there is no prompt, or one that has no tokens, or more than the model reads.
        """
        check_prompts(rows, self.settings.context_length)
        longest = max(map(len, rows))
        tokens = min(longest + room, self.settings.context_length)
        if len(rows) > 1:
            decoding = Decoding(self, KeyValueCache(len(rows), tokens, self.settings, self.stored))
            decoding.read(rows)
            return decoding
        row = list(rows[0])
        kept, common = self._take_common(row)
        if kept is None:
            decoding = Decoding(self, KeyValueCache(1, tokens, self.settings, self.stored))
        else:
            cache = kept.cache
            decoding = Decoding(self, cache if cache.capacity >= tokens else cache.larger(tokens, common), row[:common])
        decoding.read([row[common:]])
        return decoding

    def under(self, settings: GenerationSettings) -> Decoder:
        """The same open graphs under other settings."""
        other = copy(self)
        other.settings, other._kept, other._lock = settings, None, RLock()
        return other

    def keep(self, decoding: Decoding) -> None:
        """Remember what a batch of one row has read, for a prompt that begins alike. It must not be stepped any more."""
        if len(decoding.tokens) == 1:
            with self._lock:
                self._kept = decoding

    def forget(self) -> None:
        """Free the memory of what was kept."""
        with self._lock:
            self._kept = None

    def _take_common(self, row: list[int]) -> tuple[Decoding | None, int]:
        """What was kept and how many of its tokens the row begins with; nobody else gets it then."""
        with self._lock:
            kept, self._kept = self._kept, None
        common = 0 if kept is None else _common_prefix(kept.tokens[0], row)
        # What does not fit is let go at once: this prompt is kept instead, and both need not be in memory.
        return (kept, common) if common else (None, 0)


def _prompt_session(graph_path: Path, session_settings: SessionSettings, settings: GenerationSettings) -> Any:
    path = graph_path.with_name(PROMPT_GRAPH_NAME)
    if not path.is_file():
        return None
    # Threads that wait actively after the prompt would take the cores from the first steps.
    graph = GraphSession(path, replace(session_settings, spin_after_run=False))
    _check_graph(graph, settings, path)
    return graph.session


def _common_prefix(kept: Sequence[int], row: Sequence[int]) -> int:
    """Tokens that both begin with; always less than the row has, because its last one must be computed for its logits."""
    most = min(len(kept), len(row) - 1)
    return next((place for place in range(most) if kept[place] != row[place]), most)


def _check_graph(graph: GraphSession, settings: GenerationSettings, path: Path) -> None:
    pairs = cache_names(settings.layers)
    inputs, outputs = {past for past, _ in pairs}, {present for _, present in pairs}
    missing = sorted(({"input_ids", "attention_mask"} | inputs) - set(graph.input_names))
    missing += sorted(({"logits"} | outputs) - set(graph.output_names))
    unknown = sorted(set(graph.input_names) - inputs - set(TOKEN_INPUTS))
    if missing or unknown:
        lacks = f"lacks {', '.join(missing)}" if missing else f"reads {', '.join(unknown)}, which the run time does not make"
        raise IntegrityError(
            f"the graph is no decoder with a cache of {settings.layers} layers: it {lacks}",
            where=str(path),
            hint="use the hfaccel version that made the folder, or compile the model again",
        )

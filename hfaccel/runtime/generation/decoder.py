"""Runs a decoder graph: a batch of prompts at once, then a token of every row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import onnxruntime

from hfaccel.artifact.contract import GenerationSettings, SessionSettings
from hfaccel.errors import DataError, IntegrityError
from hfaccel.runtime.generation.cache import KeyValueCache, cache_names
from hfaccel.runtime.session import GraphSession

_POSITIONS = "position_ids"
_TOKEN_INPUTS = ("input_ids", "attention_mask", _POSITIONS)


class Decoder:
    """An open decoder graph. May be shared by threads: what belongs to a batch is in its :class:`Decoding`.

    It remembers the keys and values of one row that was handed to :meth:`keep`, so that a chat that grows is not read again.

    Args:
        graph_path: the ONNX graph; external data is looked for beside it.
        session_settings: how onnxruntime runs it.
        generation_settings: shape of the cache and limits.

    Attributes:
        settings: ``generation_settings``.
        session: the ``onnxruntime.InferenceSession``.
        reads_positions: whether the graph has the input ``position_ids``.

    Raises:
        IntegrityError: the file is missing, onnxruntime cannot open it, or it is no decoder with such a cache.
    """

    def __init__(self, graph_path: Path, session_settings: SessionSettings, generation_settings: GenerationSettings) -> None:
        graph = GraphSession(graph_path, session_settings)
        _check_graph(graph, generation_settings, graph_path)
        self.settings = generation_settings
        self.session = graph.session
        self.reads_positions = _POSITIONS in graph.input_names
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
        self._check_prompts(rows)
        longest = max(map(len, rows))
        tokens = min(longest + room, self.settings.context_length)
        if len(rows) > 1:
            decoding = Decoding(self, KeyValueCache(len(rows), tokens, self.settings))
            decoding.read(rows)
            return decoding
        row = list(rows[0])
        kept, common = self._take_common(row)
        if kept is None:
            decoding = Decoding(self, KeyValueCache(1, tokens, self.settings))
        else:
            cache = kept.cache
            decoding = Decoding(self, cache if cache.capacity >= tokens else cache.larger(tokens, common), row[:common])
        decoding.read([row[common:]])
        return decoding

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

    def _check_prompts(self, rows: Sequence[Sequence[int]]) -> None:
        if not rows:
            raise DataError("there is no prompt", hint="give at least one")
        for index, row in enumerate(rows):
            if not row:
                raise DataError("the prompt has no tokens", where=f"prompt {index}", hint="leave empty prompts out")
            if len(row) > self.settings.context_length:
                raise DataError(
                    f"the prompt has {len(row)} tokens, and the model reads {self.settings.context_length}, prompt and answer together",
                    where=f"prompt {index}",
                    hint="shorten it",
                )


class Decoding:
    """A batch on its way: its cache, and what was read. Made by :meth:`Decoder.prefill`; for one thread.

    Args:
        decoder: runs the graph.
        cache: of as many rows; where ``read_already`` is given it holds these tokens.
        read_already: of a batch of one row.

    Attributes:
        cache: keys and values.
        tokens: token ids of each row that the cache holds.
        logits: float32 [batch, vocabulary], of the token that comes next; zeros before anything was read here.
        reused: tokens of ``read_already``, which were not computed again.
    """

    def __init__(self, decoder: Decoder, cache: KeyValueCache, read_already: Sequence[int] = ()) -> None:
        self.cache = cache
        self.tokens: list[list[int]] = [list(read_already) for _ in range(cache.batch)]
        self.logits = np.zeros((cache.batch, decoder.settings.vocabulary_size), dtype=np.float32)
        self.reused = len(read_already)
        self._decoder = decoder
        self._bind()
        # Columns that are not in use yet hold ones: a token that follows is never padding.
        self._mask = np.ones((cache.batch, cache.capacity), dtype=np.int64)
        self._width = len(read_already)

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Read the prompts, or what is left of a prompt whose beginning was read already."""
        width, padding = max(map(len, rows)), self._decoder.settings.pad_token_id
        ids = np.full((len(rows), width), padding, dtype=np.int64)
        first = self._width
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            self._mask[index, first + len(row) : first + width] = 0
        positions = np.broadcast_to(np.arange(first, first + width, dtype=np.int64), ids.shape)
        self._binding.bind_output("logits", "cpu")
        self._run(ids, positions, rows)
        logits = self._binding.get_outputs()[-1].numpy()  # bound last; a graph may give one row of logits per token
        if logits.shape[1] == 1:
            self.logits = logits[:, 0]
        else:
            self.logits = logits[np.arange(len(rows)), [len(row) - 1 for row in rows]]

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Read one more token of every row.

        Args:
            ids: int64 [batch].

        Returns:
            The new ``logits``, float32 [batch, vocabulary]; those given before stay as they are.

        Raises:
            DataError: a row has as many tokens as the model reads.
        """
        limit = self._decoder.settings.context_length
        if self._width >= limit:
            raise DataError(f"the model reads {limit} tokens, prompt and answer together", hint="ask for fewer new tokens")
        if self._width == self.cache.capacity:
            self._grow(min(2 * self.cache.capacity, limit))
        logits = np.empty((len(self.tokens), 1, self._decoder.settings.vocabulary_size), dtype=np.float32)
        self._binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        positions = np.array([[len(row)] for row in self.tokens], dtype=np.int64)
        self._run(ids[:, None], positions, [[token] for token in ids.tolist()])
        self.logits = logits[:, 0]
        return self.logits

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with some rows only, in ascending order; the others are not computed any more."""
        kept = sorted(rows)
        self.tokens = [self.tokens[row] for row in kept]
        self.logits = self.logits[kept]
        self.cache.keep_rows(kept, max(map(len, self.tokens), default=0))
        mask = self._mask[kept]
        # Columns in which only dropped rows had a token go, so that the mask is never wider than the model reads.
        used = mask[:, : self._width].any(axis=0)
        self._width = int(used.sum())
        self._mask = np.ones((len(kept), self.cache.capacity), dtype=np.int64)
        self._mask[:, : self._width] = mask[:, : used.size][:, used]
        self._bind()

    def _run(self, ids: np.ndarray, positions: np.ndarray, rows: Sequence[Sequence[int]]) -> None:
        self._width += ids.shape[1]
        # Of one row the columns in use lie in one piece, and are not copied.
        mask = np.ascontiguousarray(self._mask[:, : self._width])
        self._binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        self._binding.bind_cpu_input("attention_mask", mask)
        if self._decoder.reads_positions:
            self._binding.bind_cpu_input(_POSITIONS, np.ascontiguousarray(positions))
        self._decoder.session.run_with_iobinding(self._binding)
        # Only now: what was not read to the end must not be taken for read when the cache is used again.
        for tokens, row in zip(self.tokens, rows, strict=True):
            tokens.extend(row)

    def _bind(self) -> None:
        self._binding: Any = self._decoder.session.io_binding()
        self.cache.bind(self._binding)

    def _grow(self, tokens: int) -> None:
        self.cache = self.cache.larger(tokens, self._width)
        grown = np.ones((self.cache.batch, self.cache.capacity), dtype=np.int64)
        grown[:, : self._width] = self._mask[:, : self._width]
        self._mask = grown
        self._bind()


def _common_prefix(kept: Sequence[int], row: Sequence[int]) -> int:
    """Tokens that both begin with; always less than the row has, because its last one must be computed for its logits."""
    most = min(len(kept), len(row) - 1)
    return next((place for place in range(most) if kept[place] != row[place]), most)


def _check_graph(graph: GraphSession, settings: GenerationSettings, path: Path) -> None:
    pairs = cache_names(settings.layers)
    inputs, outputs = {past for past, _ in pairs}, {present for _, present in pairs}
    missing = sorted(({"input_ids", "attention_mask"} | inputs) - set(graph.input_names))
    missing += sorted(({"logits"} | outputs) - set(graph.output_names))
    unknown = sorted(set(graph.input_names) - inputs - set(_TOKEN_INPUTS))
    if missing or unknown:
        lacks = f"lacks {', '.join(missing)}" if missing else f"reads {', '.join(unknown)}, which the run time does not make"
        raise IntegrityError(
            f"the graph is no decoder with a cache of {settings.layers} layers: it {lacks}",
            where=str(path),
            hint="use the hfaccel version that made the folder, or compile the model again",
        )

"""Keys and values of the tokens read so far, in buffers that the graph writes in place."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from hfaccel.artifact.generation import GenerationSettings
from hfaccel.errors import IntegrityError

_BLOCK_TOKENS = 64
"""Capacities are multiples of this, so that a chat that grows a little finds room in the buffers that it has."""

_TYPES = {"tensor(float)": "float32", "tensor(int8)": "int8", "tensor(uint8)": "uint8"}


@dataclass(frozen=True)
class CacheFormat:
    """How a graph stores a key or a value of one head.

    Attributes:
        dtype: ``float32``; ``int8`` for 8 bit; ``uint8`` for 4 bit, two channels in a byte.
        width: elements of that type; the size of a head, and half of it in 4 bit.
    """

    dtype: str
    width: int

    @property
    def bytes(self) -> int:
        """Memory of a key, or of a value."""
        return self.width * np.dtype(self.dtype).itemsize


def float_format(settings: GenerationSettings) -> CacheFormat:
    """That of graphs whose cache is not quantized."""
    return CacheFormat("float32", settings.head_size)


def format_of(session: Any, settings: GenerationSettings) -> CacheFormat:
    """The format that a graph asks for: its past says it.

    Args:
        session: the ``onnxruntime.InferenceSession`` of the graph.
        settings: shape of the cache.

    Raises:
        IntegrityError: its layers have several formats, or one that is not known.
    """
    pasts = {past for past, _ in cache_names(settings.layers)}
    found = sorted({item.type for item in session.get_inputs() if item.name in pasts})
    if not found:
        return float_format(settings)  # whoever opens the graph misses the inputs themselves
    if len(found) > 1 or found[0] not in _TYPES:
        raise IntegrityError(
            f"the graph has a cache of a kind that this version does not know: {', '.join(found)}",
            hint="use the hfaccel version that made the folder, or compile the model again",
        )
    dtype = _TYPES[found[0]]
    return CacheFormat(dtype, settings.head_size // 2 if dtype == "uint8" else settings.head_size)


def cache_names(layers: int) -> list[tuple[str, str]]:
    """(graph input, graph output) of every buffer."""
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return [(f"past_key_values.{part}", f"present.{part}") for part in parts]


class KeyValueCache:
    """One buffer per layer for keys and one for values, [batch, key_value_heads, capacity, width of the format].

    Past and present are one OrtValue: attention then writes the new tokens behind the old and copies none.

    Args:
        batch: rows.
        tokens: room that each row needs; the capacity is that or a little more.
        settings: the shape of the rest.
        stored: type and width of what is stored; None for float32.

    Attributes:
        batch: rows.
        capacity: tokens that a row can hold.
    """

    def __init__(self, batch: int, tokens: int, settings: GenerationSettings, stored: CacheFormat | None = None) -> None:
        self.batch = batch
        self.capacity = -(-tokens // _BLOCK_TOKENS) * _BLOCK_TOKENS
        self._settings = settings
        self._stored = stored or float_format(settings)
        self._names = cache_names(settings.layers)
        shape = (batch, settings.key_value_heads, self.capacity, self._stored.width)
        # Zeros, because attention multiplies what lies behind a row's end by zero, and memory as found may hold a NaN.
        self._buffers = [np.zeros(shape, dtype=self._stored.dtype) for _ in self._names]
        self._values = [_shared(buffer) for buffer in self._buffers]

    @property
    def bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def in_integers(self) -> bool:
        """Whether keys and values are quantized."""
        return self._stored.dtype != "float32"

    def bind(self, binding: Any, *, in_place: bool = True) -> None:
        """Bind every buffer as past, and as present; not ``in_place``: the graph makes new arrays for the present, see :meth:`store`."""
        for (past, present), value in zip(self._names, self._values, strict=True):
            binding.bind_ortvalue_input(past, value)
            if in_place:
                binding.bind_ortvalue_output(present, value)
            else:
                binding.bind_output(present, "cpu")

    def store(self, presents: Sequence[np.ndarray], first: int, end: int) -> None:
        """Copy what a graph says of the tokens from ``first`` on.

        Args:
            presents: of each buffer [batch, key_value_heads, tokens, width], in the order of :func:`cache_names`, from the first token on.
            first: number of the first token that is copied.
            end: number of the first one after it that is not.
        """
        for buffer, present in zip(self._buffers, presents, strict=True):
            buffer[:, :, first:end] = present[:, :, first:end]

    def rows(self, places: range) -> KeyValueCache:
        """Consecutive rows, in the same memory: what is written there is written here."""
        view = copy(self)
        view.batch = len(places)
        view._buffers = [buffer[places.start : places.stop] for buffer in self._buffers]
        view._values = [_shared(buffer) for buffer in view._buffers]
        return view

    def keep_rows(self, rows: list[int], tokens: int) -> None:
        """Drop all other rows, without new memory; the cache must be bound again.

        Args:
            rows: ascending indices of those that stay.
            tokens: how many of a row are in use at most.
        """
        for buffer in self._buffers:
            for place, row in enumerate(rows):
                if place != row:
                    buffer[place, :, :tokens] = buffer[row, :, :tokens]
        self._shrink(len(rows))
        self.batch = len(rows)

    def reorder(self, rows: list[int], tokens: int) -> bool:
        """Put rows in another order; one may come more than once, or not at all.

        Args:
            rows: for each new row the index of the old one.
            tokens: how many of a row are in use at most; only these are copied.

        Returns:
            Whether the cache must be bound again, because the number of rows is another one.
        """
        moved = [place for place, row in enumerate(rows) if place != row]
        sources = [rows[place] for place in moved]
        if len(rows) > self.batch:
            grown = KeyValueCache(len(rows), self.capacity, self._settings, self._stored)
            for source, target in zip(self._buffers, grown._buffers, strict=True):
                target[:, :, :tokens] = source[rows, :, :tokens]
            self._buffers, self._values = grown._buffers, grown._values
        else:
            for buffer in self._buffers:
                buffer[moved, :, :tokens] = buffer[sources, :, :tokens]
        if len(rows) < self.batch:
            self._shrink(len(rows))
        changed = len(rows) != self.batch
        self.batch = len(rows)
        return changed

    def larger(self, tokens: int, filled: int) -> KeyValueCache:
        """A copy with room for more.

        Args:
            tokens: room that each row needs.
            filled: tokens of a row that are copied.
        """
        larger = KeyValueCache(self.batch, tokens, self._settings, self._stored)
        for source, target in zip(self._buffers, larger._buffers, strict=True):
            target[:, :, :filled] = source[:, :, :filled]
        return larger

    def _shrink(self, rows: int) -> None:
        self._buffers = [buffer[:rows] for buffer in self._buffers]
        self._values = [_shared(buffer) for buffer in self._buffers]


def _shared(buffer: np.ndarray) -> Any:
    """An OrtValue on the very memory of the array."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(buffer)

"""A batch on its way through a decoder graph: its rows, what they have read, and the step to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime

from hfaccel.artifact.generation import GenerationSettings
from hfaccel.errors import DataError
from hfaccel.runtime.generation.cache import KeyValueCache
from hfaccel.runtime.generation.memory import Memory

POSITIONS = "position_ids"
PROMPT_TOKENS = 8
"""From so many new tokens of all rows the graph for prompts is the faster one."""
PIECE_TOKENS = 512
"""No more tokens of a prompt are read at once: attention writes down the scores of all of them."""
GROUP_TOKENS = 1024
"""No more tokens of several prompts are read at once: 32 prompts of 128 take 1.74 s to 1.80 s in groups of this size, 1.80 s to 1.90 s in
groups of half of it, 1.87 s of twice, and 2.19 s one after the other (SmolLM2)."""
ROW_COST_TOKENS = 16
"""What a call costs beside its tokens, in tokens."""
LOGITS_TO_KEEP = "logits_to_keep"
"""A graph's input that says how many tokens, the last ones, its output :data:`KEPT_LOGITS` is about; 1 where it is not fed."""
KEPT_LOGITS = "kept_logits"
ATTEND_IN_FLOAT = "attend_in_float"
"""An input of a graph for prompts with a cache of integers: whether several new tokens see each other in float; true where it is not fed."""
TOKEN_INPUTS = ("input_ids", "attention_mask", POSITIONS)


class TokenReader(Protocol):
    """An open decoder graph.

    Attributes:
        settings: shape of the cache and limits.
        session: the ``onnxruntime.InferenceSession``.
        prompt_session: one that is faster for many tokens at once, or None.
        reads_positions: whether the graph has the input ``position_ids``.
        gives_several_logits: whether it has the input ``logits_to_keep``.
    """

    settings: GenerationSettings
    session: Any
    prompt_session: Any
    reads_positions: bool
    gives_several_logits: bool


class Decoding:
    """A batch on its way: its cache, and what was read. Made by ``prefill`` of a decoder; for one thread.

    Args:
        decoder: runs the graph.
        cache: of as many rows; where ``read_already`` is given it holds these tokens.
        read_already: of a batch of one row.
        memory: of encoder-decoders: what the encoder says of each row.

    Attributes:
        cache: keys and values.
        memory: as given, of the rows that are left.
        tokens: token ids of each row that the cache holds.
        logits: float32 [batch, vocabulary], of the token that comes next; zeros before anything was read here.
        reused: tokens of ``read_already``, which were not computed again.
    """

    def __init__(
        self, decoder: TokenReader, cache: KeyValueCache, read_already: Sequence[int] = (), memory: Memory | None = None
    ) -> None:
        self.cache = cache
        self.memory = memory
        self.tokens: list[list[int]] = [list(read_already) for _ in range(cache.batch)]
        self.logits = np.zeros((cache.batch, decoder.settings.vocabulary_size), dtype=np.float32)
        self.reused = len(read_already)
        self._decoder = decoder
        self._binding: Any = None  # of steps; made anew when the rows or their cache are others
        # Columns that are not in use yet hold ones: a token that follows is never padding.
        self._mask = np.ones((cache.batch, cache.capacity), dtype=np.int64)
        self._width = len(read_already)

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        """Read the prompts, or what is left of a prompt whose beginning was read already."""
        first, width = self._width, max(map(len, rows))
        for index, row in enumerate(rows):
            self._mask[index, first + len(row) : first + width] = 0
        # A memory belongs to all rows, and only fresh caches are filled row by row.
        groups = [range(len(rows))] if self.memory is not None or first else _groups(list(map(len, rows)))
        self.logits = np.concatenate([self._read_group(group, rows) for group in groups])
        self._width = first + width

    def _read_group(self, places: range, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """The logits [group, vocabulary] after some consecutive rows; a row alone is read in pieces."""
        cache = self.cache if len(places) == self.cache.batch else self.cache.rows(places)
        group = [rows[place] for place in places]
        if len(group) > 1:
            ids = np.full((len(group), max(map(len, group))), self._decoder.settings.pad_token_id, dtype=np.int64)
            for row, tokens in zip(ids, group, strict=True):
                row[: len(tokens)] = tokens
            return self._read(ids, places, group, cache)
        logits = self.logits[places.start : places.stop]
        for start in range(0, len(group[0]), PIECE_TOKENS):
            piece = group[0][start : start + PIECE_TOKENS]
            logits = self._read(np.array([piece], dtype=np.int64), places, [piece], cache)
        return logits

    def _read(self, ids: np.ndarray, places: range, rows: Sequence[Sequence[int]], cache: KeyValueCache) -> np.ndarray:
        """Read int64 [batch, tokens] into a cache of these rows; the logits [batch, vocabulary] after what ``rows`` holds of it."""
        first = len(self.tokens[places[0]])
        as_prompts = self._decoder.prompt_session is not None and ids.size >= PROMPT_TOKENS
        session = self._decoder.prompt_session if as_prompts else self._decoder.session
        # Several tokens of a row attend in float there, whatever the cache holds: see hfaccel.quant.float_prompts.
        in_place = not (as_prompts and ids.shape[1] > 1 and cache.in_integers)
        binding = self._bound_to(session, cache, in_place=in_place)  # of its own: steps bind another output
        binding.bind_output("logits", "cpu")
        positions = np.broadcast_to(np.arange(first, first + ids.shape[1], dtype=np.int64), ids.shape)
        mask = self._mask[places.start : places.stop, : first + ids.shape[1]]
        self._run(session, binding, ids, positions, mask)
        results = binding.get_outputs()
        if not in_place:
            cache.store([value.numpy() for value in results[:-1]], first, first + ids.shape[1])
        # Only now: what was not read to the end must not be taken for read when the cache is used again.
        for place, row in zip(places, rows, strict=True):
            self.tokens[place].extend(row)
        logits: np.ndarray = results[-1].numpy()  # bound last; a graph may give one row of logits per token
        if logits.shape[1] == 1:
            return logits[:, 0]
        return np.asarray(logits[np.arange(len(rows)), [len(row) - 1 for row in rows]])

    @property
    def room(self) -> int:
        """Tokens of a row that fit behind those read, into the model's context and without a larger cache."""
        return min(self.cache.capacity, self._decoder.settings.context_length) - self._width

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Read one more token of every row.

        Args:
            ids: int64 [batch].

        Returns:
            The new ``logits``, float32 [batch, vocabulary]; those given before stay as they are.

        Raises:
            DataError: a row has as many tokens as the model reads.
        """
        self.logits = self._advance(ids[:, None])[:, 0]
        return self.logits

    def read_ahead(self, ids: Sequence[int]) -> np.ndarray:
        """Read several more tokens of the only row, and say what comes after each.

        Args:
            ids: at least one; more only where the graph gives several logits, and as ``room`` allows.

        Returns:
            float32 [tokens, vocabulary].

        Raises:
            DataError: the row has as many tokens as the model reads.
        """
        after: np.ndarray = self._advance(np.array([ids], dtype=np.int64))[0]
        self.logits = after[-1:]
        return after

    def take_back(self, count: int) -> None:
        """Forget the last tokens of the only row, as if they had not been read; ``logits`` are left as they are."""
        if count:
            del self.tokens[0][-count:]
            self._width -= count

    def _advance(self, ids: np.ndarray) -> np.ndarray:
        """Read int64 [batch, new tokens] behind what was read; float32 [batch, new tokens, vocabulary]."""
        new, settings = ids.shape[1], self._decoder.settings
        limit = settings.context_length
        if self._width + new > limit:
            raise DataError(f"the model reads {limit} tokens, prompt and answer together", hint="ask for fewer new tokens")
        if self._width + new > self.cache.capacity:
            self._grow(min(2 * self.cache.capacity, limit))
        logits = np.empty((*ids.shape, settings.vocabulary_size), dtype=np.float32)
        value = onnxruntime.OrtValue.ortvalue_from_numpy(logits)
        session = self._step_session()
        if self._binding is None:
            self._binding = self._bound_to(session, self.cache)
        if self._decoder.gives_several_logits:
            self._binding.bind_ortvalue_output(KEPT_LOGITS, value)
            # bind_cpu_input knows no inputs that have a default.
            count = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(new, dtype=np.int64))
            self._binding.bind_ortvalue_input(LOGITS_TO_KEEP, count)
        else:
            self._binding.bind_ortvalue_output("logits", value)
        positions = np.array([range(len(row), len(row) + new) for row in self.tokens], dtype=np.int64)
        self._run(session, self._binding, ids, positions, self._mask[:, : self._width + new])
        self._width += new
        for tokens, row in zip(self.tokens, ids.tolist(), strict=True):
            tokens.extend(row)
        return logits

    def _step_session(self) -> Any:
        """What steps run on: many rows are many tokens, as a prompt is."""
        rows, prompts = self._decoder.settings.prompt_graph_rows, self._decoder.prompt_session
        return prompts if prompts is not None and rows is not None and len(self.tokens) >= rows else self._decoder.session

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with some rows only, in ascending order; the others are not computed any more."""
        kept = sorted(rows)
        self.tokens = [self.tokens[row] for row in kept]
        self.logits = self.logits[kept]
        self.cache.keep_rows(kept, max(map(len, self.tokens), default=0))
        self._take_memory(kept)
        self._take_mask(kept)
        self._binding = None

    def reorder(self, rows: Sequence[int]) -> None:
        """Go on with these rows in this order; a row may come more than once, as beams do, or not at all.

        What the rows have read is copied, and of the memory nothing as long as every row keeps its source.

        Args:
            rows: indices of rows; at least one.
        """
        taken = list(rows)
        if taken == list(range(len(self.tokens))):
            return
        tokens = [list(self.tokens[row]) for row in taken]
        moved = self.cache.reorder(taken, max(map(len, tokens)))
        self.tokens, self.logits = tokens, self.logits[taken]
        moved = self._take_memory(taken) or moved
        self._take_mask(taken)
        if moved:
            self._binding = None

    def _take_memory(self, rows: Sequence[int]) -> bool:
        """Whether the memory is another one then, and must be bound."""
        before = self.memory
        if before is not None:
            self.memory = before.select(rows)
        return self.memory is not before

    def _take_mask(self, rows: Sequence[int]) -> None:
        mask = self._mask[rows, : self._width]
        # Columns in which only dropped rows had a token go, so that the mask is never wider than the model reads.
        used = mask.any(axis=0)
        self._width = int(used.sum())
        self._mask = np.ones((len(rows), self.cache.capacity), dtype=np.int64)
        self._mask[:, : self._width] = mask[:, used]

    def _run(self, session: Any, binding: Any, ids: np.ndarray, positions: np.ndarray, mask: np.ndarray) -> None:
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        # Of one row the columns in use lie in one piece, and are not copied.
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))
        if self._decoder.reads_positions:
            binding.bind_cpu_input(POSITIONS, np.ascontiguousarray(positions))
        session.run_with_iobinding(binding)

    def _bound_to(self, session: Any, cache: KeyValueCache, *, in_place: bool = True) -> Any:
        binding = session.io_binding()
        cache.bind(binding, in_place=in_place)
        if self.memory is not None:
            self.memory.bind(binding)
        return binding

    def _grow(self, tokens: int) -> None:
        self.cache = self.cache.larger(tokens, self._width)
        grown = np.ones((self.cache.batch, self.cache.capacity), dtype=np.int64)
        grown[:, : self._width] = self._mask[:, : self._width]
        self._mask = grown
        self._binding = None


def _groups(lengths: Sequence[int]) -> list[range]:
    """Consecutive prompts that are read together: as long as padding costs less than a call of its own, and not too many tokens."""
    groups: list[range] = []
    for place in range(len(lengths)):
        group = range(groups[-1].start, place + 1) if groups else range(1)
        own = lengths[group.start : group.stop]
        tokens = len(own) * max(own)
        if len(own) > 1 and tokens <= GROUP_TOKENS and tokens - sum(own) <= ROW_COST_TOKENS * (len(own) - 1):
            groups[-1] = group
        else:
            groups.append(range(place, place + 1))
    return groups


def check_prompts(rows: Sequence[Sequence[int]], context_length: int) -> None:
    """Say it plainly when prompts cannot be read.

    Raises:
        DataError: there is no prompt, or one that has no tokens, or more than the model reads.
    """
    if not rows:
        raise DataError("there is no prompt", hint="give at least one")
    for index, row in enumerate(rows):
        if not row:
            raise DataError("the prompt has no tokens", where=f"prompt {index}", hint="leave empty prompts out")
        if len(row) > context_length:
            raise DataError(
                f"the prompt has {len(row)} tokens, and the model reads {context_length}, prompt and answer together",
                where=f"prompt {index}",
                hint="shorten it",
            )

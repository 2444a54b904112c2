"""A compiled encoder-decoder of text against its peers: the time to the first new token, and that of those after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal, Protocol

from hfaccel.errors import ExportError, UsageError
from hfaccel.measure.decoding import Request
from hfaccel.measure.timing import Speedup, Timing, compare
from hfaccel.measure.verdict import per_second, speedup_cells, speedup_json, token_cells, token_json

if TYPE_CHECKING:
    from hfaccel.measure.stopwatch import Stopwatch

Part = Literal["source", "answer", "whole"]
COLUMNS = ("workload", "what", "engine", "tokens/s", "ms/token", "p50 ms", "p95 ms", "speed-up", "at least", "same tokens")
_LEAST_MS = 1e-6


class AnswerEngine(Protocol):
    """An encoder-decoder of text in some engine, for one source at a time."""

    def answer(self, source: Sequence[int], new: int) -> Callable[[], list[int]]:
        """A run that reads a source and writes so many new tokens greedily, ending with none of them; it gives their ids."""


@dataclass(frozen=True)
class OpenAnswerer:
    """An open engine and its name in reports."""

    label: str
    engine: AnswerEngine


@dataclass(frozen=True)
class AnswerRow:
    """One engine at one part of one request.

    Attributes:
        request: tokens of the source, and new ones.
        part: ``source``: up to the first new token. ``whole``: up to the last. ``answer``: the difference of both, round by round.
        engine: its name.
        tokens: that the part reads or writes.
        timing: of the part as a whole.
        speedup: how many times faster the artifact is; None for the artifact itself.
        same: new tokens up to the first that differs from the artifact's; None for the artifact itself.
    """

    request: Request
    part: Part
    engine: str
    tokens: int
    timing: Timing
    speedup: Speedup | None
    same: int | None

    @property
    def tokens_per_second(self) -> float:
        """Speed at the median."""
        return per_second(self.tokens, self.timing)

    def cells(self) -> tuple[str, ...]:
        """The row as text, by :data:`COLUMNS`; what was not stable says so instead of giving a number."""
        same = "" if self.same is None else f"{self.same} of {self.request.new}"
        numbers = (*token_cells(self.tokens, self.timing), *speedup_cells(self.speedup))
        return (str(self.request), self.part, self.engine, *numbers, same)

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON types, samples included; derived numbers are null where the timing was not stable."""
        return {
            "workload": str(self.request),
            "part": self.part,
            "engine": self.engine,
            **token_json(self.tokens, self.timing),
            "same_tokens": self.same,
            "artifact_speedup": None if self.speedup is None else speedup_json(self.speedup),
        }


def less(whole: Timing, *parts: Timing) -> Timing:
    """What is left of a timing without its parts, round by round; all from one call of ``interleaved``."""
    rows = zip(whole.samples_ms, *(part.samples_ms for part in parts), strict=True)
    return Timing(tuple(max(total - sum(others), _LEAST_MS) for total, *others in rows))


def check_answer_requests(requests: Sequence[Request], source_length: int, room: int) -> None:
    """Refuse requests that the model cannot carry out.

    Args:
        requests: tokens of the source, and new ones.
        source_length: most tokens that the encoder reads.
        room: most tokens of an answer.

    Raises:
        UsageError: one is longer.
    """
    for request in requests:
        if request.prompt > source_length or request.new > room:
            raise UsageError(
                f"{request} is longer than the model allows: {source_length} tokens of the source, {room} new ones",
                where="--workload",
                hint=f"write source+new tokens, {source_length}+{room} at most",
            )


def run_answer_bench(
    artifact: OpenAnswerer,
    peers: Sequence[OpenAnswerer],
    requests: Sequence[Request],
    *,
    source_of: Callable[[int], Sequence[int]],
    watch: Stopwatch,
) -> tuple[AnswerRow, ...]:
    """Time the artifact and its peers in interleaved rounds, all on the same source.

    Not every engine tells how long its encoder takes; all can be asked for one token, and for many.

    Args:
        artifact: what the speed-ups are about.
        peers: what it is compared with.
        requests: tokens of the source, and new ones; see :func:`check_answer_requests`.
        source_of: token ids of a source of so many tokens.
        watch: its seconds are for one part of one request; a peer that fails there has no row.
    """
    rows: list[AnswerRow] = []
    everyone = (artifact, *peers)
    for request in requests:
        watch.on_step(f"timing {request}: {', '.join(item.label for item in everyone)}")
        source = source_of(request.prompt)
        answers: dict[str, list[int]] = {}
        able = watch.prepared({item.label: partial(_checked, item, source, request.new, answers) for item in everyone})
        runs = {
            (name, part): partial(_run, engine.answer(source, new))
            for name, engine in ((item.label, item.engine) for item in everyone if item.label in able)
            for part, new in (("source", 1), ("whole", request.new))
        }
        names = {pair: f"{pair[0]}, {pair[1]}" for pair in runs}
        timings = watch.measure({names[pair]: run for pair, run in runs.items()}, times=2)
        parts = {
            name: _parts(timings[names[name, "source"]], timings[names[name, "whole"]], request)  # of one call
            for name in able
        }
        rows += _rows(request, artifact.label, parts, answers)
    return tuple(rows)


def _checked(item: OpenAnswerer, source: Sequence[int], new: int, answers: dict[str, list[int]]) -> Callable[[], None]:
    run = item.engine.answer(source, new)

    def check() -> None:
        answers[item.label] = tokens = run()
        if len(tokens) != new:
            raise ExportError(f"wrote {len(tokens)} tokens where {new} were asked for")

    return check


def _run(answer: Callable[[], list[int]]) -> None:
    answer()


def _parts(source: Timing, whole: Timing, request: Request) -> dict[Part, tuple[int, Timing]]:
    parts: dict[Part, tuple[int, Timing]] = {"source": (request.prompt, source)}
    if request.new > 1:
        parts["answer"] = (request.new - 1, less(whole, source))
    return {**parts, "whole": (request.new, whole)}


def _rows(
    request: Request, own: str, parts: dict[str, dict[Part, tuple[int, Timing]]], answers: dict[str, list[int]]
) -> list[AnswerRow]:
    rows = []
    for part in parts[own]:
        for name, timed in parts.items():
            tokens, timing = timed[part]
            speedup = None if name == own else compare(timing, parts[own][part][1])
            same = None if name == own else _same(answers[name], answers[own])
            rows.append(AnswerRow(request, part, name, tokens, timing, speedup, same))
    return rows


def _same(first: Sequence[int], second: Sequence[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))

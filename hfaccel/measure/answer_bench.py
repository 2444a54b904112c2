"""A compiled encoder-decoder of text against its peers: the time to the first new token, and that of those after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Literal, Protocol

from hfaccel.errors import ExportError, UsageError
from hfaccel.measure.bench import NOT_STABLE, PAUSE_S, drop_failing
from hfaccel.measure.decoding import Request
from hfaccel.measure.generation_bench import speedup_json
from hfaccel.measure.timing import PATIENCE, SETTLE_S, Speedup, Timing, compare, interleaved, stay_awake

Part = Literal["source", "answer", "whole"]
COLUMNS = ("workload", "what", "engine", "tokens/s", "ms/token", "p50 ms", "p95 ms", "speed-up", "at least", "same tokens")
_MILLISECONDS = 1000.0
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
        return self.tokens * _MILLISECONDS / self.timing.p50

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per token at the median."""
        return self.timing.p50 / self.tokens

    def cells(self) -> tuple[str, ...]:
        """The row as text, by :data:`COLUMNS`; what was not stable says so instead of giving a number."""
        timing = self.timing
        if timing.stable:
            numbers = [f"{self.tokens_per_second:.1f}", f"{self.ms_per_token:.2f}", f"{timing.p50:.1f}", f"{timing.p95:.1f}"]
        else:
            numbers = [NOT_STABLE, "", "", ""]
        same = "" if self.same is None else f"{self.same} of {self.request.new}"
        return (str(self.request), self.part, self.engine, *numbers, *speedup_cells(self.speedup), same)

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON types, samples included; derived numbers are null where the timing was not stable."""
        timing, stable = self.timing, self.timing.stable
        return {
            "workload": str(self.request),
            "part": self.part,
            "engine": self.engine,
            "stable": stable,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second if stable else None,
            "ms_per_token": self.ms_per_token if stable else None,
            "p50_ms": timing.p50 if stable else None,
            "p95_ms": timing.p95 if stable else None,
            "same_tokens": self.same,
            "artifact_speedup": None if self.speedup is None else speedup_json(self.speedup),
            "samples_ms": [round(sample, 4) for sample in timing.samples_ms],
        }


def speedup_cells(speedup: Speedup | None) -> tuple[str, str]:
    """Ratio and lower bound, that they are not stable, or nothing for the artifact itself."""
    if speedup is None:
        return ("", "")
    return (f"{speedup.ratio:.2f}x", f"{speedup.lower_bound:.2f}x") if speedup.stable else (NOT_STABLE, "")


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
    seconds: float,
    pause_s: float = PAUSE_S,
    on_step: Callable[[str], None] = lambda _: None,
    on_failure: Callable[[str, Exception], None] = lambda _name, _error: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = stay_awake,
) -> tuple[AnswerRow, ...]:
    """Time the artifact and its peers in interleaved rounds, all on the same source.

    Not every engine tells how long its encoder takes; all can be asked for one token, and for many.

    Args:
        artifact: what the speed-ups are about.
        peers: what it is compared with.
        requests: tokens of the source, and new ones; see :func:`check_answer_requests`.
        source_of: token ids of a source of so many tokens.
        seconds: time budget of one part of one request, all engines together.
        pause_s: pause between runs, see :mod:`hfaccel.measure.timing`.
        on_step: told what is being timed now.
        on_failure: told of a peer that fails; it has no row there.
        clock: seconds, rising.
        sleep: how to pause.
    """
    rows: list[AnswerRow] = []
    everyone = (artifact, *peers)
    for request in requests:
        on_step(f"timing {request}: {', '.join(item.label for item in everyone)}")
        source = source_of(request.prompt)
        answers: dict[str, list[int]] = {}
        able = drop_failing({item.label: partial(_checked, item, source, request.new, answers) for item in everyone}, on_failure)
        runs = {
            (name, part): partial(_run, engine.answer(source, new))
            for name, engine in ((item.label, item.engine) for item in everyone if item.label in able)
            for part, new in (("source", 1), ("whole", request.new))
        }
        names = {pair: f"{pair[0]}, {pair[1]}" for pair in runs}
        timings = interleaved(
            {names[pair]: run for pair, run in runs.items()},
            seconds=2 * seconds,
            pause_s=pause_s,
            settle_s=SETTLE_S,
            patience=PATIENCE,
            clock=clock,
            sleep=sleep,
        )
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

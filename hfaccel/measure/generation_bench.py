"""A compiled decoder against its peers: tokens per second of the prompt and of the answer, in interleaved runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from hfaccel.errors import UsageError
from hfaccel.measure.bench import NOT_STABLE, PAUSE_S, drop_failing
from hfaccel.measure.timing import PATIENCE, SETTLE_S, Speedup, Timing, compare, interleaved, stay_awake
from hfaccel.measure.token_engines import TokenEngine, draw_tokens

if TYPE_CHECKING:
    from hfaccel.measure.decoding import Request
    from hfaccel.measure.likeness import Likeness
    from hfaccel.measure.peers.decoders import OpenDecoder, OpenDecoders

Part = Literal["prompt", "answer"]
PARTS: tuple[Part, ...] = get_args(Part)
COLUMNS = ("workload", "what", "engine", "tokens/s", "ms/token", "p50 ms", "p95 ms", "speed-up", "at least", "cosine")
_MILLISECONDS = 1000.0


@dataclass(frozen=True)
class GenerationRow:
    """One engine at one part of one request.

    Attributes:
        request: prompt and new tokens.
        part: which of the two was timed, as a whole.
        engine: its name.
        timing: of the whole part.
        speedup: how many times faster the artifact is; None for the artifact itself.
        likeness: how far its logits are the source's; None where that is not known.
    """

    request: Request
    part: Part
    engine: str
    timing: Timing
    speedup: Speedup | None
    likeness: Likeness | None = None

    @property
    def tokens(self) -> int:
        """Tokens that a run reads or writes."""
        return self.request.prompt if self.part == "prompt" else self.request.new

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
        if self.speedup is None:
            verdict = ["", ""]
        elif self.speedup.stable:
            verdict = [f"{self.speedup.ratio:.2f}x", f"{self.speedup.lower_bound:.2f}x"]
        else:
            verdict = [NOT_STABLE, ""]
        likeness = "" if self.likeness is None else self.likeness.cell()
        return (str(self.request), self.part, self.engine, *numbers, *verdict, likeness)

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON types, samples included; derived numbers are null where the timing was not stable."""
        timing, stable = self.timing, self.timing.stable
        data: dict[str, Any] = {
            "workload": str(self.request),
            "part": self.part,
            "engine": self.engine,
            "stable": stable,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second if stable else None,
            "ms_per_token": self.ms_per_token if stable else None,
            "p50_ms": timing.p50 if stable else None,
            "p95_ms": timing.p95 if stable else None,
            "samples_ms": [round(sample, 4) for sample in timing.samples_ms],
        }
        if self.likeness is not None:
            data["likeness"] = self.likeness.to_json()
        if self.speedup is not None:
            data["artifact_speedup"] = speedup_json(self.speedup)
        return data


def speedup_json(speedup: Speedup) -> dict[str, Any]:
    """A speed-up as plain JSON types; its numbers are null where it was not stable."""
    stable = speedup.stable
    return {
        "stable": stable,
        "ratio": speedup.ratio if stable else None,
        "lower_bound": speedup.lower_bound if stable else None,
        "upper_bound": speedup.upper_bound if stable else None,
    }


def check_requests(requests: Sequence[Request], context_length: int) -> None:
    """Refuse requests that are longer than the model can read.

    Raises:
        UsageError: prompt and answer together have more tokens than ``context_length``.
    """
    for request in requests:
        if request.prompt + request.new > context_length:
            raise UsageError(
                f"{request} is longer than the {context_length} tokens that the model reads, prompt and answer together",
                where="--workload",
                hint=f"write prompt+new tokens that add up to {context_length} at most",
            )


def run_generation_bench(
    engines: OpenDecoders,
    requests: Sequence[Request],
    *,
    vocabulary_size: int,
    seconds: float,
    seed: int = 0,
    pause_s: float = PAUSE_S,
    on_step: Callable[[str], None] = lambda _: None,
    on_failure: Callable[[str, Exception], None] = lambda _name, _error: None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = stay_awake,
) -> tuple[GenerationRow, ...]:
    """Time the artifact and its peers in interleaved rounds, all on the same token ids.

    Args:
        engines: what to time.
        requests: prompt and new tokens; none longer than the model reads.
        vocabulary_size: ids are drawn from ``[0, vocabulary_size)``.
        seconds: time budget of one part of one request, all engines together.
        seed: of the ids.
        pause_s: pause between runs, see :mod:`hfaccel.measure.timing`.
        on_step: told what is being timed now.
        on_failure: told of a peer that fails; it has no row there.
        clock: seconds, rising.
        sleep: how to pause.
    """
    rows: list[GenerationRow] = []
    everyone: tuple[OpenDecoder, ...] = (engines.artifact, *engines.peers)
    for request in requests:
        prompt = draw_tokens(request.prompt, vocabulary_size, seed=seed)
        answer = draw_tokens(request.new, vocabulary_size, seed=seed + 1)
        for part in PARTS:
            on_step(f"timing {request}, {part}: {', '.join(item.label for item in everyone)}")
            prepare = {item.label: partial(_prepare, item.engine, part, prompt, answer) for item in everyone}
            runners = drop_failing(prepare, on_failure)
            timings = interleaved(
                runners, seconds=seconds, pause_s=pause_s, settle_s=SETTLE_S, patience=PATIENCE, clock=clock, sleep=sleep
            )
            own = timings[engines.artifact.label]
            for item in everyone:
                if item.label in timings:
                    speedup = None if item is engines.artifact else compare(timings[item.label], own)
                    rows.append(GenerationRow(request, part, item.label, timings[item.label], speedup, item.likeness))
    return tuple(rows)


def _prepare(engine: TokenEngine, part: Part, prompt: Sequence[int], answer: Sequence[int]) -> Callable[[], None]:
    return engine.read(prompt) if part == "prompt" else engine.write(prompt, answer)

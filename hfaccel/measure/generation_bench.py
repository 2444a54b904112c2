"""A compiled decoder against its peers: tokens per second of the prompt, of the answer and of whole requests, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

from hfaccel.errors import UsageError
from hfaccel.measure.timing import Speedup, Timing, compare
from hfaccel.measure.token_engines import TokenEngine, draw_tokens
from hfaccel.measure.verdict import per_second, speedup_cells, speedup_json, token_cells, token_json

if TYPE_CHECKING:
    from hfaccel.measure.decoding import Request
    from hfaccel.measure.likeness import Likeness
    from hfaccel.measure.peers.decoders import OpenDecoder, OpenDecoders
    from hfaccel.measure.stopwatch import Stopwatch

Part = Literal["prompt", "answer", "request"]
PARTS: tuple[Part, ...] = get_args(Part)
COLUMNS = ("workload", "what", "engine", "tokens/s", "ms/token", "p50 ms", "p95 ms", "speed-up", "at least", "cosine")


@dataclass(frozen=True)
class GenerationRow:
    """One engine at one part of one request.

    Attributes:
        request: prompt and new tokens.
        part: what was timed, as a whole; of a ``request`` the engine chooses the answer itself, to a text that people wrote.
        engine: its name.
        timing: of the whole part.
        speedup: how many times faster the artifact is; None for the artifact itself.
        likeness: how far its logits are the source's; None where that is not known.
        texts: how many a run answers, one after the other.
    """

    request: Request
    part: Part
    engine: str
    timing: Timing
    speedup: Speedup | None
    likeness: Likeness | None = None
    texts: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that a run reads, or writes where it does both."""
        return self.request.prompt if self.part == "prompt" else self.request.new * self.texts

    @property
    def tokens_per_second(self) -> float:
        """Speed at the median."""
        return per_second(self.tokens, self.timing)

    def cells(self) -> tuple[str, ...]:
        """The row as text, by :data:`COLUMNS`; what was not stable says so instead of giving a number."""
        likeness = "" if self.likeness is None else self.likeness.cell()
        numbers = (*token_cells(self.tokens, self.timing), *speedup_cells(self.speedup))
        return (str(self.request), self.part, self.engine, *numbers, likeness)

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON types, samples included; derived numbers are null where the timing was not stable."""
        data: dict[str, Any] = {"workload": str(self.request), "part": self.part, "engine": self.engine}
        data |= token_json(self.tokens, self.timing)
        if self.likeness is not None:
            data["likeness"] = self.likeness.to_json()
        if self.speedup is not None:
            data["artifact_speedup"] = speedup_json(self.speedup)
        return data


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
    watch: Stopwatch,
    prompts: Mapping[Request, Sequence[Sequence[int]]] = MappingProxyType({}),
    seed: int = 0,
) -> tuple[GenerationRow, ...]:
    """Time the artifact and its peers in interleaved rounds, all on the same token ids.

    Prompt and answer are timed on random ids, of which no engine can make anything; whole requests only where texts are given.

    Args:
        engines: what to time.
        requests: prompt and new tokens; none longer than the model reads.
        vocabulary_size: ids are drawn from ``[0, vocabulary_size)``.
        watch: its seconds are for one part of one request; a peer that fails there has no row.
        prompts: token ids of texts that people wrote, by request.
        seed: of the ids.
    """
    rows: list[GenerationRow] = []
    everyone: tuple[OpenDecoder, ...] = (engines.artifact, *engines.peers)
    for request in requests:
        prompt = draw_tokens(request.prompt, vocabulary_size, seed=seed)
        answer = draw_tokens(request.new, vocabulary_size, seed=seed + 1)
        texts = prompts.get(request, ())
        for part in PARTS if texts else PARTS[:2]:
            watch.on_step(f"timing {request}, {part}: {', '.join(item.label for item in everyone)}")
            if part == "request":
                prepare = {item.label: partial(_answer_all, item.engine, texts, request.new) for item in everyone}
            else:
                prepare = {item.label: partial(_prepare, item.engine, part, prompt, answer) for item in everyone}
            timings = watch.measure(watch.prepared(prepare))
            own = timings[engines.artifact.label]
            for item in everyone:
                if item.label in timings:
                    speedup = None if item is engines.artifact else compare(timings[item.label], own)
                    count = len(texts) if part == "request" else 1
                    rows.append(GenerationRow(request, part, item.label, timings[item.label], speedup, item.likeness, count))
    return tuple(rows)


def _prepare(engine: TokenEngine, part: Part, prompt: Sequence[int], answer: Sequence[int]) -> Callable[[], None]:
    return engine.read(prompt) if part == "prompt" else engine.write(prompt, answer)


def _answer_all(engine: TokenEngine, prompts: Sequence[Sequence[int]], new_tokens: int) -> Callable[[], None]:
    runs = [engine.answer(prompt, new_tokens) for prompt in prompts]

    def run() -> None:
        for answer in runs:
            answer()

    return run

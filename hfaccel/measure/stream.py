"""A realistic stream: many texts of mixed length in the order they come, text in and answers out, in total."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfaccel.errors import DataError
from hfaccel.measure.contenders import complete
from hfaccel.measure.timing import Speedup, Timing, compare
from hfaccel.measure.verdict import NOT_STABLE, per_second, speedup_cells, speedup_json
from hfaccel.runtime.model import Model
from hfaccel.runtime.tokenizer import Text

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Contract
    from hfaccel.measure.likeness import Likeness
    from hfaccel.measure.peers.open import Peer
    from hfaccel.measure.stopwatch import Stopwatch

COLUMNS = ("engine", "order of texts", "total ms", "texts/s", "speed-up", "at least", "cosine")
MIN_ROUNDS = 6
"""The fewest that can be told stable; a stream takes seconds, not milliseconds."""


@dataclass(frozen=True)
class StreamRun:
    """One way through the whole stream: who, in which order, and a function that does it once."""

    engine: str
    order: str
    run: Callable[[], None]
    likeness: Likeness | None

    @property
    def name(self) -> str:
        """Unique within a stream."""
        return f"{self.engine}, {self.order}"

    def prepare(self) -> Callable[[], None]:
        """The run to time."""
        return self.run


@dataclass(frozen=True)
class StreamRow:
    """What one run took; ``speedup`` is the artifact's over it, None for the artifact itself."""

    engine: str
    order: str
    texts: int
    timing: Timing
    speedup: Speedup | None
    likeness: Likeness | None

    def cells(self) -> tuple[str, ...]:
        """The row as text, by :data:`COLUMNS`; what was not stable says so instead of giving a number."""
        numbers = [NOT_STABLE, ""]
        if self.timing.stable:
            numbers = [f"{self.timing.p50:.0f}", f"{per_second(self.texts, self.timing):.1f}"]
        likeness = "" if self.likeness is None else self.likeness.cell()
        return (self.engine, self.order, *numbers, *speedup_cells(self.speedup), likeness)

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON types, samples included; derived numbers are null where the timing was not stable."""
        stable, speedup = self.timing.stable, self.speedup
        return {
            "engine": self.engine,
            "order": self.order,
            "texts": self.texts,
            "stable": stable,
            "total_ms": self.timing.p50 if stable else None,
            "texts_per_second": per_second(self.texts, self.timing) if stable else None,
            "artifact_speedup": None if speedup is None else speedup_json(speedup),
            "likeness": None if self.likeness is None else self.likeness.to_json(),
            "samples_ms": [round(sample, 2) for sample in self.timing.samples_ms],
        }


def read_texts(path: Path, contract: Contract) -> tuple[Text, ...]:
    """All texts of a file in its order, repeated ones included, as the task reads them; labels are not looked at.

    Args:
        path: one text a line (.txt), or CSV, TSV, JSON, JSONL, Parquet with the usual column names.
        contract: the task.

    Raises:
        DataError: the file is missing or empty, is not parsable, or lacks the columns that the task needs.
    """
    from hfaccel.evaluate.columns import find_roles
    from hfaccel.evaluate.readers import read_rows

    if not path.is_file():
        raise DataError("no such file", where=str(path), hint="give a file with one text a line, or CSV with a column 'text'")
    rows = [row for _, row in read_rows(path)]
    found = list(dict.fromkeys(column for row in rows for column in row))
    texts: list[Text] = []
    if path.suffix.lower() == ".txt":
        texts = [complete(str(row["text"]), contract) for row in rows]
    else:
        roles = find_roles(found, contract.task, {}, str(path))
        second = roles.get("context") or roles.get("text_pair")
        for row in rows:
            words = row[roles["words"]] if "words" in roles else None
            first = " ".join(map(str, words)) if isinstance(words, list) else str(row[roles["text"]])
            if second is None:
                texts.append(complete(first, contract))
            elif contract.task == "sentence-similarity":
                texts += [first, str(row[second])]
            else:
                texts.append((first, str(row[second])))
    return tuple(texts)


def stream_runs(
    name: str, artifact: Model, peers: Sequence[Peer], texts: Sequence[Text], *, batch: int, likeness: Likeness | None = None
) -> tuple[StreamRun, ...]:
    """The artifact as it is used (all texts in one call; it sorts and splits by itself), and each peer twice.

    A peer gets batches in the given order, and batches of texts sorted by length (of the text: tokens are counted by no one before
    the tokenizer), as users of such engines are advised to do.

    Args:
        name: of the artifact.
        artifact: with a tokenizer that remembers no text.
        peers: with the same tokenizer.
        texts: the stream.
        batch: texts of one batch.
        likeness: of the artifact.
    """
    in_order: list[Any] = list(texts)
    by_length = sorted(in_order, key=_characters)

    def whole() -> None:
        artifact(in_order, max_batch=batch)

    def batches(model: Model, stream: list[Any]) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, len(stream), batch):
                model(stream[start : start + batch], max_batch=batch)

        return run

    runs = [StreamRun(name, "as it comes", whole, likeness)]
    for peer in peers:
        runs.append(StreamRun(peer.label, "as it comes", batches(peer.model, in_order), peer.likeness))
        runs.append(StreamRun(peer.label, "sorted by length", batches(peer.model, by_length), peer.likeness))
    return tuple(runs)


def run_stream(
    runs: Sequence[StreamRun],
    texts: int,
    *,
    watch: Stopwatch,
) -> tuple[StreamRow, ...]:
    """Time all runs in interleaved rounds, at least six of each.

    Args:
        runs: the artifact's first.
        texts: how many texts the stream has.
        watch: its seconds are for all, where six rounds do not take longer; a peer that fails is left out.
    """
    watch.on_step(f"timing a stream of {texts} texts, {len(runs)} ways")
    prepared = watch.prepared({item.name: item.prepare for item in runs})
    timings = watch.measure(prepared, min_rounds=MIN_ROUNDS, warmup_rounds=0)
    own = timings[runs[0].name]
    return tuple(
        StreamRow(
            item.engine,
            item.order,
            texts,
            timings[item.name],
            None if item is runs[0] else compare(timings[item.name], own),
            item.likeness,
        )
        for item in runs
        if item.name in timings
    )


def _characters(text: Any) -> int:
    return len(text) if isinstance(text, str) else sum(map(len, text))

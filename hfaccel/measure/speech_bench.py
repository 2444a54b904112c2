"""A compiled speech model against its peers: sounds one after the other, as a server gets them, from samples to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.measure.answer_bench import less
from hfaccel.measure.clips import Clip
from hfaccel.measure.stream import MIN_ROUNDS
from hfaccel.measure.timing import Speedup, Timing, compare
from hfaccel.measure.verdict import NOT_STABLE, speedup_cells, speedup_json

if TYPE_CHECKING:
    from hfaccel.measure.stopwatch import Stopwatch

COLUMNS = (
    "engine",
    "real-time factor",
    "total ms",
    "p50 ms/clip",
    "p95 ms/clip",
    "speed-up",
    "at least",
    "word error rate",
    "same text",
)
PART_COLUMNS = ("what takes the time", "ms/clip", "share")
_MILLISECONDS = 1000.0

Listen = Callable[[np.ndarray], str]
"""Writes down what is said in samples, float32 [samples]."""


@dataclass(frozen=True)
class OpenListener:
    """An open engine and its name in reports."""

    label: str
    listen: Listen


@dataclass(frozen=True)
class SpeechRow:
    """One engine over all clips.

    Attributes:
        engine: its name.
        sound_seconds: length of all clips together.
        timing: of all clips together; a sample is the sum over one round.
        clips_ms: median of each clip.
        speedup: how many times faster the artifact is, over all clips; None for the artifact itself.
        word_error_rate: over the clips; None where the data has no transcripts, or jiwer is not installed.
        same: how many transcripts are the artifact's, letter by letter.
    """

    engine: str
    sound_seconds: float
    timing: Timing
    clips_ms: tuple[float, ...]
    speedup: Speedup | None
    word_error_rate: float | None
    same: int

    @property
    def real_time_factor(self) -> float:
        """Seconds of work per second of sound, at the median."""
        return self.timing.p50 / _MILLISECONDS / self.sound_seconds

    def clip_ms(self, percentile: float) -> float:
        """Milliseconds that so many percent of the clips take at most."""
        return float(np.percentile(self.clips_ms, percentile))

    def cells(self) -> tuple[str, ...]:
        """The row as text, by :data:`COLUMNS`; what was not stable says so instead of giving a number."""
        numbers = [NOT_STABLE, "", "", ""]
        if self.timing.stable:
            times = (self.timing.p50, self.clip_ms(50), self.clip_ms(95))
            numbers = [f"{self.real_time_factor:.4f}", *(f"{value:.0f}" for value in times)]
        errors = "" if self.word_error_rate is None else f"{self.word_error_rate:.1%}"
        same = "" if self.speedup is None else f"{self.same} of {len(self.clips_ms)}"
        return (self.engine, *numbers, *speedup_cells(self.speedup), errors, same)

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON types, samples included; derived numbers are null where the timing was not stable."""
        stable = self.timing.stable
        return {
            "engine": self.engine,
            "stable": stable,
            "real_time_factor": self.real_time_factor if stable else None,
            "total_ms": self.timing.p50 if stable else None,
            "clip_p50_ms": self.clip_ms(50) if stable else None,
            "clip_p95_ms": self.clip_ms(95) if stable else None,
            "artifact_speedup": None if self.speedup is None else speedup_json(self.speedup),
            "word_error_rate": self.word_error_rate,
            "same_transcripts": self.same,
            "samples_ms": [round(sample, 2) for sample in self.timing.samples_ms],
        }


@dataclass(frozen=True)
class PartRow:
    """One part of the artifact's work over all clips.

    Attributes:
        part: its name; ``decoder`` is all that is no other part: the tokens, how they are chosen, and their text.
        clips: how many there are.
        timing: of all clips together.
        share: of the whole, with its bounds; the ratio may be stable where the times are not.
    """

    part: str
    clips: int
    timing: Timing
    share: Speedup

    def cells(self) -> tuple[str, ...]:
        """The row as text, by :data:`PART_COLUMNS`."""
        time_of_clip = f"{self.timing.p50 / self.clips:.1f}" if self.timing.stable else NOT_STABLE
        return (self.part, time_of_clip, f"{self.share.ratio:.0%}" if self.share.stable else NOT_STABLE)

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON types; numbers are null where the timing was not stable."""
        stable = self.timing.stable
        return {
            "part": self.part,
            "stable": stable,
            "ms_per_clip": self.timing.p50 / self.clips if stable else None,
            "share": speedup_json(self.share),
        }


@dataclass(frozen=True)
class SpeechResult:
    """All that was found; ``transcripts`` are those of each engine, in the order of the clips."""

    rows: tuple[SpeechRow, ...]
    parts: tuple[PartRow, ...]
    transcripts: Mapping[str, tuple[str, ...]]

    def clips_json(self, clips: Sequence[Clip]) -> list[dict[str, Any]]:
        """Each clip with its median and its transcript by each engine, as plain JSON types."""
        return [
            {
                "clip": clip.name,
                "seconds": clip.seconds,
                "references": list(clip.references),
                "p50_ms": {row.engine: round(row.clips_ms[index], 2) if row.timing.stable else None for row in self.rows},
                "text": {row.engine: self.transcripts[row.engine][index] for row in self.rows},
            }
            for index, clip in enumerate(clips)
        ]


def run_speech_bench(
    artifact: OpenListener,
    peers: Sequence[OpenListener],
    clips: Sequence[Clip],
    parts: Mapping[str, Callable[[Clip], Callable[[], None]]],
    *,
    watch: Stopwatch,
) -> SpeechResult:
    """Let all engines write down each clip in turn, round after round, at least six times.

    Args:
        artifact: what the speed-ups are about.
        peers: what it is compared with.
        clips: at least one; either all with transcripts or none.
        parts: of the artifact's work, by name, each a run on a clip; they are timed beside the whole.
        watch: its seconds are for all clips and engines, where six rounds do not take longer; a peer that fails is left out.
    """
    transcripts: dict[str, tuple[str, ...]] = {}
    watch.on_step(f"transcribing {len(clips)} clips: {', '.join(item.label for item in (artifact, *peers))}")
    able = watch.prepared({item.label: partial(_transcribing, item, clips, transcripts) for item in (artifact, *peers)})
    engines = [item for item in (artifact, *peers) if item.label in able]
    watch.on_step(f"timing {len(clips)} clips, {len(engines)} engines in turn, at least {MIN_ROUNDS} times")
    runs = _runs(engines, clips, parts)
    timings = watch.measure(runs, min_rounds=MIN_ROUNDS, warmup_rounds=0)  # all were transcribed just now
    of_clips = {
        name: [timings[_name(name, index)] for index in range(len(clips))] for name in (*(item.label for item in engines), *parts)
    }
    totals = {name: _total(own) for name, own in of_clips.items()}
    rows = tuple(
        SpeechRow(
            item.label,
            sum(clip.seconds for clip in clips),
            totals[item.label],
            tuple(timing.p50 for timing in of_clips[item.label]),
            None if item is artifact else compare(totals[item.label], totals[artifact.label]),
            _errors(transcripts[item.label], clips),
            _same(transcripts[item.label], transcripts[artifact.label]),
        )
        for item in engines
    )
    return SpeechResult(rows, _parts(totals[artifact.label], {name: totals[name] for name in parts}, len(clips)), transcripts)


def _transcribing(item: OpenListener, clips: Sequence[Clip], transcripts: dict[str, tuple[str, ...]]) -> Callable[[], None]:
    def run() -> None:
        transcripts[item.label] = tuple(item.listen(clip.samples) for clip in clips)

    return run


def _runs(
    engines: Sequence[OpenListener], clips: Sequence[Clip], parts: Mapping[str, Callable[[Clip], Callable[[], None]]]
) -> dict[str, Callable[[], None]]:
    """Clip by clip every engine and every part; who begins changes from clip to clip, so that nobody always follows the same."""
    runs: dict[str, Callable[[], None]] = {}
    for index, clip in enumerate(clips):
        of_clip: dict[str, Callable[[], None]] = {
            _name(item.label, index): partial(_listen, item.listen, clip.samples) for item in engines
        }
        of_clip |= {_name(name, index): prepare(clip) for name, prepare in parts.items()}
        names = list(of_clip)
        first = index % len(names)
        runs |= {name: of_clip[name] for name in names[first:] + names[:first]}
    return runs


def _listen(listen: Listen, samples: np.ndarray) -> None:
    listen(samples)


def _name(engine: str, index: int) -> str:
    return f"{engine}, clip {index}"


def _total(timings: Sequence[Timing]) -> Timing:
    """Of all clips together, round by round."""
    return Timing(tuple(np.sum([timing.samples_ms for timing in timings], axis=0).tolist()))


def _parts(whole: Timing, parts: Mapping[str, Timing], clips: int) -> tuple[PartRow, ...]:
    every = {**parts, "decoder": less(whole, *parts.values())} if parts else {}
    return tuple(PartRow(name, clips, timing, compare(timing, whole)) for name, timing in every.items())


def _errors(transcripts: Sequence[str], clips: Sequence[Clip]) -> float | None:
    if not all(clip.references for clip in clips) or find_spec("jiwer") is None:
        return None
    from hfaccel.evaluate.answers import word_error_rate, word_errors

    counts = word_errors(transcripts, [clip.references for clip in clips])
    return float(word_error_rate(counts, np.ones((1, len(clips))))[0])


def _same(transcripts: Sequence[str], own: Sequence[str]) -> int:
    return sum(first == second for first, second in zip(transcripts, own, strict=True))

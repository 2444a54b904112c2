"""Candidates between quantize (which makes and times them) and accuracy (which judges them)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hfaccel.artifact.contract import Precision, SessionSettings
from hfaccel.rewrites.graphs import GRAPH_NAME, graph_bytes

FILE_NAME = "candidates.json"
FLOAT_PARENT = "float"

Reason = Literal[
    "needs-calibration-data",
    "engine-not-installed",
    "engine-not-wanted",
    "not-supported-by-target",
    "not-supported-by-model",
    "budget-too-small",
    "not-for-objective",
    "build-failed",
    "not-finite",
    "size-over-limit",
    "slower-than-parent",
    "p95-over-limit",
    "loss-over-budget",
    "slice-loss-over-budget",
    "cosine-under-minimum",
    "agreement-under-minimum",
    "batch-variant",
    "no-float-set-found",
    "slower-than-accepted",
    "not-better-than-chosen",
]


@dataclass(frozen=True)
class PointTiming:
    """One point of the workload: medians of interleaved runs, and the speed-up over the float parent with its 95 % bounds."""

    point: str
    parent_ms: float
    candidate_ms: float
    candidate_p95_ms: float
    speedup: float
    speedup_lower_bound: float
    speedup_upper_bound: float
    stable: bool


@dataclass(frozen=True)
class MatMulPrecision:
    """Where a MatMul of the float graph belongs (see :class:`hfaccel.quant.layers.MatMulPlace`), and its precision."""

    name: str
    layer: int | None
    role: str
    precision: Precision


@dataclass(frozen=True)
class Candidate:
    """One way through quantize, with what was measured and why it was dropped, if it was.

    Attributes:
        name: the rung's name, or ``float`` for a float graph.
        graph: path of the graph relative to the quantize artifact; empty when it was never built.
        precision: lowest precision that its MatMuls are computed in.
        session: settings that it was timed with and will run with.
        size_bytes: of graph and weights.
        timings: per workload point; empty when dropped before timing or not on the target.
        speedup: geometric mean over the points (1 for the float parent).
        finalist: whether the timings are of the final race, all in one run; else of a quick race.
        reason: why it was dropped, or None.
        detail: the reason in words.
        quantized: how many MatMuls are in 8 bit.
        kept_float: those left in float for their sensitivity, worst first, with their measured error.
        blockwise: those of a scheme with one scale per tensor or channel that are stored in blocks for their sensitivity.
        channelwise: those of whose input only the channels that stand out stay in float, for their sensitivity.
        eight_bit: those of a rung of 4 bit that have 8 for their sensitivity, worst for its bytes first, with their measured error.
        verdict: what the accuracy gate measured, once it did.
        pareto: whether it holds all gates, and no other that does is as good in speed, size and accuracy and better in one.
        matmuls: precision of each MatMul, of the candidate that ships only.
    """

    name: str
    graph: str
    precision: Precision
    session: SessionSettings
    size_bytes: int = 0
    timings: tuple[PointTiming, ...] = ()
    speedup: float = 1.0
    finalist: bool = False
    reason: Reason | None = None
    detail: str = ""
    quantized: int = 0
    kept_float: tuple[tuple[str, float], ...] = ()
    blockwise: tuple[str, ...] = ()
    channelwise: tuple[str, ...] = ()
    eight_bit: tuple[tuple[str, float], ...] = ()
    verdict: dict[str, Any] | None = None
    pareto: bool = False
    matmuls: tuple[MatMulPrecision, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, as the manifest shows it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Candidate:
        """The inverse of :meth:`to_json`."""
        return cls(
            **{
                **data,
                "session": SessionSettings.from_json(data["session"]),
                "timings": tuple(PointTiming(**item) for item in data["timings"]),
                "kept_float": tuple((name, error) for name, error in data["kept_float"]),
                "blockwise": tuple(data["blockwise"]),
                "channelwise": tuple(data["channelwise"]),
                "eight_bit": tuple((name, error) for name, error in data["eight_bit"]),
                "matmuls": tuple(MatMulPrecision(**item) for item in data["matmuls"]),
            }
        )


def save_candidates(candidates: Sequence[Candidate], folder: Path) -> None:
    """Write ``candidates.json``."""
    text = json.dumps([candidate.to_json() for candidate in candidates], indent=2)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def load_candidates(folder: Path) -> list[Candidate]:
    """Read ``candidates.json``; where quantize was switched off there is none, and the float graph is the only candidate."""
    if not (folder / FILE_NAME).is_file():
        return [Candidate(FLOAT_PARENT, GRAPH_NAME, "fp32", SessionSettings(), size_bytes=graph_bytes(folder))]
    return [Candidate.from_json(item) for item in json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))]

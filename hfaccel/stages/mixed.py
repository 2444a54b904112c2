"""After the search for a float set: what of it can be stored in blocks of 8 bit instead, and still holds the gate.

Blocks (the scheme ``weight-only``) keep most of float's accuracy, because each token and block has a scale of its own, and cost
less time. What results is a candidate of its own beside the one with the set in float; the final race decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from hfaccel.quant.build import write_blocks
from hfaccel.rewrites.graphs import GRAPH_NAME, graph_bytes
from hfaccel.runtime.engines import open_graph
from hfaccel.stages.parents import FALLBACK_FOLDER, FALLBACK_SUFFIX, MIXED_SUFFIX

if TYPE_CHECKING:
    from hfaccel.recipe.schema import Rung
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.candidates import Candidate
    from hfaccel.stages.examine import Examiner

TRIALS = 3


def return_to_blocks(fallback: Candidate, rung: Rung, examiner: Examiner, error_share: float, ctx: StageContext) -> Candidate:
    """The candidate with as much of its float set in blocks as holds the gate, or with the reason why none does.

    Tried are all of the set, then without the more sensitive half of it, and so on; the trials share one verdict's error.

    Args:
        fallback: holds the gate with its ``kept_float``, which is not empty.
        rung: of the scheme dynamic or static, that ``fallback`` was made of.
        examiner: of the accuracy gate.
        error_share: how much of the 5 % the trials may err with.
        ctx: of the stage, which ``fallback``'s graph lies under.
    """
    name = fallback.name.removesuffix(FALLBACK_SUFFIX) + MIXED_SUFFIX
    floating = ctx.workdir / fallback.graph
    folder = ctx.workdir / FALLBACK_FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    counts = list(_halves(len(fallback.kept_float)))
    tried = fallback
    for count in counts:
        kept, blockwise = fallback.kept_float[:count], fallback.kept_float[count:]
        path = write_blocks(rung, floating, [matmul for matmul, _ in blockwise], folder)
        finding = examiner.examine(open_graph(path, fallback.session), error_share=error_share / len(counts))
        outcome = "holds" if finding.reason is None else finding.detail
        ctx.progress.step(f"{fallback.name} with {len(blockwise)} of its float MatMuls in blocks of 8 bit: {outcome}")
        tried = replace(
            fallback,
            name=name,
            graph=f"{FALLBACK_FOLDER}/{name}/{GRAPH_NAME}",
            size_bytes=graph_bytes(folder),
            quantized=fallback.quantized + len(blockwise),
            kept_float=kept,
            blockwise=tuple(matmul for matmul, _ in blockwise),
            timings=(),
            speedup=1.0,
            verdict=finding.to_json(),
            reason=finding.reason,
            detail=finding.detail,
        )
        if finding.reason is None:
            break
    return tried


def _halves(count: int) -> Iterator[int]:
    """How many of the set stay in float: none, half, three quarters; always fewer than all."""
    tried = set()
    for trial in range(TRIALS):
        left = count - (count >> trial)
        if left < count and left not in tried:
            tried.add(left)
            yield left

"""Stage 2: clean-up rewrites to a fixed point, then the recipe's exact rewrites, each followed by clean-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.rewrites import CLEANUPS, REWRITES
from hfaccel.rewrites.graphs import GRAPH_NAME, load_graph, operator_counts, save_graph
from hfaccel.stages.base import StageContext, StageName, StageResult

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.recipe.schema import OptimizeSection, Recipe

NAME: StageName = "optimize"
REVISION = 6
LIBRARIES = ("onnx", "onnx-ir", "onnxscript")


def settings(recipe: Recipe) -> Mapping[str, Any]:
    """What of the recipe changes the optimized bytes."""
    return recipe.optimize.model_dump()


def requires(artifact: Artifact | None, ctx: StageContext) -> list[str]:
    """An exported graph."""
    return [] if artifact is not None else ["optimize needs the exported graph"]


def run(artifact: Artifact | None, ctx: StageContext) -> StageResult:
    """Rewrite the graph; the counts of every rewrite go into the record."""
    assert artifact is not None  # the pipeline checked requires()
    model = load_graph(artifact.graph_path)
    nodes_before = len(model.graph)
    changes = _clean_up(model, ctx.recipe.optimize)
    for rewrite in ctx.recipe.optimize.rewrites:
        changes[rewrite] = REWRITES[rewrite](model)
        if changes[rewrite]:  # the next one must not take for a reader what is dead
            for name, count in _clean_up(model, ctx.recipe.optimize).items():
                changes[name] += count
    save_graph(model, ctx.workdir)
    made = Artifact(ctx.workdir, GRAPH_NAME, artifact.precision, artifact.contract, record_files(ctx.workdir))
    metrics = {
        "changes": changes,
        "nodes_before": nodes_before,
        "nodes_after": len(model.graph),
        "operators": operator_counts(model),
    }
    return StageResult(made, any(changes.values()), metrics)


def _clean_up(model: onnx_ir.Model, section: OptimizeSection) -> dict[str, int]:
    """Apply the clean-ups in order until a whole round changes nothing (at most ``max_rounds`` rounds)."""
    changes: dict[str, int] = dict.fromkeys(section.cleanups, 0)
    for _ in range(section.max_rounds):
        counts = {name: CLEANUPS[name](model) for name in section.cleanups}
        for name, count in counts.items():
            changes[name] += count
        if not any(counts.values()):
            break
    return changes

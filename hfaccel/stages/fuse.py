"""Stage 3: fuse operators into onnxruntime's own, and hold the result against the recipe's fusion contract."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.recipe.formula import evaluate_formula
from hfaccel.rewrites import FUSIONS
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import GRAPH_NAME, load_graph, operator_counts, save_graph
from hfaccel.stages.base import StageContext, StageName, StageResult
from hfaccel.stages.exporters import quiet_exporters

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.recipe.schema import Recipe

NAME: StageName = "fuse"
REVISION = 6
LIBRARIES = ("transformers", "onnx", "onnx-ir", "onnxscript")


def settings(recipe: Recipe) -> Mapping[str, Any]:
    """What of the recipe changes the fused bytes; the contract is judged, not written, but a changed one must be judged anew."""
    return recipe.fuse.model_dump()


def requires(artifact: Artifact | None, ctx: StageContext) -> list[str]:
    """An optimized graph."""
    return [] if artifact is not None else ["fuse needs the optimized graph"]


def run(artifact: Artifact | None, ctx: StageContext) -> StageResult:
    """Fuse as the recipe says, and count what came out."""
    assert artifact is not None  # the pipeline checked requires()
    model = load_graph(artifact.graph_path)
    before = operator_counts(model)
    for name in ctx.recipe.fuse.fusions:
        if name == "onnxruntime":
            _fuse_for_onnxruntime(model, ctx)
        else:
            FUSIONS[name](model)
    drop_unused(model)
    counts = operator_counts(model)
    save_graph(model, ctx.workdir)
    made = Artifact(ctx.workdir, GRAPH_NAME, artifact.precision, artifact.contract, record_files(ctx.workdir))
    missed = contract_problems(ctx.recipe.fuse.contract, ctx.source.config, model)
    metrics = {"operators": counts, "contract": dict(ctx.recipe.fuse.contract), "contract_missed": missed}
    return StageResult(made, counts != before, metrics)


def _fuse_for_onnxruntime(model: onnx_ir.Model, ctx: StageContext) -> None:
    """Transformers' fusions for the target's execution provider."""
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    with quiet_exporters():
        fuse_for_onnxruntime(model, "cuda" if ctx.target.provider.startswith("CUDA") else "cpu")


def contract_problems(contract: Mapping[str, str], config: Mapping[str, Any], model: onnx_ir.Model) -> list[str]:
    """One line per operator found less often than the recipe's formula says, with the first layer that lacks it."""
    counts = operator_counts(model)
    problems = []
    for operator, formula in contract.items():
        expected, found = evaluate_formula(formula, config), counts.get(operator, 0)
        if found < expected:  # more is no fault: a head may have a fusible operator of its own
            layer = first_layer_without(operator, model)
            place = f"; first layer without: {layer}" if layer is not None else ""
            problems.append(f"{operator}: {found} in the graph, {expected} expected at least ({formula}){place}")
    return problems


def _operators(node: onnx_ir.Node) -> set[str]:
    """Of a node and of the graphs inside of it."""
    import onnx_ir

    inner = (item.as_graph() for item in node.attributes.values() if item.type == onnx_ir.AttributeType.GRAPH)
    return {node.op_type, *(each.op_type for graph in inner for each in graph)}


def first_layer_without(operator: str, model: onnx_ir.Model) -> int | None:
    """Index of the first layer none of whose weights feeds a node sequence with ``operator``; None when it cannot be told.

    Layers are known from weight names (``...layer.3...``); a node belongs to the layer of the last weight read before it.
    """
    layer, layers, fused = -1, set(), set()
    for node in model.graph:
        for value in node.inputs:
            match = re.search(r"\.(?:layers?|h|blocks?)\.(\d+)\.", (value.name or "") if value is not None else "")
            if match:
                layer = int(match.group(1))
                layers.add(layer)
        if layer >= 0 and operator in _operators(node):
            fused.add(layer)
    missing = sorted(layers - fused)
    return missing[0] if missing else None

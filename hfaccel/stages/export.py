"""Stage 1: checkpoint -> float graph, with recorded outputs of the source for every later parity check."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.artifact.contract import TensorSpec
from hfaccel.errors import ExportError, GateError, HfaccelError
from hfaccel.evaluate import parity
from hfaccel.evaluate.cached_decoding import POSITION_IDS, open_for_parity
from hfaccel.quant.layers import parameter_digests
from hfaccel.rewrites.graphs import GRAPH_NAME, save_graph
from hfaccel.runtime.session import first_line
from hfaccel.source.contract import build_contract
from hfaccel.source.text import check_tokenizer, write_tokenizer
from hfaccel.source.torch_model import TorchRunner, attention_of, load_torch_model
from hfaccel.stages.base import StageContext, StageName, StageResult
from hfaccel.stages.exporters import EXPORTERS, ExportJob, quiet_exporters

if TYPE_CHECKING:
    import torch

    from hfaccel.artifact.contract import Contract
    from hfaccel.recipe.schema import ExporterName, Recipe

NAME: StageName = "export"
REVISION = 13
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LIBRARIES = ("torch", "transformers", "mobius-onnx", "onnx", "onnx-ir", "onnxscript", "tokenizers")
PARITY_FILE = "parity.npz"
PARAMETERS_FILE = "parameters.json"
"""Digests of the checkpoint's matrices: graphs forget parameter names, later stages find them again by content."""


def settings(recipe: Recipe) -> Mapping[str, Any]:
    """What of the recipe changes the exported bytes."""
    return {"export": recipe.export.model_dump(), "parity": recipe.parity.model_dump(), "seed": recipe.seed}


def requires(artifact: Artifact | None, ctx: StageContext) -> list[str]:
    """The checkpoint was checked when it was resolved."""
    return []


def run(artifact: Artifact | None, ctx: StageContext) -> StageResult:
    """Export with the first exporter of the recipe whose graph agrees with the source.

    Raises:
        ExportError: no exporter produced a graph.
        GateError: graphs were produced, none agrees with the source.
    """
    ctx.progress.step(f"loading {ctx.source.id} into torch")
    module = load_torch_model(ctx.source, attention=ctx.recipe.export.attention_implementation)
    contract = build_contract(ctx.source, module)
    write_tokenizer(ctx.source, ctx.workdir)
    for notice in check_tokenizer(ctx.source, ctx.workdir):
        ctx.progress.warn(notice)
    cases = parity.record(TorchRunner(module), _parity_inputs(contract, ctx))
    parity.save_cases(cases, ctx.workdir / PARITY_FILE)
    digests = {}
    if contract.generation is None:  # constructed decoders keep the names of their parameters
        digests = parameter_digests((name, value.detach().numpy()) for name, value in module.named_parameters())
    (ctx.workdir / PARAMETERS_FILE).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    failures: list[HfaccelError] = []
    for name in ctx.recipe.export.exporters:
        ctx.progress.step(f"exporting with {name}")
        try:
            exported = _export(name, module, contract, ctx)
            result = _compare(name, exported, cases, ctx)
            check_parity(result, ctx, stage=f"export ({name})")
        except HfaccelError as error:
            ctx.progress.warn(str(error) if error.where.startswith(f"exporter {name}") else f"exporter {name}: {error}")
            failures.append(error)
            continue
        made = Artifact(ctx.workdir, GRAPH_NAME, "fp32", exported, record_files(ctx.workdir))
        metrics = {
            "exporter": name,
            "attention": attention_of(module),
            "parity": vars(result),
            "weight_bytes": ctx.source.weight_bytes,
        }
        return StageResult(made, True, metrics)
    raise failures[-1]


def _parity_inputs(contract: Contract, ctx: StageContext) -> Mapping[str, parity.Arrays]:
    shapes, size, seed = ctx.recipe.parity.shapes, ctx.source.vocabulary_size, ctx.recipe.seed
    if contract.generation is not None and contract.generation.encoder is not None:
        return parity.make_answer_inputs(shapes, contract, vocabulary_size=size, seed=seed)
    return parity.make_inputs(shapes, contract.text, vocabulary_size=size, seed=seed)


def _compare(
    name: ExporterName, exported: Contract, cases: Sequence[parity.ParityCase], ctx: StageContext
) -> parity.ParityResult:
    """What the written graph answers, beside what the source does."""
    try:
        return parity.compare(open_for_parity(ctx.workdir / GRAPH_NAME, exported), cases)
    except HfaccelError:
        raise
    except Exception as error:  # limits of an operator show when it runs: GroupQueryAttention rotates multiples of 16 channels
        raise ExportError(
            f"onnxruntime does not run the graph: {first_line(error)}",
            where=f"exporter {name}, model_type {ctx.source.model_type}",
            hint="see the whole story with --debug; decoders have another exporter: --set export.exporters='[traced]'",
        ) from error


def check_parity(result: parity.ParityResult, ctx: StageContext, *, stage: str) -> None:
    """Raise GateError when a parity result is outside the recipe's tolerance."""
    allowed = ctx.recipe.parity
    if result.max_abs <= allowed.max_abs and result.min_cosine >= allowed.min_cosine:
        return
    raise GateError(
        f"the graph does not answer as the source does: largest difference {result.max_abs:.3g} (allowed {allowed.max_abs:g}), "
        f"smallest cosine {result.min_cosine:.6f} (allowed {allowed.min_cosine:g}), worst at {result.worst_case}",
        where=f"parity after {stage}",
        hint="try another exporter with --set export.exporters='[torch]', or leave out a rewrite with --set optimize.rewrites='[]'",
    )


def _export(name: ExporterName, module: torch.nn.Module, contract: Contract, ctx: StageContext) -> Contract:
    """Write the graph; the contract with the inputs that it really reads."""
    try:
        with quiet_exporters():
            model = EXPORTERS[name](ExportJob(ctx.source, module, contract, ctx.recipe.export.opset))
    except HfaccelError:
        raise
    except Exception as error:  # an exporter can fail in any way; all of them mean: not with this exporter
        cause = error.__cause__ or error  # torch's own exporter wraps what happened in advice to torch's developers
        lines = _COLOUR.sub("", str(cause)).strip().splitlines()
        raise ExportError(
            f"{type(cause).__name__}: {lines[0] if lines else ''}",
            where=f"exporter {name}, model_type {ctx.source.model_type}",
            hint="see the whole story with --debug"
            + ("" if name == "torch" else "; another exporter: --set export.exporters='[torch]'"),
        ) from error
    for value, spec in zip(model.graph.outputs, contract.outputs, strict=True):
        value.name = spec.name
    save_graph(model, ctx.workdir)
    if any(value.name == POSITION_IDS for value in model.graph.inputs):  # of learned positions only
        return replace(contract, inputs=(*contract.inputs, TensorSpec(POSITION_IDS, "int64", ("batch", "sequence"))))
    return contract

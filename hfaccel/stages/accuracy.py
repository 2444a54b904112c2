"""Stage 5: judge every candidate against the source model, and take the best one that holds every gate."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.errors import GateError
from hfaccel.evaluate.cached_decoding import open_with_all_logits
from hfaccel.evaluate.sample import multilingual_sample
from hfaccel.quant.quantize_cache import with_cache_of
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.tokenizer import TextTokenizer
from hfaccel.source.torch_model import TorchRunner, load_torch_model
from hfaccel.stages.base import StageContext, StageName, StageResult
from hfaccel.stages.candidates import FLOAT_PARENT, Candidate, load_candidates, save_candidates
from hfaccel.stages.choice import choose, merit, outdone, rank
from hfaccel.stages.eight_bits import search_eight_bits
from hfaccel.stages.examine import Examiner, Finding
from hfaccel.stages.examine_answers import AnswersExaminer
from hfaccel.stages.examine_language import LanguageExaminer
from hfaccel.stages.fallback import search_fallbacks
from hfaccel.stages.finals import race_finalists
from hfaccel.stages.float_cache import with_float_cache
from hfaccel.stages.greedy_paths import with_greedy_paths
from hfaccel.stages.guess_price import with_guess_price
from hfaccel.stages.many_rows import with_prompt_graph_rows
from hfaccel.stages.parents import FALLBACK_FOLDER, graph_path
from hfaccel.stages.precision_map import precision_map
from hfaccel.stages.shipping import open_shipped, write_golden, write_graph, written_by
from hfaccel.stages.threads import with_tuned_threads

if TYPE_CHECKING:
    from hfaccel.evaluate.dataset import Dataset
    from hfaccel.recipe.schema import Recipe
    from hfaccel.runtime.session import Runner

NAME: StageName = "accuracy"
REVISION = 28
LIBRARIES = (
    "torch",
    "transformers",
    "onnxruntime",
    "openvino",
    "tokenizers",
    "numpy",
    "scipy",
    "scikit-learn",
    "seqeval",
    "jiwer",
    "sacrebleu",
    "rouge-score",
)
LIMIT_REASONS = ("size-over-limit", "p95-over-limit")


def settings(recipe: Recipe) -> Mapping[str, Any]:
    """What of the recipe changes the verdicts."""
    return {
        "accuracy": recipe.accuracy.model_dump(),
        "measure": recipe.measure.model_dump(),
        "precision": recipe.quantize.precision,
        "search": [recipe.quantize.fallback, recipe.quantize.search_seconds],
        "attention": recipe.export.attention,
        "seed": recipe.seed,
    }


def requires(artifact: Artifact | None, ctx: StageContext) -> list[str]:
    """A graph to judge."""
    return [] if artifact is not None else ["accuracy needs a graph"]


def run(artifact: Artifact | None, ctx: StageContext) -> StageResult:
    """Judge the candidates, search for others where they miss the gate, and write the graph that ships with its golden answers.

    Raises:
        GateError: not even the float graph holds the gates, or a precision was demanded and no candidate has it.
    """
    assert artifact is not None  # the pipeline checked requires()
    dataset = ctx.dataset or multilingual_sample(artifact.contract.task)
    if ctx.dataset is None:
        ctx.progress.warn(
            "no --data given: accuracy is agreement with the source on the packaged multilingual sample, not task accuracy"
        )
    tokenizer = TextTokenizer(ctx.artifacts["export"].folder, artifact.contract.text)
    ctx.progress.step(f"running the source over {len(dataset.examples)} examples")
    source = TorchRunner(load_torch_model(ctx.source, attention=ctx.recipe.export.attention_implementation))
    candidates = load_candidates(artifact.folder)
    examiner = _examiner(source, dataset, tokenizer, artifact, candidates, ctx)
    del source
    judged = _judge_all(candidates, artifact, examiner, ctx)
    if isinstance(examiner, Examiner):
        judged += search_fallbacks(judged, artifact, examiner, ctx)
    elif isinstance(examiner, LanguageExaminer):
        judged += with_float_cache(judged, artifact, examiner, ctx)
        judged += search_eight_bits(judged, artifact, examiner, ctx)
    prompts = examiner.path_prompts() if isinstance(examiner, LanguageExaminer) else []
    del examiner
    gc.collect()  # before several sessions are open at once
    judged = race_finalists(judged, artifact, ctx)
    chosen = _shippable(choose(judged, ctx.recipe.measure.objective), judged, ctx)
    path = graph_path(chosen, artifact, ctx)
    chosen, threads = with_tuned_threads(chosen, path, ctx)
    chosen = replace(chosen, matmuls=precision_map(chosen, path, ctx))
    graph = write_graph(path, artifact.contract, ctx)
    contract = with_cache_of(artifact.contract, ctx.workdir / graph)
    model = open_shipped(chosen.session, contract, tokenizer, ctx)
    write_golden(model, contract, ctx)
    if isinstance(model, GenerationModel):
        chosen = with_greedy_paths(chosen, model, judged, prompts, artifact, ctx)
        contract = with_guess_price(contract, model.decoder, ctx)
        contract = with_prompt_graph_rows(contract, model.decoder, chosen, ctx)
    shutil.rmtree(ctx.workdir / FALLBACK_FOLDER, ignore_errors=True)
    save_candidates(rank(judged, chosen, ctx.recipe.measure.objective), ctx.workdir)
    made = Artifact(ctx.workdir, graph, chosen.precision, contract, record_files(ctx.workdir))
    labelled = dataset.labelled or artifact.contract.task == "text-generation"  # a text's next token is its label
    metrics = {
        "chosen": chosen.name,
        "verdict": chosen.verdict,
        "data": {"name": dataset.name, "sha256": dataset.sha256, "examples": len(dataset.examples), "labelled": labelled},
        "label_free_sample": ctx.dataset is None,
        "threads": threads,
    }
    return StageResult(made, chosen.name != FLOAT_PARENT, metrics)


def _examiner(
    source: Runner,
    dataset: Dataset,
    tokenizer: TextTokenizer,
    artifact: Artifact,
    candidates: Sequence[Candidate],
    ctx: StageContext,
) -> Examiner | LanguageExaminer | AnswersExaminer:
    contract, folder = artifact.contract, ctx.artifacts["export"].folder
    if contract.generation is None:
        return Examiner(source, dataset, tokenizer, contract, ctx)
    # Parity has proved the float graph to be the source, and it answers several times as fast.
    floating = next(candidate for candidate in candidates if candidate.name == FLOAT_PARENT)
    graph = artifact.folder / floating.graph
    if contract.generation.encoder is None:
        answers = written_by(graph, floating.session, contract, ctx) if dataset.labelled else None
        return LanguageExaminer(source, dataset, folder, contract.generation, ctx, source_answers=answers)
    answers = written_by(graph, floating.session, contract, ctx)
    return AnswersExaminer(source, dataset, folder, contract, ctx, source_answers=answers)


def _judge_all(
    candidates: Sequence[Candidate],
    artifact: Artifact,
    examiner: Examiner | LanguageExaminer | AnswersExaminer,
    ctx: StageContext,
) -> list[Candidate]:
    """The candidates, judged. Of those that generate text the fastest comes first, and who cannot win any more is not judged."""
    objective, judged = ctx.recipe.measure.objective, dict[str, Candidate]()
    order, generates = list(candidates), not isinstance(examiner, Examiner)
    if generates:
        order.sort(key=lambda item: (item.name != FLOAT_PARENT, -merit(item, objective)))
    for number, candidate in enumerate(order):
        ctx.progress.advance(number, len(order))
        if candidate.reason is not None:
            continue
        better = outdone(candidate, list(judged.values()), objective) if generates else None
        if better is None:
            judged[candidate.name] = _judge(candidate, artifact, examiner, ctx)
        else:
            judged[candidate.name] = replace(candidate, reason="slower-than-accepted", detail=better)
    return [judged.get(candidate.name, candidate) for candidate in candidates]


def _judge(
    candidate: Candidate, artifact: Artifact, examiner: Examiner | LanguageExaminer | AnswersExaminer, ctx: StageContext
) -> Candidate:
    ctx.progress.step(f"judging: {candidate.name}")
    finding = _examined(candidate, artifact, examiner, ctx)
    judged = replace(candidate, verdict=finding.to_json())
    if candidate.name == FLOAT_PARENT and finding.reason != "not-finite":
        return judged  # parity proved it stage by stage; on a handful of examples no bound could
    return replace(judged, reason=finding.reason, detail=finding.detail)


def _examined(
    candidate: Candidate, artifact: Artifact, examiner: Examiner | LanguageExaminer | AnswersExaminer, ctx: StageContext
) -> Finding:
    graph = artifact.folder / candidate.graph
    brief = candidate.name == FLOAT_PARENT
    if isinstance(examiner, LanguageExaminer):
        return examiner.examine_candidate(candidate, graph, artifact.contract, ctx, brief=brief)
    runner = open_with_all_logits(graph, artifact.contract, candidate.session)
    if isinstance(examiner, Examiner):
        return examiner.examine(runner, brief=brief)
    return examiner.examine(runner, answers=written_by(graph, candidate.session, artifact.contract, ctx))


def _shippable(chosen: Candidate | None, judged: Sequence[Candidate], ctx: StageContext) -> Candidate:
    demanded = ctx.recipe.quantize.precision
    if chosen is None:
        raise _nothing_ships(judged)
    if demanded not in ("auto", "fp32") and chosen.precision != demanded:
        reasons = "; ".join(f"{item.name}: {item.reason} ({item.detail})" for item in judged if item.precision == demanded)
        raise GateError(
            f"--precision {demanded} was demanded and no {demanded} candidate holds the gates. {reasons}",
            where="accuracy",
            hint="leave --precision auto to ship the float graph, or raise --max-loss",
        )
    return chosen


def _nothing_ships(judged: Sequence[Candidate]) -> GateError:
    over = [candidate for candidate in judged if candidate.reason in LIMIT_REASONS]
    if over:
        reasons = "; ".join(f"{item.name}: {item.reason} ({item.detail})" for item in judged if item.graph or item in over)
        return GateError(
            f"no candidate keeps the limits and holds all gates. {reasons}",
            where="accuracy",
            hint="raise --p95 or --max-size, let more compete (--engine, --budget 10m), or allow more loss with --max-loss",
        )
    floating = next((candidate for candidate in judged if candidate.name == FLOAT_PARENT), None)
    detail = floating.detail if floating is not None else "there is no float graph"
    return GateError(
        f"no graph holds the accuracy gate, not even the float one: {detail}",
        where="accuracy",
        hint="more examples in --data make the bound tighter; or raise the budget with --max-loss",
    )

"""What the reports say, read out of a manifest; where the manifest has no number there is None, never a guess."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hfaccel.artifact.contract import Contract
from hfaccel.report.wording import FLOAT_BITS, reason_words

Manifest = Mapping[str, Any]
Candidate = Mapping[str, Any]
Timing = Mapping[str, Any]
State = Literal["shipped", "held", "refused", "not-built"]

FLOAT = "float"
_NEVER_BUILT = (
    "needs-calibration-data",
    "build-failed",
    "engine-not-installed",
    "engine-not-wanted",
    "not-supported-by-target",
    "not-supported-by-model",
    "budget-too-small",
    "not-for-objective",
)


def chosen(manifest: Manifest) -> Candidate:
    """The candidate that ships."""
    found: Candidate = next(item for item in manifest["candidates"] if item["name"] == manifest["chosen"])
    return found


def is_float(candidate: Candidate) -> bool:
    """Whether this is the float graph that the others are compared with."""
    return bool(candidate["name"] == FLOAT)


def state(candidate: Candidate) -> State:
    """What became of a candidate."""
    if candidate["detail"] == "chosen":
        return "shipped"
    if candidate["reason"] in _NEVER_BUILT:
        return "not-built"
    return "held" if candidate["reason"] in (None, "not-better-than-chosen") else "refused"


def outcome(candidate: Candidate) -> str:
    """What became of it, in words; that a bound is wide for want of examples is no fault of the candidate."""
    if state(candidate) == "shipped":
        return "ships"
    if candidate["reason"] and (candidate["verdict"] or {}).get("too_few_examples"):
        return "refused: too few examples to prove it"
    return reason_words(candidate["reason"]) or "holds all gates"


def points(manifest: Manifest) -> list[str]:
    """The workload's points that anything was timed at, in order."""
    return list(dict.fromkeys(timing["point"] for item in manifest["candidates"] for timing in item["timings"]))


def headline_timing(candidate: Candidate) -> Timing | None:
    """The timing to quote: of the points that were stable (of all, if none was) the one with the most tokens."""
    timings: Sequence[Timing] = [] if is_float(candidate) else candidate["timings"]
    stable = [timing for timing in timings if timing["stable"]]
    return max(stable or timings, key=lambda timing: _tokens(timing["point"]), default=None)


def _tokens(point: str) -> int:
    batch, _, length = point.partition("x")
    return int(batch) * int(length) if batch.isdigit() and length.isdigit() else 0


def speedup(candidate: Candidate) -> float | None:
    """Over the whole workload against the float graph; None where it was not timed."""
    if is_float(candidate):
        return 1.0
    return float(candidate["speedup"]) if candidate["timings"] else None


def is_quick(candidate: Candidate) -> bool:
    """Whether its timings are of a quick race only: it was out before the final one."""
    return bool(candidate["timings"]) and not is_float(candidate) and not candidate.get("finalist", True)


def in_pareto_set(candidate: Candidate) -> bool:
    """Whether no other candidate that holds all gates is as good in every respect and better in one."""
    return bool(candidate.get("pareto"))


def worst_loss(verdict: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The loss with the highest bound; None without labels."""
    losses: Sequence[Mapping[str, Any]] = verdict["losses"] if verdict else ()
    return max(losses, key=lambda loss: loss["upper_bound"], default=None)


def stage_record(manifest: Manifest, name: str) -> Mapping[str, Any]:
    """What a stage recorded; an empty record where it did not run."""
    return next((item for item in manifest["stages"] if item["stage"] == name), {})


def stage_metrics(manifest: Manifest, name: str) -> Mapping[str, Any]:
    """The numbers that a stage recorded."""
    metrics: Mapping[str, Any] = stage_record(manifest, name).get("metrics") or {}
    return metrics


def data_of(manifest: Manifest) -> tuple[str, int, bool]:
    """Name of the evaluation data, how many examples, and whether their labels were used."""
    data = stage_metrics(manifest, "accuracy").get("data") or {}
    verdict = chosen(manifest)["verdict"] or {}
    name = "the packaged multilingual sample" if is_label_free(manifest) else str(data.get("name", "unknown data"))
    return name, int(data.get("examples") or 0), bool(data.get("labelled")) and bool(verdict.get("losses"))


def is_label_free(manifest: Manifest) -> bool:
    """Whether the user gave no data, so that the packaged texts were used."""
    return bool(stage_metrics(manifest, "accuracy").get("label_free_sample"))


def greedy_of(candidate: Candidate) -> Mapping[str, Any] | None:
    """How it continues prompts beside the source; of decoders that were quantized, what ships only."""
    found: Mapping[str, Any] | None = (candidate["verdict"] or {}).get("greedy")
    return found


def engine_of(manifest: Manifest) -> str:
    """What runs the graph, or the graphs; older manifests say nothing of encoders."""
    engine, encoder = manifest.get("engine", "onnxruntime"), manifest.get("session", {}).get("encoder_engine", "onnxruntime")
    return str(engine) if encoder == "onnxruntime" else f"{engine}, its encoder by {encoder}"


def cache_of(manifest: Manifest) -> tuple[int, int] | None:
    """Bits of a key or value in the cache, and the bytes that a token takes there; None of models without one."""
    contract = Contract.from_json(manifest["contract"])
    return None if contract.cache_bits is None else (contract.cache_bits, contract.cache_bytes)


def many_rows_of(manifest: Manifest) -> str | None:
    """What steps of several rows run on, in words; None of models without a graph for prompts."""
    lost, generation = (chosen(manifest)["verdict"] or {}).get("many_rows"), manifest["contract"].get("generation") or {}
    if lost is None:
        return None
    told, rows = f"loss {lost['loss']:+.2%}, bound {lost['upper_bound']:+.2%}", generation.get("prompt_graph_rows")
    if rows is not None:
        return f"from {rows} rows on the graph for prompts, which is faster then ({told})"
    budget = manifest["recipe"]["accuracy"]["max_loss"]
    why = f"loses more than {budget:.2%} there" if lost["upper_bound"] > budget else "was not found faster"
    return f"the same graph as of one row; the one for prompts {why} ({told})"


def threads_of(manifest: Manifest) -> str | None:
    """With how many threads it runs and why, in words; None where nothing was timed."""
    if (wanted := manifest["recipe"]["measure"].get("threads")) is not None:
        return f"{wanted}, as asked for"
    found = stage_metrics(manifest, "accuracy").get("threads") or {}
    trials = [f"{item['count']} instead of {item['against']}: {item['speedup']:.2f}x as fast" for item in found.get("trials", ())]
    return f"{found['count']} on {found['cores']} cores ({', '.join(trials)})" if trials else None


@dataclass(frozen=True)
class Measure:
    """A measure that a gate limits, as an amount of harm: 0 is as good as the source.

    Attributes:
        key: which one.
        title: as an axis names it.
        limit: the most that passes, compared with the 95 % bound.
        as_percent: whether amounts are written in per cent.
    """

    key: Literal["loss", "cosine", "agreement"]
    title: str
    limit: float
    as_percent: bool

    def harm(self, candidate: Candidate) -> tuple[float, float] | None:
        """The measured amount and its 95 % bound; None where it was not measured."""
        verdict = candidate["verdict"]
        if not verdict:
            return None
        if self.key == "loss":
            loss = worst_loss(verdict)
            return (loss["loss"], loss["upper_bound"]) if loss else None
        mean, bound = verdict.get(f"{self.key}_mean"), verdict.get(f"{self.key}_lower_bound")
        return None if mean is None or bound is None else (1 - mean, 1 - bound)


def measures(manifest: Manifest) -> Iterator[Measure]:
    """The measures that decided: the loss, cosine for vectors; without labels how often answers (or their order) differ."""
    limits = manifest["recipe"]["accuracy"]
    verdicts = [item["verdict"] for item in manifest["candidates"] if item["verdict"]]
    losses = [loss for verdict in verdicts for loss in verdict["losses"]]
    labelled = any(loss.get("labelled", True) for loss in losses)
    if losses:
        metric = "task's metric" if labelled else "accuracy that the source's own probabilities let expect"
        yield Measure("loss", f"Loss of the {metric}", limits["max_loss"], True)
    if verdicts and all(verdict.get("agreement_mean") is None for verdict in verdicts):
        yield Measure("cosine", "Distance of the vectors (1 - cosine)", 1 - limits["min_cosine"], False)
    elif verdicts and not labelled:
        least = limits["min_agreement"] if losses else limits["min_same_order"]
        yield Measure("agreement", "Answers other than the source's", 1 - least, True)


@dataclass(frozen=True)
class Step:
    """One step on the way from the checkpoint to the artifact.

    Attributes:
        name: of the step.
        what: what it did.
        times_ms: by workload point; empty where nothing was timed.
        timings: against the float graph in the same interleaved run, where that is how it was timed.
        size_bytes: of graph and weights after it.
        harm: how far it is from the source, in words; None if it was not measured.
    """

    name: str
    what: str
    times_ms: Mapping[str, float]
    timings: Sequence[Timing]
    size_bytes: int | None
    harm: str | None


def waterfall(manifest: Manifest) -> Iterator[Step]:
    """The steps from the source to what ships."""
    source, winner = manifest["source"], chosen(manifest)
    yield Step("source", f"the checkpoint ({source['model_type']}), in torch", {}, (), source["weight_bytes"], "the reference")
    float_ms = stage_metrics(manifest, "quantize").get("float_ms") or {}
    parent = stage_metrics(manifest, "quantize").get("float_parent")
    for name, key, what in (
        ("export", "", "as an ONNX graph"),
        ("optimize", "optimized", "cleaned up, exact rewrites"),
        ("fuse", "fused", "operators fused"),
    ):
        record = stage_record(manifest, name)
        if not record or record["status"] == "skipped":
            yield Step(name, "switched off", {}, (), None, None)
            continue
        if float_ms.get(parent) and key in float_ms and len(float_ms) > 1:
            what += (
                "; the faster float graph, what follows is compared with it" if key == parent else "; not the faster float graph"
            )
        parity = record["metrics"].get("parity") or {}
        harm = (
            f"1 - cosine {max(0.0, 1 - parity['min_cosine']):.1g}, largest difference {parity['max_abs']:.1g}" if parity else None
        )
        yield Step(name, what, float_ms.get(key, {}), (), record.get("size_bytes"), harm)
    if not is_float(winner):
        times = {timing["point"]: timing["candidate_ms"] for timing in winner["timings"]}
        what = (
            f"{winner['name']}: {winner['quantized']} MatMuls in {winner['precision']}"
            if winner["quantized"]
            else f"{winner['name']}: {winner['precision']}"
        )
        if winner["kept_float"]:
            what += f", {len(winner['kept_float'])} kept in float"
        if winner.get("blockwise"):
            what += f", {len(winner['blockwise'])} of the {winner['precision']} ones in blocks"
        if winner.get("channelwise"):
            what += f", {len(winner['channelwise'])} of the {winner['precision']} ones with outlier channels in float"
        in_eight_bits = sum(item["precision"] == "int8" for item in winner.get("matmuls", ()))
        if in_eight_bits and winner["precision"] == "int4":
            what += f", {in_eight_bits} of them in int8"
        cache = cache_of(manifest)
        if cache is not None and cache[0] < FLOAT_BITS:
            what += f", keys and values of the cache in {cache[0]} bits"
        yield Step("quantize", what, times, winner["timings"], winner["size_bytes"], _harm(winner))


def _harm(candidate: Candidate) -> str | None:
    verdict = candidate["verdict"]
    loss = worst_loss(verdict)
    if loss:
        return f"{loss['metric']} loss {loss['loss']:+z.2%}, at most {loss['upper_bound']:+z.2%}"
    if verdict and verdict.get("agreement_mean") is not None:
        return f"same answer in {verdict['agreement_mean']:.2%}, at least {verdict['agreement_lower_bound']:.2%}"
    if verdict:
        return f"cosine {verdict['cosine_mean']:.4f}, at least {verdict['cosine_lower_bound']:.4f}"
    return None

"""The parts of ``report.html`` that a doubtful reader looks at: accuracy, timings, stages, environment, recipe, how to check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hfaccel.report.bars import Scale, bar, interval
from hfaccel.report.facts import (
    Manifest,
    Measure,
    chosen,
    greedy_of,
    is_float,
    is_label_free,
    many_rows_of,
    measures,
    points,
    stage_metrics,
    state,
    threads_of,
)
from hfaccel.report.markup import Markup, element, join, nowrap, paragraph, table
from hfaccel.report.scatter import amount
from hfaccel.report.wording import greedy_words, milliseconds, percent, point_words, significant

TITLES = {
    "loss": "Loss against the source",
    "cosine": "Distance of the vectors from the source's",
    "agreement": "Answers other than the source's",
}


def data_words(manifest: Manifest) -> str:
    """What accuracy was measured on."""
    data = stage_metrics(manifest, "accuracy").get("data")
    if not data:
        return "Accuracy was not measured."
    if is_label_free(manifest):
        return (
            f"No data was given: {data['examples']} texts of the packaged multilingual sample, without labels. This is agreement with "
            "the source model, not task accuracy."
        )
    kind = "labelled" if data["labelled"] else "unlabelled (agreement with the source)"
    if manifest["source"]["task"] == "text-generation" and not any(map(answers_of, manifest["candidates"])):
        kind = "text, of which the first are read,"
    return f"{data['examples']} {kind} examples of {data['name']} (sha256 {data['sha256'][:12]})."


def accuracy(manifest: Manifest) -> Markup:
    """Each gated measure as intervals against its limit, slices of what ships, and the measures that no gate limits."""
    parts: list[str] = [paragraph(data_words(manifest))]
    for measure in measures(manifest):
        parts += [element("h3", {}, TITLES[measure.key]), _intervals(manifest, measure)]
    slices = (chosen(manifest)["verdict"] or {}).get("slices") or []
    if slices:
        parts += [element("h3", {}, "Slices of what ships"), _slices(slices, manifest["recipe"]["accuracy"]["max_loss"])]
    if any(answers_of(item) is not None for item in manifest["candidates"]):
        parts += [element("h3", {}, "Its own answers"), _own_answers(manifest)]
    greedy = greedy_of(chosen(manifest))
    if greedy is not None:
        parts += [element("h3", {}, "How far it writes what the source writes"), paragraph(greedy_words(greedy))]
    parts.append(_beside(manifest))
    return join(parts)


def answers_of(candidate: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How good a candidate's own answers are beside the source's, where the data has references to hold them against."""
    found: Mapping[str, Any] | None = (candidate["verdict"] or {}).get("answers")
    return found


def _own_answers(manifest: Manifest) -> Markup:
    rows = []
    for item in manifest["candidates"]:
        answers = answers_of(item)
        if answers is not None:
            told = f"{percent(answers['loss'], signed=True)} (at most {percent(answers['upper_bound'], signed=True)})"
            values = [f"{answers['source']:.4f}", f"{answers['candidate']:.4f}"]
            rows.append([item["name"], answers["metric"], *values, told, str(answers["examples"])])
    header = ["candidate", "metric", "source", "candidate's", "loss, and its 95 % bound", "examples"]
    caption = (
        "Written token by token, each by its own model, and held against the references. Few answers prove little: this refuses what is "
        "proven to lose more than the budget, while the loss above, of each next token of the references, decides."
    )
    return table(header, rows, caption=caption)


def _intervals(manifest: Manifest, measure: Measure) -> Markup:
    rows, kinds = [], []
    scale = _scale(measure)
    for item in manifest["candidates"]:
        harm = measure.harm(item)
        if harm is None:
            continue
        kind = state(item)
        measured, bound = harm
        told = nowrap(f"{_exact(measured, measure)}, at most {_exact(bound, measure)}")
        drawn = interval(measured, (measured, bound), scale, kind=kind)
        rows.append([item["name"], join([told, drawn]), *_metric_cells(item, measure)])
        kinds.append("shipped" if kind == "shipped" else None)
    header = ["candidate", "measured, and its 95 % bound"]
    header += ["metric", "source", "candidate", "examples"] if measure.key == "loss" else ["examples"]
    caption = f"The bound (end of the line) must not pass the limit, {amount(measure.limit, measure)} (dashed). Negative is better than the source."
    return table(header, rows, caption=caption if measure.key == "loss" else caption.split(" Negative")[0], row_classes=kinds)


def _exact(value: float, measure: Measure) -> str:
    return percent(value, signed=measure.key == "loss") if measure.as_percent else amount(value, measure)


def _metric_cells(item: Mapping[str, Any], measure: Measure) -> list[str]:
    verdict = item["verdict"]
    if measure.key != "loss":
        return [str(verdict["examples"])]
    loss = max(verdict["losses"], key=lambda loss: loss["upper_bound"])
    return [loss["metric"], f"{loss['source']:.4f}", f"{loss['candidate']:.4f}", str(loss["examples"])]


def _scale(measure: Measure) -> Scale:
    """Up to twice the limit; below 0 only a loss can lie."""
    return Scale(-measure.limit if measure.key == "loss" else 0.0, 2 * measure.limit, measure.limit)


def _slices(slices: Sequence[Mapping[str, Any]], budget: float) -> Markup:
    limits = [item.get("limit", budget) for item in slices]
    most = max(limits)
    low = min(-most, *(item["lower_bound"] for item in slices), *(item["loss"] for item in slices))
    high = max(2 * most, *(item["upper_bound"] for item in slices))
    rows = [
        _slice_row(item, Scale(max(low, -3 * most), min(high, 6 * most), limit))
        for item, limit in zip(slices, limits, strict=True)
    ]
    header = ["slice", "loss, and its bounds", "examples", "limit", "source", "candidate"]
    caption = "The loss on parts of the data. A part refuses a candidate only if even its lower bound passes the limit (dashed)."
    return table(header, rows, caption=caption)


def _slice_row(item: Mapping[str, Any], scale: Scale) -> list[str]:
    bounds = (item["lower_bound"], item["upper_bound"])
    told = f"{percent(item['loss'], signed=True)} ({percent(bounds[0], signed=True)} to {percent(bounds[1], signed=True)})"
    drawn = interval(item["loss"], bounds, scale, kind="refused" if bounds[0] > scale.limit else "shipped")
    values = [percent(scale.limit), f"{item['source']:.4f}", f"{item['candidate']:.4f}"]
    return [str(item["name"]), join([nowrap(told), drawn]), str(item["examples"]), *values]


def _beside(manifest: Manifest) -> Markup:
    rows = []
    for item in manifest["candidates"]:
        verdict = item["verdict"]
        if not verdict:
            continue
        cosine = f"{verdict['cosine_mean']:.6f} (at least {verdict['cosine_lower_bound']:.6f})"
        same = verdict.get("agreement_mean")
        agreement = "" if same is None else f"{percent(same)} (at least {percent(verdict['agreement_lower_bound'])})"
        divergence, batch = verdict.get("kl_mean"), verdict.get("batch_cosine")
        rows.append(
            [
                item["name"],
                cosine,
                agreement or "does not apply",
                "does not apply" if divergence is None else f"{divergence:.2g} nats",
                "" if batch is None else f"{batch:.4f}",
            ]
        )
    header = ["candidate", "mean cosine of raw outputs", "same answer", "KL divergence", "alone and in a batch, cosine"]
    rows_and_limit = f"Outputs against the source's. A text alone and in a batch must agree to {manifest['recipe']['accuracy']['batch_invariance']}."
    inner = table(header, rows, caption=rows_and_limit)
    return element("details", {}, element("summary", {}, "Cosine, agreement and batch invariance of every candidate"), inner)


def timings(manifest: Manifest) -> Markup:
    """One table of bars per workload point, each bar with the float graph of the same run."""
    at = points(manifest)
    if not at:
        return paragraph("Nothing was timed.", kind="soft")
    explained = (
        "Medians. The upright line on a bar is the float graph, timed in turns with that candidate; bounds are of the speed-up, 95 %. A "
        "speed-up that changed while it was measured is marked and drawn pale: no result."
    )
    return join([paragraph(explained), element("div", {"class": "points"}, *(_point(manifest, point) for point in at))])


def _point(manifest: Manifest, point: str) -> Markup:
    timed = [(item, timing) for item in manifest["candidates"] for timing in item["timings"] if timing["point"] == point]
    longest = max(max(timing["candidate_ms"], timing["parent_ms"]) for _, timing in timed)
    rows, kinds = [], []
    for item, timing in timed:
        shipped, floating = state(item) == "shipped", is_float(item)
        kind = "bar shipped" if shipped else "bar float" if floating else "bar"
        kind += "" if timing["stable"] else " shaky"
        reference = None if floating else timing["parent_ms"] / longest
        drawn = bar(timing["candidate_ms"] / longest, kind=kind, reference=reference)
        gain = Markup("") if floating else _gain(timing)
        rows.append([item["name"], join([nowrap(milliseconds(timing["candidate_ms"])), drawn]), gain])
        kinds.append("shipped" if shipped else None)
    return table(["candidate", "median", "speed-up"], rows, caption=f"{point}: {point_words(point)}", row_classes=kinds)


def _gain(timing: Mapping[str, Any]) -> Markup:
    kind, words = ("steady", "✓ stable") if timing["stable"] else ("shaky", "~ not stable")
    bounds = f"{timing['speedup_lower_bound']:.2f} to {timing['speedup_upper_bound']:.2f}"
    mark = element("span", {"class": kind}, words)
    return join([nowrap(f"{timing['speedup']:.2f}x"), " ", nowrap(f"({bounds})"), element("span", {"class": "line"}, mark)])


def stages(manifest: Manifest) -> Markup:
    """What compiling took, stage by stage."""
    records = manifest["stages"]
    slowest = max((item["seconds"] for item in records), default=0) or 1
    hungriest = max((item.get("peak_memory_bytes") or 0 for item in records), default=0) or 1
    rows = []
    for item in records:
        memory = item.get("peak_memory_bytes")
        peak = join([f"{significant(memory / 1e6)} MB", bar(memory / hungriest)]) if memory else "not measured"
        took = join([f"{item['seconds']:.1f} s", bar(item["seconds"] / slowest)])
        rows.append([item["stage"], item["status"], took, peak])
    caption = f"Compiling took {manifest['seconds']:.0f} s in all; cached stages show what they took when they ran. 1 MB is a million bytes."
    return table(["stage", "status", "time", "peak memory"], rows, caption=caption)


def environment(manifest: Manifest) -> Markup:
    """Where it was compiled, and with which versions."""
    host = [[str(key).replace("_", " "), str(value)] for key, value in manifest["host"].items()]
    target = manifest["target"]
    host.append(["target", f"{target['name']}{'' if target['speed_measured_on_it'] else ' (speed not measured on it)'}"])
    versions = [[name, str(version)] for name, version in manifest["versions"].items() if version]
    pair = [table(["what", "which"], host, caption="Host"), table(["library", "version"], versions, caption="Versions")]
    return element("div", {"class": "points"}, *pair)


def recipe(manifest: Manifest) -> Markup:
    """Every setting and where it was set, folded away."""
    origins = manifest["recipe_origins"]
    rows = [[path, shown, _origin(path, origins)] for path, shown in _flat(manifest["recipe"], "")]
    listed = table(["setting", "value", "set in"], rows, caption="The recipe as resolved; default: nobody set it.")
    return element("details", {}, element("summary", {}, f"{len(rows)} settings of the recipe, and where each was set"), listed)


def _origin(path: str, origins: Mapping[str, str]) -> str:
    while path and path not in origins:
        path = path.rpartition(".")[0]
        if path and isinstance(origins.get(path), str) and path.rpartition(".")[2].isdigit():
            return "default"
    return str(origins.get(path, "default"))


def _flat(value: object, path: str) -> Iterator[tuple[str, str]]:
    """Dotted paths with values; lists of plain values stay on one line."""
    items: Iterator[tuple[str, object]] | None = None
    if isinstance(value, Mapping) and value:
        items = ((str(key), item) for key, item in value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = ((str(index), item) for index, item in enumerate(value))
    if items is None:
        yield path, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return
    for key, item in items:
        yield from _flat(item, f"{path}.{key}" if path else key)


def check_and_run(manifest: Manifest) -> Markup:
    """How to check the folder and run the model."""
    text = manifest["contract"]["text"]
    session = ", ".join(f"{key} = {value}" for key, value in manifest["session"].items())
    code = 'import hfaccel\nmodel = hfaccel.load("FOLDER")\nprint(model(["a text"]))'
    shell = "hfaccel verify FOLDER     # no file changed, and it answers as it did when it was made\nhfaccel bench FOLDER      # measure speed on your own machine"
    shell += '\nhfaccel run FOLDER "a text"'
    inputs, outputs = (
        ", ".join(f"{spec['name']} {spec['dtype']} [{', '.join(map(str, spec['shape']))}]" for spec in manifest["contract"][kind])
        for kind in ("inputs", "outputs")
    )
    rows = [
        ["graph", manifest["graph"]],
        ["inputs", inputs],
        ["outputs", outputs],
        ["longest text", f"{text['max_length']} tokens"],
    ]
    many_rows = many_rows_of(manifest)
    rows += [["steps of several rows", many_rows]] if many_rows is not None else []
    threads = threads_of(manifest)
    rows += [["threads", threads]] if threads is not None else []
    rows.append(["session", session])
    return join(
        [
            element("pre", {}, shell),
            element("pre", {}, code),
            table(["", ""], rows, caption="Without hfaccel: any ONNX Runtime and tokenizer.json."),
        ]
    )

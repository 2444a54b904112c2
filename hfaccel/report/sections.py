"""The parts of ``report.html`` that say what ships and why: tiles, plot, candidates, way from the source, precisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfaccel.report.bars import bar
from hfaccel.report.facts import (
    Candidate,
    Manifest,
    Step,
    chosen,
    engine_of,
    headline_timing,
    in_pareto_set,
    is_float,
    is_quick,
    measures,
    outcome,
    points,
    speedup,
    state,
    waterfall,
    worst_loss,
)
from hfaccel.report.markup import Markup, element, join, nowrap, paragraph, table
from hfaccel.report.scatter import legend, scatter, spots_of
from hfaccel.report.wording import (
    NOT_MEASURED,
    megabytes,
    milliseconds,
    percent,
    point_words,
    precision_words,
    significant,
)

ROLES = ("query, key, value", "query", "key", "value", "output", "up", "down")
BADGES = {"shipped": "● ", "held": "○ ", "refused": "✕ ", "not-built": "- "}
WIDE_PLOT, HALF_PLOT, NARROW_PLOT = (1200, 400), (610, 380), (362, 380)


def tiles(manifest: Manifest) -> Markup:
    """The numbers of the headline, large."""
    winner = chosen(manifest)
    timing = headline_timing(winner)
    if timing is not None:
        speed = f"{timing['speedup']:.2f}x"
        about = f"the float graph's speed on {point_words(timing['point'])}, 95 % bounds {_bounds(timing)}"
    else:
        speed = "1x" if is_float(winner) else NOT_MEASURED
        about = "it is the float graph" if is_float(winner) else "speed on the target"
    size, before = winner["size_bytes"], manifest["source"]["weight_bytes"]
    saved = f"{size / before:.0%} of the checkpoint's {megabytes(before)}" if size and before else "of graph and weights"
    return element(
        "div",
        {"class": "tiles"},
        _tile(speed, about),
        _tile(*_accuracy_tile(winner)),
        _tile(megabytes(size), saved),
        _tile(precision_words(winner["precision"]), f"{winner['name']}, run by {engine_of(manifest)}"),
    )


def _accuracy_tile(winner: Candidate) -> tuple[str, str]:
    verdict: Mapping[str, Any] = winner["verdict"] or {}
    loss = worst_loss(verdict)
    if loss:
        bound = max(0.0, loss["upper_bound"])
        return f"≤ {percent(bound)}", f"loss of {loss['metric']} (95 % bound); measured {percent(loss['loss'], signed=True)}"
    if verdict.get("agreement_mean") is not None:
        return f"≥ {percent(verdict['agreement_lower_bound'])}", "same answers as the source (95 % bound)"
    if verdict:
        return f"≥ {verdict['cosine_lower_bound']:.4f}", "mean cosine with the source (95 % bound)"
    return NOT_MEASURED, "accuracy"


def _tile(number: str, about: str) -> Markup:
    return element("div", {"class": "tile"}, element("b", {}, number), element("span", {}, about))


def plot(manifest: Manifest) -> Markup:
    """What was tried, one panel per measure that a gate limits, each drawn for wide and for narrow screens."""
    panels, drawn = [], set()
    wanted = list(measures(manifest))
    wide = HALF_PLOT if len(wanted) > 1 else WIDE_PLOT
    for measure in wanted:
        spots, x_title = spots_of(manifest, measure)
        if len(spots) < 2:
            continue
        drawn |= {spot.name for spot in spots}
        for kind, (width, height) in (("wide-plot", wide), ("narrow", NARROW_PLOT)):
            panel = scatter(
                spots, measure, x_title, width=width, height=height, identifier=f"plot-{measure.key}-{kind}", kind=kind
            )
            panels.append(panel)
    if not panels:
        return paragraph(
            "There is no plot: it takes two candidates of which both speed (or size) and accuracy were measured.", kind="soft"
        )
    missing = [item["name"] for item in manifest["candidates"] if item["name"] not in drawn and state(item) != "not-built"]
    states = [state(item) for item in manifest["candidates"] if item["name"] in drawn]
    absent = paragraph(f"Not on the plot, for want of a number: {', '.join(missing)}.", kind="soft") if missing else Markup("")
    explained = (
        f"Right is faster, down is closer to the source. What lies in the shaded part is refused{_exempt(manifest)}; of the rest the best by the objective "
        f"({manifest['recipe']['measure']['objective']}) ships. Amounts smaller than the scale are drawn at its foot."
    )
    if not any(item["timings"] and not is_float(item) for item in manifest["candidates"]):
        explained = explained.replace("Right is faster", "Left is smaller")
    return join([paragraph(explained), element("div", {"class": "panels"}, *panels), legend(states), absent])


def _exempt(manifest: Manifest) -> str:
    floats = [item for item in manifest["candidates"] if is_float(item) and state(item) != "refused"]
    over = [harm for item in floats for measure in measures(manifest) if (harm := measure.harm(item)) and harm[1] > measure.limit]
    return ", but for the float graph, whose parity was proved stage by stage" if over else ""


def candidates(manifest: Manifest) -> Markup:
    """All candidates with numbers and the reason why each ships or does not; those that were never built folded away."""
    at = points(manifest)
    built = [item for item in manifest["candidates"] if state(item) != "not-built"]
    header = ["candidate", "speed-up", "outcome, and why", *(f"{point}, ms" for point in at), "MB", "loss (95 % bound)"]
    header.append("cosine (95 % bound)")
    kinds = ["shipped" if state(item) == "shipped" else None for item in built]
    caption = (
        "The one that ships first. Speed-up: geometric mean over the workload, of one race for all that hold the accuracy gate; quick: of a "
        "short race before. ~ marks timings that were not stable. Pareto: no other that holds all gates is as good in speed, size and accuracy."
    )
    whole = table(header, [_candidate_row(item, at) for item in built], caption=caption, row_classes=kinds)
    never = [[item["name"], outcome(item), _why(item)] for item in manifest["candidates"] if item not in built]
    if not never:
        return whole
    summary = element("summary", {}, f"{len(never)} not built, and why")
    return join(
        [
            whole,
            element(
                "details", {}, summary, table(["candidate", "outcome", "why"], never, caption="Never built, so never measured.")
            ),
        ]
    )


def _candidate_row(item: Candidate, at: Sequence[str]) -> list[str]:
    verdict: Mapping[str, Any] = item["verdict"] or {}
    times = {timing["point"]: timing for timing in item["timings"]}
    loss, faster, kind = worst_loss(verdict), speedup(item), state(item)
    told = element(
        "span", {"class": "wide"}, element("span", {"class": f"badge {kind}"}, BADGES[kind] + outcome(item)), _why(item)
    )
    numbers: list[str] = []
    for point in at:
        timing = times.get(point)
        numbers.append(f"{'' if timing['stable'] else '~'}{significant(timing['candidate_ms'])}" if timing else "")
    numbers += [
        significant(item["size_bytes"] / 1e6) if item["size_bytes"] else "",
        f"{percent(loss['loss'], signed=True)} ({percent(loss['upper_bound'], signed=True)})" if loss else "",
        f"{verdict['cosine_mean']:.4f} ({verdict['cosine_lower_bound']:.4f})" if "cosine_mean" in verdict else "",
    ]
    quick = element("span", {"class": "soft line"}, "quick") if is_quick(item) else Markup("")
    speed = join([nowrap(f"{faster:.2f}x"), quick]) if faster is not None else NOT_MEASURED
    return [item["name"], speed, told, *map(nowrap, numbers)]


def _why(item: Candidate) -> Markup:
    text = "the best by the objective of those that hold all gates" if item["detail"] == "chosen" else item["detail"]
    return element("span", {"class": "soft line"}, f"Pareto; {text}" if in_pareto_set(item) else text)


def way(manifest: Manifest) -> Markup:
    """What each step from the source to the artifact brought in time, size and loss."""
    steps = list(waterfall(manifest))
    at = points(manifest)
    longest = {point: max((step.times_ms.get(point, 0.0) for step in steps), default=0.0) for point in at}
    longest |= {
        timing["point"]: max(longest.get(timing["point"], 0.0), timing["parent_ms"]) for step in steps for timing in step.timings
    }
    largest = max((step.size_bytes or 0 for step in steps), default=0)
    header = ["step", "what", *at, "size", "distance from the source"]
    rows = [_step_row(step, at, longest, largest) for step in steps]
    caption = (
        "From the checkpoint to what ships. The float graphs were timed in one interleaved run, 8-bit ones in another together with the "
        "float graph (the upright line on their bar): compare times within a run only."
    )
    speed = "" if at else " Nothing was timed."
    return table(header, rows, caption=caption if at else f"From the checkpoint to what ships.{speed}")


def _step_row(step: Step, at: Sequence[str], longest: Mapping[str, float], largest: int) -> list[str]:
    kind = "bar shipped" if step.name == "quantize" else "bar"
    timings = {timing["point"]: timing for timing in step.timings}
    cells: list[str] = [step.name, element("span", {"class": "wide"}, step.what)]
    for point in at:
        time, timing = step.times_ms.get(point), timings.get(point)
        if time is None or not longest[point]:
            cells.append(element("span", {"class": "soft"}, NOT_MEASURED))
        elif timing is None:
            cells.append(join([nowrap(milliseconds(time)), bar(time / longest[point], kind=kind)]))
        else:
            shaky = "" if timing["stable"] else " shaky"
            told = f"{timing['speedup']:.2f}x ({_bounds(timing)}){', not stable' if shaky else ''}"
            against = f"float {milliseconds(timing['parent_ms'])} in the same run"
            lines = [element("span", {"class": "soft line"}, text) for text in (told, against)]
            drawn = bar(time / longest[point], kind=kind + shaky, reference=timing["parent_ms"] / longest[point])
            cells.append(join([nowrap(milliseconds(time)), drawn, *lines]))
    if step.size_bytes and largest:
        cells.append(join([nowrap(megabytes(step.size_bytes)), bar(step.size_bytes / largest, kind=kind)]))
    else:
        cells.append(element("span", {"class": "soft"}, NOT_MEASURED))
    cells.append(step.harm or element("span", {"class": "soft"}, NOT_MEASURED))
    return cells


def _bounds(timing: Mapping[str, Any]) -> str:
    return f"{timing['speedup_lower_bound']:.2f} to {timing['speedup_upper_bound']:.2f}"


def precision_map(manifest: Manifest) -> Markup:
    """Layers by operators, each MatMul in its precision; where the manifest names no layers, what was kept in float."""
    winner = chosen(manifest)
    kept = (
        table(
            ["MatMul kept in float", "measured error in 8 bit"],
            [[name, f"{error:.2g}" if error else NOT_MEASURED] for name, error in winner["kept_float"]],
            caption="MatMuls that stay in float because 8 bit hurts them most, worst first.",
        )
        if winner["kept_float"]
        else Markup("")
    )
    matmuls = winner.get("matmuls") or []
    if not matmuls:
        if is_float(winner):
            return paragraph("All of it is in float.")
        count = f"{winner['quantized']} MatMuls are in {winner['precision']}, {len(winner['kept_float'])} were kept in float."
        return join([paragraph(f"{count} Which layers they belong to was not recorded."), kept])
    roles = sorted(
        {item["role"] for item in matmuls}, key=lambda role: (ROLES.index(role) if role in ROLES else len(ROLES), role)
    )
    layers = sorted({item["layer"] for item in matmuls}, key=lambda layer: (layer is None, layer or 0))
    rows = [
        ["beside the layers" if layer is None else f"layer {layer}", *(_swatches(matmuls, layer, role) for role in roles)]
        for layer in layers
    ]
    grid = table(["", *roles], rows, caption="Precision of every MatMul with weights, by layer and operator.")
    return join([element("div", {"class": "map"}, grid), kept])


def _swatches(matmuls: Sequence[Mapping[str, Any]], layer: object, role: str) -> Markup:
    found = [item for item in matmuls if item["layer"] == layer and item["role"] == role]
    return join(
        element(
            "span",
            {"class": f"swatch {item['precision']}", "title": item["name"]},
            "float" if item["precision"] == "fp32" else item["precision"],
        )
        for item in found
    )

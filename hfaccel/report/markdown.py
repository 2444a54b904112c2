"""``report.md`` and ``README.md`` of an artifact, from its manifest alone: pure text in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hfaccel.report.evidence import data_words
from hfaccel.report.facts import (
    Manifest,
    cache_of,
    chosen,
    engine_of,
    greedy_of,
    in_pareto_set,
    is_float,
    is_quick,
    points,
    waterfall,
)
from hfaccel.report.headline import cautions, headline
from hfaccel.report.wording import NOT_MEASURED, cache_words, greedy_words, megabytes, milliseconds, percent


def candidate_rows(manifest: Manifest) -> tuple[list[str], list[list[str]]]:
    """The table of what was tried: header and rows, best first, as the terminal and the report show it.

    ``quick`` marks speed-ups of candidates that were out before the final race, ``pareto`` those that no other one beats in speed,
    size and accuracy. Of decoders ``same tokens`` is the share of the source's tokens that what ships writes, too.
    """
    points: list[Mapping[str, Any]] = next((timings for item in manifest["candidates"] if (timings := item["timings"])), [])
    header = [
        "candidate",
        "MB",
        *(f"{timing['point']} ms" for timing in points),
        "speed-up",
        "loss (95 % bound)",
        "cosine",
    ]
    continued = any(greedy_of(item) for item in manifest["candidates"])
    header += [*(["same tokens"] if continued else []), "outcome"]
    rows = []
    for item in manifest["candidates"]:
        times = [f"{timing['candidate_ms']:.2f}{'' if timing['stable'] else ' (not stable)'}" for timing in item["timings"]]
        if not times and is_float(item):
            times = [f"{timing['parent_ms']:.2f}" for timing in points]
        outcome = "chosen" if item["detail"] == "chosen" else item["reason"] or ""
        speed = f"{item['speedup']:.2f}x{' (quick)' if is_quick(item) else ''}" if item["timings"] or is_float(item) else ""
        rows.append(
            [
                item["name"],
                f"{item['size_bytes'] / 1e6:.0f}" if item["size_bytes"] else "",
                *(times or [""] * len(points)),
                speed,
                _loss(item["verdict"]),
                _number(item["verdict"], "cosine_mean"),
                *([_same_tokens(greedy_of(item))] if continued else []),
                f"{outcome}, pareto" if in_pareto_set(item) else outcome,
            ]
        )
    return header, rows


def _loss(verdict: Mapping[str, Any] | None) -> str:
    if not verdict or not verdict["losses"]:
        return ""
    worst = max(verdict["losses"], key=lambda loss: loss["upper_bound"])
    return f"{worst['loss']:+z.2%} ({worst['upper_bound']:+z.2%})"


def _number(verdict: Mapping[str, Any] | None, key: str) -> str:
    value = verdict.get(key) if verdict else None
    return "" if value is None else f"{value:.4f}"


def _same_tokens(greedy: Mapping[str, Any] | None) -> str:
    return "" if greedy is None else f"{greedy['share']:.1%} (at least {greedy['share_lower_bound']:.1%})"


def report_text(manifest: Manifest) -> str:
    """The whole report as Markdown."""
    source, lines = manifest["source"], [f"# {manifest['source']['id']}, compiled", ""]
    lines += [f"{manifest['chosen']} ({manifest['precision']}) for {manifest['target']['name']}; task {source['task']}.", ""]
    for caution in cautions(manifest):
        lines += [f"**{caution}**" if caution.startswith(("Speed", "No data")) else caution, ""]
    lines += [headline(manifest), "", "The same with pictures: `report.html`.", "", "## What was tried", ""]
    lines += markdown_table(*candidate_rows(manifest))
    if any(map(is_quick, manifest["candidates"])):
        lines += [
            "",
            "quick: timed shortly, and out before the final race. pareto: no other that holds all gates is as good in all.",
        ]
    dropped = [f"- {item['name']}: {item['reason']}. {item['detail']}" for item in manifest["candidates"] if item["reason"]]
    if dropped:
        lines += ["", "Dropped, and why:", "", *dropped]
    lines += ["", "## From source to artifact", "", *_way(manifest)]
    lines += ["", "## Accuracy", "", data_words(manifest), *_continued(manifest), *_slices(manifest)]
    lines += ["", "## Stages", ""]
    stages = [
        [item["stage"], item["status"], f"{item['seconds']:.1f}", megabytes(item.get("peak_memory_bytes"))]
        for item in manifest["stages"]
    ]
    lines += markdown_table(["stage", "status", "seconds", "peak memory"], stages)
    lines += ["", "## Environment", ""]
    lines += markdown_table(["what", "which"], [[str(key), str(value)] for key, value in manifest["host"].items()])
    lines += [
        "",
        *markdown_table(["library", "version"], [[key, str(value)] for key, value in manifest["versions"].items() if value]),
    ]
    return "\n".join(lines) + "\n"


def _way(manifest: Manifest) -> list[str]:
    at = points(manifest)
    rows = [
        [
            step.name,
            step.what,
            *(milliseconds(step.times_ms[point]) if point in step.times_ms else NOT_MEASURED for point in at),
            megabytes(step.size_bytes),
            step.harm or NOT_MEASURED,
        ]
        for step in waterfall(manifest)
    ]
    return markdown_table(["step", "what", *at, "size", "distance from the source"], rows)


def _continued(manifest: Manifest) -> list[str]:
    greedy = greedy_of(chosen(manifest))
    return [] if greedy is None else ["", greedy_words(greedy)]


def _slices(manifest: Manifest) -> list[str]:
    slices = (chosen(manifest)["verdict"] or {}).get("slices") or []
    rows = [
        [
            str(item["name"]),
            str(item["examples"]),
            f"{percent(item['loss'], signed=True)} ({percent(item['lower_bound'], signed=True)} to {percent(item['upper_bound'], signed=True)})",
        ]
        for item in slices
    ]
    return ["", *markdown_table(["slice", "examples", "loss (95 % bounds)"], rows)] if rows else []


def readme_text(manifest: Manifest) -> str:
    """What the folder is and how to run it, for whoever receives it."""
    generation = manifest["contract"].get("generation")
    answers = generation is not None and generation.get("encoder") is not None
    call = 'print(model(["a text"]))'
    tensors = f"Inputs: {_tensors(manifest, 'inputs')}. Outputs: {_tensors(manifest, 'outputs')}."
    if answers:
        speech = generation["encoder"].get("speech") is not None
        call = 'print(model.transcribe("talk.wav").text)' if speech else 'print(model.generate("a text"))'
        tensors = """It reads what `encoder.onnx` gives, `cross.0.key` and so on, beside its tokens and its cache, which is used as that of a
decoder alone: `past_key_values.0.key` in, `present.0.key` out. Both graphs read their weights from `model.onnx.data`."""
    elif generation is not None:
        call = 'print(model.generate("a text", max_new_tokens=64))  # or messages: [{"role": "user", "content": "..."}]'
        tensors += f""" The cache has {generation["layers"]} layers, `past_key_values.0.key` and so on in and
`present.0.key` and so on out; a batch of prompts is padded on the right."""
        stored = cache_of(manifest)
        tensors += "" if stored is None else f" It is stored in {cache_words(*stored)}."
    package = "'hfaccel[openvino]'" if "openvino" in engine_of(manifest) else "hfaccel"
    return f"""# {manifest["source"]["id"]}, compiled by hfaccel {manifest["hfaccel_version"]}

Task {manifest["source"]["task"]}, precision {manifest["precision"]}, target {manifest["target"]["name"]}. `report.html` and `report.md` have the evidence.

With hfaccel (`pip install {package}`; no torch needed):

    import hfaccel
    model = hfaccel.load("this folder")
    {call}

With plain onnxruntime: open `{manifest["graph"]}`; tokenizer in `tokenizer.json` (at most {manifest["contract"]["text"]["max_length"]} tokens).
{tensors} `golden/` holds inputs and outputs to test against.
{_genai_words(manifest)}
Check that no file changed: `hfaccel verify "this folder"`.
"""


def _genai_words(manifest: Manifest) -> str:
    """Of a decoder, how onnxruntime-genai opens the folder or why it cannot; empty for all else and for folders of older versions."""
    if "genai" not in manifest:
        return ""
    if manifest["genai"] is not None:
        return f"\nonnxruntime-genai cannot open this folder: {manifest['genai']}.\n"
    return """
With onnxruntime-genai: `onnxruntime_genai.Model("this folder")` reads `genai_config.json`. Its cache has room for `max_length` tokens
from the start, so set that search option to what you need.
"""


def _tensors(manifest: Manifest, kind: str) -> str:
    """Name, type and shape of the inputs or outputs; of a cache those of its first layer."""
    specs = manifest["contract"][kind]
    first = [spec for spec in specs if not spec["name"].startswith(("past_key_values.", "present.")) or ".0." in spec["name"]]
    return ", ".join(f"`{spec['name']}` {spec['dtype']} {list(spec['shape'])}" for spec in first)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table as lines; pipes in cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), line(["---"] * len(header)), *(line(row) for row in rows)]

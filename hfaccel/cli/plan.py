"""``hfaccel plan``."""

from __future__ import annotations

from hfaccel.cli import options
from hfaccel.cli.output import Output


def plan(
    model: options.Model,
    output: options.OutputFolder,
    task: options.Task = None,
    revision: options.Revision = None,
    target: options.Target = "auto",
    recipe: options.RecipeName = None,
    set_: options.Overrides = None,
    data: options.Data = None,
    calibration: options.Calibration = None,
    column: options.Columns = None,
    json: options.AsJson = False,
) -> None:
    """Say what compile would do, without loading weights: task, recipe, target, data, stages, candidates, memory and disk.

    Example:
      hfaccel plan ./checkpoint -o out --data test.csv
    """
    from hfaccel.request import DISK_FACTOR, MEMORY_BASE_BYTES, MEMORY_FACTOR, CompileRequest, prepare

    printer = Output(as_json=json)
    request = CompileRequest(
        model=model,
        output=output,
        revision=revision,
        task=task,
        target=target,
        recipe=recipe,
        overrides=tuple(set_ or ()),
        data=data,
        calibration=calibration,
        columns=options.parse_columns(column or ()),
    )
    made = prepare(request)
    memory_bytes = MEMORY_FACTOR * made.source.weight_bytes + MEMORY_BASE_BYTES
    disk_bytes = DISK_FACTOR * made.source.weight_bytes
    ladder = [rung.name for rung in made.recipe.quantize.ladder] if made.recipe.quantize.enabled else []
    refused = [rung.name for rung in made.recipe.quantize.ladder if rung.needs_calibration and not made.calibration]
    summary = {
        "model": made.source.id,
        "model_type": made.source.model_type,
        "task": made.source.task,
        "recipe": made.recipe.name,
        "target": made.target.name,
        "measured_on_target": made.on_target,
        "evaluation_examples": len(made.dataset.examples) if made.dataset else 0,
        "calibration_texts": len(made.calibration),
        "candidates": ladder,
        "refused_without_calibration": refused,
        "memory_limit_bytes": memory_bytes,
        "disk_bytes": disk_bytes,
        "notices": list(made.notices),
    }
    printer.result(summary)
    rows = [
        [key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for key, value in summary.items()
    ]
    printer.table(f"plan for {made.source.id}", ["what", "value"], rows)

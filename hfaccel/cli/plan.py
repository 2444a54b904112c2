"""``hfaccel plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfaccel.cli import options
from hfaccel.cli.output import Output

if TYPE_CHECKING:
    from hfaccel.plan import Forecast, StageForecast


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
    metric: options.Metric = None,
    max_loss: options.MaxLoss = None,
    objective: options.Objective = None,
    workload: options.Workload = None,
    precision: options.PrecisionName = None,
    engine: options.Engines = None,
    budget: options.Budget = None,
    threads: options.Threads = None,
    p95: options.SlowestRun = None,
    max_size: options.MaxSize = None,
    strict: options.Strict = False,
    force: options.Force = False,
    no_cache: options.NoCache = False,
    trust_remote_code: options.RemoteCode = False,
    allow_pickle: options.Pickle = False,
    json: options.AsJson = False,
) -> None:
    """Say what compile would do with the same options, without loading weights: stages, cache hits, memory, disk and time.

    Examples:
      hfaccel plan ./checkpoint -o out --data test.csv
      hfaccel plan ./checkpoint -o out --max-loss 1% --no-cache --json
    """
    from hfaccel.plan import forecast
    from hfaccel.request import prepare

    printer = Output(as_json=json)
    request = options.make_request(
        model=model,
        output=output,
        task=task,
        revision=revision,
        target=target,
        recipe=recipe,
        overrides=set_,
        data=data,
        calibration=calibration,
        columns=column,
        metric=metric,
        max_loss=max_loss,
        objective=objective,
        workload=workload,
        precision=precision,
        engine=engine,
        budget=budget,
        threads=threads,
        p95=p95,
        max_size=max_size,
        strict=strict,
        force=force,
        no_cache=no_cache,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )
    made = forecast(prepare(request))
    summary = _summary(made)
    printer.result({**summary, **_numbers(made)})
    rows = [
        [key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value)]
        for key, value in summary.items()
    ]
    printer.table(f"plan for {made.plan.source.id}", ["what", "value"], rows)
    printer.table(
        "stages",
        ["stage", "what happens", "seconds", "peak MB", "cache MB", "figures are"],
        [_row(stage) for stage in made.stages],
    )
    for line in _totals(made):
        printer.line(line)


def _summary(made: Forecast) -> dict[str, Any]:
    from hfaccel.stages.quantize import refusal

    plan = made.plan
    quantize = plan.recipe.quantize
    ladder = quantize.ladder if quantize.enabled else ()
    refusals = {rung.name: refusal(rung, plan.recipe, plan.target, on_target=plan.on_target) for rung in ladder}
    return {
        "model": plan.source.id,
        "model_type": plan.source.model_type,
        "task": plan.source.task,
        "recipe": plan.recipe.name,
        "target": plan.target.name,
        "measured_on_target": plan.on_target,
        "output": f"{plan.request.output} ({made.output_state})",
        "evaluation_examples": len(plan.dataset.examples) if plan.dataset else 0,
        "calibration_texts": len(plan.calibration),
        "candidates": [rung.name for rung in ladder],
        "refused_without_calibration": [rung.name for rung in ladder if rung.needs_calibration and not plan.calibration],
        "refused_here": [f"{name}: {refused[0]}" for name, refused in refusals.items() if refused is not None],
        "notices": list(plan.notices),
    }


def _numbers(made: Forecast) -> dict[str, Any]:
    return {
        "stages": [
            {
                "stage": stage.name,
                "state": stage.state,
                "waits_for": stage.waits_for,
                "cost": stage.cost.to_json() if stage.cost else None,
            }
            for stage in made.stages
        ],
        "seconds": made.seconds,
        "peak_memory_bytes": made.peak_memory_bytes,
        "cache_bytes": made.cache_bytes,
        "available_memory_bytes": made.available_memory_bytes,
        "free_disk_bytes": made.free_disk_bytes,
        "cache": {"folder": str(made.cache_folder), "size_bytes": made.cache_used_bytes, "limit_bytes": made.cache_limit_bytes},
    }


def _row(stage: StageForecast) -> list[str]:
    happens = {
        "cached": "from the cache",
        "runs": "runs",
        "unknown": f"unknown until {stage.waits_for} has run",
        "skipped": "skipped: the recipe switches it off",
    }[stage.state]
    cost = stage.cost
    if cost is None:
        return [stage.name, happens, "", "", "", ""]
    numbers = [f"{cost.seconds:.1f}", f"{cost.peak_memory_bytes / 1e6:.0f}", f"{cost.size_bytes / 1e6:.0f}"]
    return [stage.name, happens, *numbers, cost.basis]


def _totals(made: Forecast) -> list[str]:
    lines = [
        f"time: about {made.seconds:.0f} s, if every stage runs that is not surely in the cache",
        f"memory: about {made.peak_memory_bytes / 1e9:.1f} GB at the peak, {made.available_memory_bytes / 1e9:.1f} GB available",
        f"disk: about {made.cache_bytes / 1e9:.2f} GB more in {made.cache_folder}, {made.free_disk_bytes / 1e9:.1f} GB free",
    ]
    over = made.cache_used_bytes + made.cache_bytes - made.cache_limit_bytes
    if over > 0:
        limit = f"{made.cache_limit_bytes / 1e9:.1f} GB"
        lines.append(
            f"cache: the limit is {limit}, so about {over / 1e9:.2f} GB of the results used longest ago would be deleted"
        )
    return lines

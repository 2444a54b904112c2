"""``hfaccel compile``."""

from __future__ import annotations

from hfaccel.cli import options
from hfaccel.cli.output import Output


def compile_command(
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
    """Compile a checkpoint: export, optimize, fuse, quantize, judge.

    The fastest candidate that holds the accuracy budget ships; each other one is listed with the reason why not.

    Examples:
      hfaccel compile sentence-transformers/all-MiniLM-L6-v2 -o minilm
      hfaccel compile ./checkpoint -o out --data test.csv --max-loss 1%
      hfaccel compile ./checkpoint -o out --data test.csv --budget 10m
      hfaccel compile ./checkpoint -o out --workload 1x128 --p95 20ms --max-size 50MB
      hfaccel compile ./checkpoint -o out --target cpu-avx2 --workload 1x16,8x128
    """
    printer = Output(as_json=json)
    from hfaccel.api import require_compile_extra

    require_compile_extra()
    from hfaccel.pipeline import compile_model
    from hfaccel.report.markdown import candidate_rows

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
    with printer.progress() as progress:
        result = compile_model(request, progress)
    manifest = result.manifest
    printer.result(
        {**manifest, "output": str(result.folder), "up_to_date": result.up_to_date, "seconds": round(result.seconds, 2)}
    )
    header, rows = candidate_rows(manifest)
    printer.table(f"{manifest['source']['id']} on {manifest['target']['name']}", header, rows)
    for item in manifest["candidates"]:
        if item["reason"] not in (None, "not-better-than-chosen"):
            printer.line(f"dropped {item['name']}: {item['reason']}. {item['detail']}")
    state = "is up to date" if result.up_to_date else "written"
    printer.line(
        f"{result.folder} {state}: {manifest['chosen']} ({manifest['precision']}), {result.seconds:.1f} s. Report: report.html in it."
    )

"""What a compile run is asked to do, and everything that can be refused before a model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hfaccel.artifact.cache_space import cache_limit_bytes
from hfaccel.artifact.contract import ENCODER_DECODER_TASKS
from hfaccel.artifact.store import default_cache_folder
from hfaccel.errors import HfaccelError, ResourceError, SettingsError, UsageError
from hfaccel.evaluate.dataset import Dataset, Example, digest, load_dataset
from hfaccel.evaluate.metrics import METRIC_NAMES
from hfaccel.evaluate.sample import calibration_texts
from hfaccel.measure.memory import available_memory_bytes
from hfaccel.recipe.load import GENERIC_RECIPE, ResolvedRecipe, choose_recipe, load_recipe
from hfaccel.recipe.targets import TargetProfile, adapt_recipe, resolve_target
from hfaccel.source.model import SourceModel
from hfaccel.source.resolve import resolve_source

if TYPE_CHECKING:
    from hfaccel.evaluate.metrics import MetricName
    from hfaccel.recipe.schema import Recipe

T = TypeVar("T")

LANGUAGE_HOLD_OUT = 16
"""Texts from which some are held out for the calibration of a language model: each has as much to say as many short examples."""
MEMORY_FACTOR = 3
MEMORY_BASE_BYTES = 1_000_000_000
DISK_FACTOR = 8
"""Stage results in the cache: three float graphs and the candidates, against the size of the checkpoint."""

_PACKAGED = "no --data and no --calibration given: weights and ranges are calibrated on packaged texts, which are not like yours"
_DEQUANTIZED = (
    "the weights of {} were quantized already: every loss is measured against them as dequantized, not against the original"
)


@dataclass(frozen=True)
class CompileRequest:
    """The command line of ``hfaccel compile`` (or the arguments of ``hfaccel.compile``) as values.

    Attributes:
        model: hub id or local folder.
        output: the folder to make.
        settings: dotted recipe paths that options such as ``--max-loss`` set, see :func:`recipe_settings`.
        overrides: ``key.path=value`` texts of ``--set``.
        columns: role -> column name of the data.
        strict: a missed fusion contract fails instead of warning.
        force: replace an existing output folder.
        use_cache: reuse results of earlier runs.
    """

    model: str
    output: Path
    revision: str | None = None
    task: str | None = None
    target: str = "auto"
    recipe: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    data: str | None = None
    calibration: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    metric: MetricName | None = None
    strict: bool = False
    force: bool = False
    use_cache: bool = True
    trust_remote_code: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class Plan:
    """A checked request: all its parts found and fitting together.

    Attributes:
        recipe: as it will be used, adapted to the target.
        resolved: as written, with the origin of each value.
        notices: what the user must know (generic recipe, adaptations).
    """

    request: CompileRequest
    source: SourceModel
    recipe: Recipe
    resolved: ResolvedRecipe
    target: TargetProfile
    on_target: bool
    dataset: Dataset | None
    calibration: tuple[Any, ...]
    calibration_sha256: str
    notices: tuple[str, ...]


def recipe_settings(
    *,
    max_loss: float | None,
    objective: str | None,
    workload: str | Sequence[str] | None,
    precision: str | None,
    budget: float | None,
    engines: str | Sequence[str] | None,
    threads: int | None,
    max_p95_ms: float | None,
    max_size_bytes: int | None,
) -> dict[str, Any]:
    """Dotted recipe paths that these options set; what is None is left to the recipe.

    Args:
        max_loss: accuracy budget as a share, 0.01 is 1 %.
        objective: what ranks the candidates.
        workload: batch x length points, as a sequence or separated by commas.
        precision: a demand, or "auto".
        budget: seconds of a thorough search.
        engines: which may compete, as a sequence or separated by commas; or "auto".
        threads: that the artifact will run with.
        max_p95_ms: limit on the 95th percentile of a run's time, at every point of the workload.
        max_size_bytes: limit on graph and weights.
    """
    points = workload.split(",") if isinstance(workload, str) else workload
    names = engines.split(",") if isinstance(engines, str) else engines
    values = {
        "accuracy.max_loss": max_loss,
        "measure.objective": objective,
        "measure.workload": None if points is None else [point.strip() for point in points],
        "quantize.precision": precision,
        "quantize.engines": None if names is None else _engine_names(names),
        "quantize.search_seconds": budget,
        "quantize.fallback": None if budget is None else "thorough",
        "measure.threads": threads,
        "measure.max_p95_ms": max_p95_ms,
        "measure.max_size_bytes": max_size_bytes,
    }
    return {path: value for path, value in values.items() if value is not None}


def _engine_names(names: Sequence[str]) -> list[str] | str:
    listed = [name.strip() for name in names]
    return "auto" if listed == ["auto"] else listed


def prepare(request: CompileRequest) -> Plan:
    """Resolve source, recipe, target and data; several problems are reported together.

    Raises:
        HfaccelError: the first problem's class, with the text of all.
    """
    problems: list[HfaccelError] = []

    def attempt(part: Callable[[], T]) -> T | None:
        try:
            return part()
        except HfaccelError as error:
            problems.append(error)
            return None

    attempt(lambda: _check_output(request))
    attempt(lambda: _check_metric(request.metric))
    attempt(cache_limit_bytes)
    target = attempt(lambda: resolve_target(request.target))
    source = attempt(
        lambda: resolve_source(
            request.model,
            revision=request.revision,
            task=request.task,
            trust_remote_code=request.trust_remote_code,
            allow_pickle=request.allow_pickle,
        )
    )
    notices: list[str] = []
    if source is not None and source.dequantized_from is not None:
        notices.append(_DEQUANTIZED.format(source.dequantized_from))
    resolved = attempt(lambda: _load_recipe(request, source, notices))
    recipe = None
    if resolved is not None and target is not None:
        recipe, adapted = adapt_recipe(resolved.recipe, target[0])
        notices += adapted
        attempt(lambda: _check_limits(resolved.recipe, target))
    data = attempt(lambda: _load_data(request, source, recipe, target)) if source and recipe and target else None
    if source is not None:
        attempt(lambda: _check_resources(request, source))
    if problems:
        _raise_together(problems)
    assert (
        source is not None and recipe is not None and resolved is not None and target is not None and data is not None
    )  # no problems
    dataset, calibration, digest = data
    if calibration and not (request.data or request.calibration):
        notices.append(_PACKAGED)
    return Plan(request, source, recipe, resolved, target[0], target[1], dataset, calibration, digest, tuple(notices))


def _raise_together(problems: Sequence[HfaccelError]) -> None:
    first = problems[0]
    if len(problems) == 1:
        raise first
    text = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
    together = HfaccelError(f"{len(problems)} problems:\n{text}")
    together.exit_code = first.exit_code
    raise together from first


def _check_output(request: CompileRequest) -> None:
    output = request.output
    if output.is_file():
        raise SettingsError("the output is a file", where=str(output), hint="name a folder with -o")
    if output.is_dir() and any(output.iterdir()) and not (output / "manifest.json").is_file():
        raise SettingsError(
            "the output folder is not empty and not a compiled artifact; it is left alone",
            where=str(output),
            hint="choose another folder with -o",
        )
    parent = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    if not _is_writable(parent):
        raise SettingsError("cannot write here", where=str(parent), hint="choose a folder that you may write to with -o")


def _check_metric(name: str | None) -> None:
    if name is not None and name not in METRIC_NAMES:
        raise UsageError(f"unknown metric {name!r}", where="metric", hint=f"one of: {', '.join(METRIC_NAMES)}")


def _check_limits(recipe: Recipe, target: tuple[TargetProfile, bool]) -> None:
    profile, on_target = target
    if recipe.measure.max_p95_ms is not None and not on_target:
        raise SettingsError(
            f"a limit on time (--p95) can be kept only where time is measured, and this host is not the target {profile.name}",
            where="measure.max_p95_ms",
            hint="compile on the target, or leave the limit out",
        )


def _is_writable(folder: Path) -> bool:
    """Try it: permission bits mislead (root, read-only mounts)."""
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _load_recipe(request: CompileRequest, source: SourceModel | None, notices: list[str]) -> ResolvedRecipe:
    name = request.recipe
    if name is None:
        name, notice = choose_recipe(source.model_type, source.task) if source is not None else (GENERIC_RECIPE, None)
        if notice:
            notices.append(notice)
    return load_recipe(name, overrides=request.overrides, sets=request.settings)


def _load_data(
    request: CompileRequest, source: SourceModel, recipe: Recipe, target: tuple[TargetProfile, bool]
) -> tuple[Dataset | None, tuple[Any, ...], str]:
    labels = _labels(source.config)
    count, seed = recipe.quantize.calibration_examples, recipe.seed

    def load(spec: str, limit: int) -> Dataset:
        return load_dataset(spec, task=source.task, columns=request.columns, labels=labels, max_examples=limit, seed=seed)

    sound = source.task == "automatic-speech-recognition"
    if sound and not request.data:
        raise UsageError(
            "a speech model is judged on recordings, and none are packaged",
            where="--data",
            hint="give a CSV with the columns audio (paths of sound files) and text (what is said)",
        )
    dataset = load(request.data, recipe.accuracy.max_examples) if request.data else None
    if request.calibration:
        kind = source.task if sound else "feature-extraction"
        texts = load_dataset(request.calibration, task=kind, columns={}, labels=(), max_examples=count, seed=seed)
        return dataset, texts.texts(), texts.sha256
    if source.task in ENCODER_DECODER_TASKS and not _is_calibrated(recipe, target):
        return dataset, (), "" if dataset is None else dataset.sha256
    if dataset is not None and source.task != "text-generation":
        calibration, rest = dataset.split_calibration(count)
        return rest, calibration, dataset.sha256
    packaged = calibration_texts(source.task)
    packaged_sha256 = digest([Example(text) for text in packaged])
    if dataset is None:
        return None, packaged, packaged_sha256
    # Texts of other kinds beside those of the data: what 8 bit loses on the data shrank by a fifth, its bound by a quarter.
    calibration, rest = dataset.without_repeats().split_calibration(count, hold_out_from=LANGUAGE_HOLD_OUT)
    return rest, (*calibration, *packaged), dataset.sha256 + packaged_sha256


def _is_calibrated(recipe: Recipe, target: tuple[TargetProfile, bool]) -> bool:
    """Whether a rung that may be built learns from texts: of encoder-decoders only one for another engine does, and every example counts."""
    from hfaccel.stages.quantize import refusal

    calibrated = [rung for rung in recipe.quantize.ladder if rung.needs_calibration]
    return any(refusal(rung, recipe, target[0], on_target=target[1]) is None for rung in calibrated)


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    # A checkpoint with two unnamed labels, the default of transformers, states neither their names nor their number.
    names = config.get("id2label") or {number: f"LABEL_{number}" for number in range(int(config.get("num_labels") or 2))}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _check_resources(request: CompileRequest, source: SourceModel) -> None:
    needed = MEMORY_FACTOR * source.weight_bytes + MEMORY_BASE_BYTES
    available = available_memory_bytes()
    if available < needed:
        raise ResourceError(
            f"compiling needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available",
            where=source.id,
            hint="close other programs or use a larger machine",
        )
    cache = default_cache_folder()
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free, wanted = shutil.disk_usage(place).free, DISK_FACTOR * source.weight_bytes
    if free < wanted:
        raise ResourceError(
            f"compiling writes about {wanted / 1e9:.1f} GB of stage results, {free / 1e9:.1f} GB are free",
            where=str(place),
            hint="free space, or point HFACCEL_CACHE to another disk",
        )

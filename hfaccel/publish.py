"""Write the folder that a serving team gets."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import hfaccel
from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.artifact.genai_config import FILE_NAME as GENAI_FILE
from hfaccel.artifact.genai_config import genai_config, why_no_genai_config
from hfaccel.artifact.manifest import FILE_NAME, read_manifest, write_manifest
from hfaccel.measure.host import host_fingerprint, library_versions
from hfaccel.recipe.load import generic_recipe
from hfaccel.report.html import FILE_NAME as REPORT_FILE
from hfaccel.report.html import report_html
from hfaccel.report.markdown import readme_text, report_text
from hfaccel.request import Plan
from hfaccel.stages.base import StageName
from hfaccel.stages.candidates import FILE_NAME as CANDIDATES_FILE
from hfaccel.stages.candidates import Candidate, load_candidates
from hfaccel.stages.export import PARAMETERS_FILE, PARITY_FILE
from hfaccel.stages.parents import rung_as_found

if TYPE_CHECKING:
    from hfaccel.recipe.schema import Recipe

PINNED_RECIPE = "recipe.yaml"
LIBRARIES = (
    "hfaccel", "torch", "transformers", "tokenizers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino", "optimum", "numpy",
)  # fmt: skip
NOT_PUBLISHED = frozenset({PARITY_FILE, PARAMETERS_FILE, "model.onnx", "model.onnx.data"})


def write_output(
    folder: Path,
    plan: Plan,
    artifacts: Mapping[StageName, Artifact],
    records: Sequence[Mapping[str, Any]],
    *,
    key: str,
    seconds: float,
) -> dict[str, Any]:
    """Fill ``folder`` with graph, tokenizer, golden answers, report and manifest; returns the manifest."""
    final = artifacts["accuracy"]
    for name in sorted(path.name for path in artifacts["export"].folder.iterdir()):
        if name not in NOT_PUBLISHED:
            _copy(artifacts["export"].folder / name, folder / name)
    for path in sorted(final.folder.iterdir()):
        if path.name != CANDIDATES_FILE:
            _copy(path, folder / path.name)
    candidates = load_candidates(final.folder)
    chosen = next(candidate for candidate in candidates if candidate.detail == "chosen")
    manifest = _manifest(plan, final, records, candidates, chosen, key=key, seconds=seconds)
    if final.contract.task == "text-generation":
        manifest["genai"] = _write_genai_config(folder, plan, final, chosen)
    (folder / PINNED_RECIPE).write_text(pinned_recipe(plan.recipe, chosen, plan.source.id, plan.source.task), encoding="utf-8")
    (folder / "report.md").write_text(report_text(manifest), encoding="utf-8")
    (folder / REPORT_FILE).write_text(report_html(manifest), encoding="utf-8")
    (folder / "README.md").write_text(readme_text(manifest), encoding="utf-8")
    manifest["files"] = [asdict(record) for record in record_files(folder, skip=(FILE_NAME,))]
    write_manifest(folder, manifest)
    return read_manifest(folder)


def _write_genai_config(folder: Path, plan: Plan, final: Artifact, chosen: Candidate) -> str | None:
    """Write what onnxruntime-genai opens the folder with; or say why it cannot."""
    reason = why_no_genai_config(final.contract, plan.source.model_type, chosen.session.engine)
    if reason is None:
        content = genai_config(final.contract, plan.source.config, final.graph)
        (folder / GENAI_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return reason


def pinned_recipe(recipe: Recipe, chosen: Candidate, model: str, task: str) -> str:
    """YAML of a recipe whose ladder is what was chosen and nothing else: the same model again, without a search.

    It states every value; only settings that later versions add come from the recipe that it extends.
    """
    rung = rung_as_found(chosen, recipe.quantize.ladder)
    quantize = recipe.quantize.model_copy(update={"fallback": "off", "ladder": () if rung is None else (rung,)})
    if rung is None:
        quantize = quantize.model_copy(update={"precision": "fp32"})
    pinned = recipe.model_copy(update={"extends": generic_recipe(task), "model_types": (), "quantize": quantize})
    text = yaml.safe_dump(pinned.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
    return f"# Makes this folder's model again from {model}, without a search:\n#   hfaccel compile MODEL -o OUT --recipe {PINNED_RECIPE}\n{text}"


def _copy(source: Path, destination: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, destination)
    else:
        shutil.copyfile(source, destination)


def _manifest(
    plan: Plan,
    final: Artifact,
    records: Sequence[Mapping[str, Any]],
    candidates: Sequence[Candidate],
    chosen: Candidate,
    *,
    key: str,
    seconds: float,
) -> dict[str, Any]:
    return {
        "hfaccel_version": hfaccel.__version__,
        "key": key,
        "source": {
            "id": plan.source.id,
            "folder": str(plan.source.folder.absolute()),
            "revision": plan.source.revision,
            "sha256": plan.source.sha256,
            "model_type": plan.source.model_type,
            "task": plan.source.task,
            "weight_bytes": plan.source.weight_bytes,
        },
        "graph": final.graph,
        "engine": chosen.session.engine,
        "precision": final.precision,
        "chosen": chosen.name,
        "contract": final.contract.to_json(),
        "session": asdict(chosen.session),
        "target": {"name": plan.target.name, "speed_measured_on_it": plan.on_target},
        "host": host_fingerprint(),
        "versions": _recorded_versions(),
        "recipe": plan.recipe.model_dump(mode="json"),
        "recipe_origins": dict(plan.resolved.origins),
        "notices": list(plan.notices),
        "stages": [dict(record) for record in records],
        "candidates": [candidate.to_json() for candidate in candidates],
        "seconds": round(seconds, 2),
        "files": [],
    }


def _recorded_versions() -> dict[str, str | None]:
    found = {name: None if version == "absent" else version for name, version in library_versions(LIBRARIES).items()}
    return {**found, "python": platform.python_version()}

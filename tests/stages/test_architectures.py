"""Every architecture of the recipes: exported, optimized, fused and judged, with its fusion contract held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hfaccel.api import SilentProgress
from hfaccel.pipeline import compile_model
from hfaccel.recipe.load import list_recipes
from hfaccel.request import CompileRequest

MODEL_TYPES = (
    "bert",
    "distilbert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "mpnet",
    "electra",
    "albert",
    "deberta-v2",
    "modernbert",
)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_architecture_compiles_and_holds_its_contract(
    model_type: str, make_architecture: Callable[[str], Path], tmp_path: Path
) -> None:
    request = CompileRequest(
        model=str(make_architecture(model_type)), output=tmp_path / "out", overrides=("quantize.enabled=false",), strict=True
    )
    progress = SilentProgress()
    result = compile_model(request, progress)
    stages = {record["stage"]: record for record in result.manifest["stages"]}
    assert stages["quantize"]["status"] == "skipped"
    assert stages["fuse"]["metrics"]["contract_missed"] == []
    assert stages["fuse"]["metrics"]["parity"]["max_abs"] < 1e-3
    assert result.manifest["contract"]["inputs"][0]["shape"] == ["batch", "sequence"]
    assert not [line for line in progress.warnings if line.startswith("no recipe")]


def test_every_recipe_has_a_row() -> None:
    stated = {model_type for summary in list_recipes() for model_type in summary.model_types}
    assert stated == set(MODEL_TYPES)

"""Every architecture of the recipes: exported, optimized, fused and judged, with its fusion contract held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hfaccel.api import SilentProgress
from hfaccel.pipeline import compile_model
from hfaccel.recipe.load import list_recipes
from hfaccel.request import CompileRequest
from tests.stages.conftest import SIZES, SPECIAL, TOKEN_TYPES, WORDS

# model_type -> the task that its row in conftest stands for.
TASKS = {
    "bert": "text-classification",
    "distilbert": "text-classification",
    "roberta": "token-classification",
    "xlm-roberta": "question-answering",
    "camembert": "text-classification",
    "mpnet": "feature-extraction",
    "electra": "text-classification",
    "albert": "fill-mask",
    "deberta-v2": "text-classification",
    "modernbert": "text-classification",
}


@pytest.mark.parametrize("model_type", TASKS)
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
    has_sdpa = MODEL_MAPPING[CONFIG_MAPPING[model_type]]._supports_sdpa
    assert stages["export"]["metrics"]["attention"] == ("sdpa" if has_sdpa else "eager")
    assert stages["fuse"]["metrics"]["contract_missed"] == []
    assert stages["fuse"]["metrics"]["parity"]["max_abs"] < 1e-3
    assert result.manifest["contract"]["task"] == TASKS[model_type]
    assert result.manifest["contract"]["inputs"][0]["shape"] == ["batch", "sequence"]
    chosen = next(item for item in result.manifest["candidates"] if item["detail"] == "chosen")
    in_layers = {item["layer"]: item["role"] for item in chosen["matmuls"] if item["layer"] is not None}
    assert in_layers, "no MatMul was found to be of a layer"
    assert "other" not in {item["role"] for item in chosen["matmuls"] if item["layer"] is not None}
    assert not [line for line in progress.warnings if line.startswith("no recipe")]


def test_every_recipe_has_a_row_and_every_head_too() -> None:
    encoders = [summary for summary in list_recipes() if summary.extends == "encoder"]
    stated = {model_type for summary in encoders for model_type in summary.model_types}
    assert stated == set(TASKS)
    # The other two tasks, sentence-similarity and text-ranking, have the graphs of these.
    heads = {"text-classification", "token-classification", "question-answering", "fill-mask", "feature-extraction"}
    assert heads == set(TASKS.values())


def test_an_architecture_of_which_nobody_wrote_compiles_with_the_attention_that_it_has(
    tmp_path: Path, write_tokenizer: Callable[..., None]
) -> None:
    from transformers import RoFormerConfig, RoFormerForSequenceClassification

    assert not RoFormerForSequenceClassification._supports_sdpa
    RoFormerForSequenceClassification(RoFormerConfig(**SIZES)).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source", words=WORDS, settings=SPECIAL | TOKEN_TYPES)
    request = CompileRequest(str(tmp_path / "source"), tmp_path / "out", overrides=("quantize.enabled=false",))
    result = compile_model(request, SilentProgress())
    assert result.manifest["recipe"]["name"] == "encoder"
    assert result.manifest["stages"][0]["metrics"]["attention"] == "eager"

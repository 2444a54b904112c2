from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from hfaccel.cli.doctor import doctor
from hfaccel.cli.recipes import recipes_app
from hfaccel.cli.targets import targets
from hfaccel.errors import RecipeError
from hfaccel.recipe.json_schema import recipe_json_schema
from hfaccel.recipe.targets import detect_host


@pytest.fixture
def app() -> typer.Typer:
    result = typer.Typer()
    result.add_typer(recipes_app, name="recipes")
    result.command()(targets)
    result.command()(doctor)
    return result


def run(app: typer.Typer, *arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list(app: typer.Typer) -> None:
    rows = json.loads(run(app, "recipes", "list", "--json"))
    assert {"name": "encoder", "extends": None, "model_types": [], "description": "Generic text encoder"} in rows
    assert "deberta-v2" in run(app, "recipes", "list")


def test_show_is_yaml_with_overrides(app: typer.Typer) -> None:
    shown = yaml.safe_load(run(app, "recipes", "show", "bert", "--set", "quantize.precision=int8"))
    assert shown["name"] == "bert"
    assert shown["quantize"]["precision"] == "int8"


def test_show_origins(app: typer.Typer) -> None:
    result = json.loads(run(app, "recipes", "show", "bert", "--set", "seed=3", "--origins", "--json"))
    assert result["origins"]["seed"] == "--set"
    assert result["origins"]["name"].startswith("bert.yaml:")
    assert "encoder.yaml:" in run(app, "recipes", "show", "bert", "--origins")


def test_show_unknown_recipe(app: typer.Typer) -> None:
    with pytest.raises(RecipeError, match="there is no recipe 'brt'"):
        run(app, "recipes", "show", "brt")


def test_check(app: typer.Typer, tmp_path: Path) -> None:
    good, bad, worse = tmp_path / "good.yaml", tmp_path / "bad.yaml", tmp_path / "worse.yaml"
    good.write_text("name: good\nextends: encoder\n")
    bad.write_text("name: bad\nextends: encoder\nsed: 1\n")
    worse.write_text("name: [\n")
    assert run(app, "recipes", "check", str(good), "bert") == f"{good}: ok (good)\nbert: ok (bert)\n"
    with pytest.raises(RecipeError) as caught:
        run(app, "recipes", "check", str(good), str(bad))
    assert str(caught.value) == f"{bad}:3: sed: unknown key 'sed' (did you mean 'seed'?)"
    with pytest.raises(RecipeError) as caught:
        run(app, "recipes", "check", str(good), str(bad), str(worse))
    assert caught.value.what.startswith("2 of 3 recipes are not valid:\n")


def test_schema(app: typer.Typer) -> None:
    assert json.loads(run(app, "recipes", "schema")) == recipe_json_schema()


def test_targets_marks_this_host(app: typer.Typer) -> None:
    rows = json.loads(run(app, "targets", "--json"))
    assert [row["name"] for row in rows if row["host"]] == [detect_host().profile]
    assert "cpu-arm-dotprod" in run(app, "targets")


def test_doctor(app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFACCEL_CACHE", str(tmp_path / "not" / "yet"))
    report = json.loads(run(app, "doctor", "--json"))
    assert report["missing"]["base"] == []
    assert report["packages"]["base"]["onnxruntime"]
    assert "torch" in report["packages"]["compile"]
    assert report["cache"]["folder"] == str(tmp_path / "not" / "yet")
    assert report["cache"]["disk_free_bytes"] > 0
    assert "CPUExecutionProvider" in report["providers"]
    assert "host profile" in run(app, "doctor")

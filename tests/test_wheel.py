"""What a user installs: the code, the recipes and the packaged sample, and nothing of the tests."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Paths in a freshly built wheel."""
    wheel_builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed").WheelBuilder
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = wheel_builder(str(REPOSITORY)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_recipe_is_in_the_package(names: set[str]) -> None:
    expected = {f"hfaccel/_recipes/{path.name}" for path in (REPOSITORY / "recipes").iterdir()}
    assert "hfaccel/_recipes/encoder.yaml" in expected
    assert {name for name in names if name.startswith("hfaccel/_recipes/")} == expected


def test_every_module_and_the_sample_are_in_the_package(names: set[str]) -> None:
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "hfaccel").rglob("*.py")}
    assert modules <= names
    assert {f"hfaccel/evaluate/data/{name}.txt" for name in ("sample", "calibration", "passages")} <= names


def test_nothing_else_is_in_the_wheel(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"hfaccel"}
    assert [name for name in names if "test_" in name or "conftest" in name or name.endswith((".pyc", ".onnx"))] == []
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

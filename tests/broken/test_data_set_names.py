"""``--data`` with the name of a data set: what it gives, and what is said when it cannot be had."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfaccel.errors import DataError, ExitCode
from hfaccel.evaluate.dataset import Dataset, load_dataset
from hfaccel.evaluate.example import Example
from hfaccel.evaluate.readers import read_hub_rows


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    module = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local data set: its name is its path."""
    path = tmp_path / "reviews"
    path.mkdir()
    (path / "train.csv").write_text("text,label\nonly,YES\n", encoding="utf-8")
    (path / "test.csv").write_text("text,label\nword1,YES\nword2,NO\n", encoding="utf-8")
    return path


def load(spec: str) -> Dataset:
    return load_dataset(spec, task="text-classification", labels=("NO", "YES"), max_examples=10, seed=0)


def test_without_the_package_the_pip_install_is_named(
    tiny_checkpoint: Path, command_line: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    finished = command_line("compile", tiny_checkpoint, "-o", tmp_path / "out", "--data", "reviews.cvs")
    assert finished.code == ExitCode.SETTINGS
    assert finished.err == (
        "error: there is no file 'reviews.cvs', and a data set of that name needs the package 'datasets', which is not installed\n"
        "  what to do: run: pip install 'hfaccel[datasets]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_configuration_and_split(datasets: Any, folder: Path) -> None:
    assert load(f"{folder}:default:test").examples == (Example("word1", 1), Example("word2", 0))
    assert load(f"{folder}::train").examples == (Example("only", 1),)
    assert load(f"{folder}::test[:1]").examples == (Example("word1", 1),)


def test_class_ids_become_names(datasets: Any, tmp_path: Path) -> None:
    classes, tags = datasets.ClassLabel(names=["NO", "YES"]), datasets.ClassLabel(names=["O", "B-X"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes, "tags": datasets.List(tags)})
    rows = {"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], [1]]}
    (tmp_path / "classes").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "classes" / "test.parquet")
    found, names = read_hub_rows(str(tmp_path / "classes") + "::")
    assert names == {"label": ("NO", "YES"), "tags": ("O", "B-X")}
    assert found == [
        (1, {"text": "a", "label": "YES", "tags": ["O", "B-X"]}),
        (2, {"text": "b", "label": None, "tags": ["B-X"]}),  # -1 stands for no label
    ]


@pytest.mark.parametrize(
    ("rest", "text"),
    [
        (":default:dev", "the data set could not be loaded: Unknown split \"dev\". Should be one of ['train', 'test']"),
        (":large:test", "the data set could not be loaded: BuilderConfig 'large' not found"),
    ],
)
def test_wrong_configuration_or_split(rest: str, text: str, datasets: Any, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(f"{folder}{rest}")
    assert text in str(caught.value)
    assert "check name:config:split" in str(caught.value)


def test_a_data_set_that_is_nowhere(datasets: Any) -> None:
    with pytest.raises(DataError, match="could not be loaded") as caught:
        load("nobody/nothing")
    assert "if this is a file, check its path" in str(caught.value)

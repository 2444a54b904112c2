from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.artifact.contract import Contract, TextSettings
from hfaccel.artifact.store import StageCache
from hfaccel.cli.cache import cache_app
from hfaccel.errors import SettingsError, UsageError

CONTRACT = Contract("feature-extraction", (), (), TextSettings(max_length=8, pad_token_id=0))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three finished entries of 100 kB, the first one used longest ago."""
    monkeypatch.setenv("HFACCEL_CACHE", str(tmp_path))
    monkeypatch.setenv("HFACCEL_CACHE_LIMIT", "1GB")
    with StageCache(tmp_path) as store:
        for number, stage in enumerate(("export", "optimize", "fuse")):
            key = f"{number:064x}"
            with store.writing(key) as temporary:
                folder = temporary / "artifact"
                (folder / "model.onnx").write_bytes(bytes(100_000))
                artifact = Artifact(folder, "model.onnx", "fp32", CONTRACT, record_files(folder))
                store.write_record(temporary, artifact, {"stage": stage, "source": "tiny"})
            at = time.time() - 1000 + number
            os.utime(store.folder(key), (at, at))
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(cache_app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_show(cache: Path) -> None:
    report = json.loads(run("show", "--json"))
    assert [entry["stage"] for entry in report["entries"]] == ["export", "optimize", "fuse"]
    assert report["limit_bytes"] == 10**9
    assert report["size_bytes"] == sum(entry["size_bytes"] for entry in report["entries"]) > 300_000
    text = run("show")
    assert "optimize" in text
    assert f"{cache}: 3 entries, 0.00 GB of 1.00 GB" in text


def test_prune_keeps_what_was_used_last(cache: Path) -> None:
    assert json.loads(run("prune", "--json"))["removed"] == 0
    report = json.loads(run("prune", "--to", "150KB", "--json"))
    assert (report["removed"], report["left"]) == (2, 1)
    assert [entry["stage"] for entry in json.loads(run("show", "--json"))["entries"]] == ["fuse"]


def test_clear_leaves_what_a_running_compile_holds(cache: Path) -> None:
    with StageCache(cache) as running:
        assert running.get(f"{1:064x}") is not None
        result = CliRunner().invoke(cache_app, ["clear"], catch_exceptions=False)
        assert "2 entries deleted" in result.stdout
        assert "warning: 1 entries belong to running compiles" in result.stderr
    assert "1 entries deleted (0.00 GB), 0 left" in run("clear")


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFACCEL_CACHE", str(tmp_path / "none"))
    assert json.loads(run("show", "--json"))["entries"] == []
    assert json.loads(run("clear", "--json"))["removed"] == 0
    assert not (tmp_path / "none").exists()


def test_what_is_no_size_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as caught:
        run("prune", "--to", "small")
    assert str(caught.value) == "--to: 'small' is not a size (write for example 5GB)"
    monkeypatch.setenv("HFACCEL_CACHE_LIMIT", "big")
    with pytest.raises(SettingsError, match="HFACCEL_CACHE_LIMIT: 'big' is not a size"):
        run("show")

"""Doctor as a user of a bare install sees it: a fresh interpreter whose packages are only those the base install brings."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hfaccel
from hfaccel.cli.doctor import _fits

RUN = "import sys; sys.argv[0] = 'hfaccel'; from hfaccel.cli.app import main; main()"
Doctor = Callable[..., subprocess.CompletedProcess[str]]


def base_packages() -> set[str]:
    """Names of everything that ``pip install hfaccel`` brings, what its packages need included."""
    found: set[str] = set()
    waiting = ["hfaccel"]
    while waiting:
        for text in importlib.metadata.requires(waiting.pop()) or []:
            requirement = Requirement(text)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            name = canonicalize_name(requirement.name)
            if wanted and name not in found:
                found.add(name)
                waiting.append(name)
    return found


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages folder of links to the base install."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in base_packages():
        distribution = importlib.metadata.distribution(name)
        tops = {Path(file.parts[0]) for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    (folder / "hfaccel").symlink_to(Path(hfaccel.__file__).parent)
    information = folder / "hfaccel-0.dist-info"
    information.mkdir()
    metadata = importlib.metadata.distribution("hfaccel").read_text("METADATA")
    assert metadata is not None
    (information / "METADATA").write_text(metadata, encoding="utf-8")
    return folder


@pytest.fixture
def doctor(site: Path, tmp_path: Path) -> Doctor:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(site), "HFACCEL_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-S", "-c", RUN, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


def test_the_base_install_alone_is_fine(doctor: Doctor) -> None:
    process = doctor("doctor")
    assert process.returncode == 0, process.stderr
    assert "to compile models, run: pip install 'hfaccel[compile]'" in process.stdout
    assert "openvino: pip install 'hfaccel[openvino]'" in process.stdout
    report = json.loads(doctor("doctor", "--json").stdout)
    assert report["missing"]["base"] == []
    assert (bool(report["engines"]["onnxruntime"]), report["engines"]["openvino"]) == (True, None)
    assert {"torch", "transformers", "onnx"} <= set(report["missing"]["compile"])
    assert report["problems"]["base"] == {}
    assert report["commands"] == ["pip install 'hfaccel[compile]'"]
    compiling = doctor("compile", "nothing", "-o", "out")
    assert compiling.returncode == 3
    assert "pip install 'hfaccel[compile]'" in compiling.stderr


@pytest.mark.parametrize(
    ("package", "damage", "problem"),
    [
        ("onnxruntime", "raise ImportError('libgomp.so.1: cannot open shared object file')", "libgomp.so.1"),
        ("archspec", None, "archspec cannot be imported"),
    ],
)
def test_a_broken_base_package_is_named(doctor: Doctor, site: Path, package: str, damage: str | None, problem: str) -> None:
    (site / package).unlink()
    if damage is not None:
        (site / package).mkdir()
        (site / package / "__init__.py").write_text(damage, encoding="utf-8")
    process = doctor("doctor")
    assert process.returncode == 8
    assert problem in process.stderr
    assert "the base install is broken, run: pip install" in process.stderr
    assert "Traceback" not in process.stderr
    as_json = doctor("doctor", "--json")
    assert as_json.returncode == 8
    assert list(json.loads(as_json.stdout)["problems"]["base"]) == [package]


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.13.0+cpu", ">=2.13,<2.16", True),
        ("2.16.0", ">=2.13,<2.16", False),
        ("2.9", "<2.16,>=2.13", False),
        ("3.10", ">=3.10", True),
        ("5.23.0rc1", "<5.24,>=5.23", True),
        ("7", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, bounds: str, fits: bool) -> None:
    assert _fits(version, bounds) is fits

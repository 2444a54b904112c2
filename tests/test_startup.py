"""Start-up is user experience: --help and a bare import load none of the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "optimum", "scipy", "sklearn", "pyarrow")
REPORT = "import json, sys; print(json.dumps(sorted(sys.modules)))"
HELP = """
import sys
from hfaccel.cli.app import main
sys.argv = ["hfaccel", *{arguments!r}]
try:
    main()
except SystemExit as stop:
    assert stop.code in (0, None), stop.code
"""


def loaded_modules(code: str) -> set[str]:
    """Names in sys.modules after ``code`` ran in a fresh interpreter."""
    finished = subprocess.run([sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return set(json.loads(finished.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["compile", "--help"], ["run", "--help"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_modules(HELP.format(arguments=arguments)).isdisjoint(HEAVY)


def test_import_loads_nothing_heavy() -> None:
    assert loaded_modules("import hfaccel").isdisjoint(HEAVY)


def test_run_time_loads_no_compiler() -> None:
    assert loaded_modules("from hfaccel.runtime.load import load").isdisjoint({"torch", "transformers", "onnx", "optimum"})

"""The load test: open a finished folder as a serving team will, in a fresh process without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hfaccel.errors import IntegrityError, TargetError

TOLERANCE = 1e-4
TIMEOUT_S = 600

_LOAD_TEST = """
import json, sys, warnings
from pathlib import Path
import numpy
from hfaccel.runtime.engines import EngineFallbackWarning
from hfaccel.runtime.load import load
folder = Path(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", EngineFallbackWarning)
    model = load(folder)
fallback = [str(item.message) for item in caught if item.category is EngineFallbackWarning]
texts = json.loads((folder / "golden" / "inputs.json").read_text(encoding="utf-8"))
golden = numpy.load(folder / "golden" / "outputs.npz")
worst = 0.0
for index, outputs in enumerate(model.raw_outputs(texts)):
    for name, array in outputs.items():
        expected = golden[f"{index}/{name}"]
        scale = max(1.0, float(numpy.abs(expected).max()))
        worst = max(worst, float(numpy.abs(array - expected).max()) / scale)
heavy = sorted(set(sys.modules) & {"torch", "transformers", "onnx"})
print(json.dumps({"worst": worst, "heavy": heavy, "fallback": fallback}))
"""


def load_test(folder: Path) -> None:
    """Open the folder in a fresh process with the torch-free run time and compare its golden answers.

    Raises:
        IntegrityError: it does not open, answers otherwise, or needs torch.
        TargetError: its engine is not installed here, so its answers cannot be compared.
    """
    command = [sys.executable, "-c", _LOAD_TEST, str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if process.returncode != 0:
        last = (process.stderr.strip().splitlines() or ["no output"])[-1]
        raise IntegrityError(
            f"the finished folder does not open: {last}", where="load test", hint="report this with the output of --debug"
        )
    answer = json.loads(process.stdout.strip().splitlines()[-1])
    if answer["fallback"]:
        raise TargetError(
            f"golden answers hold for the engine that made them: {answer['fallback'][0]}",
            where="load test",
            hint="install the engine, or check the files alone with --no-golden",
        )
    if answer["heavy"]:
        raise IntegrityError(f"the run time imported {', '.join(answer['heavy'])}", where="load test")
    if not answer["worst"] <= TOLERANCE:
        raise IntegrityError(
            f"golden answers differ by {answer['worst']:.3g} (allowed {TOLERANCE:g})",
            where="load test",
            hint="the graph is not deterministic on this host; report it with report.md",
        )

"""What an artifact costs a process that does nothing else: time to load, time to the first answer, peak memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfaccel.errors import IntegrityError, ResourceError

_TIME_LIMIT_S = 300
_SCRIPT = """
import json, sys, time
started = time.perf_counter()
import hfaccel
from hfaccel.runtime.load import load
imported = time.perf_counter()
model = load(sys.argv[1])
loaded = time.perf_counter()
inputs = [tuple(item) if isinstance(item, list) else item for item in json.load(sys.stdin)]
asked = time.perf_counter()
model(inputs, max_batch=len(inputs))
answered = time.perf_counter()
from hfaccel.measure.memory import peak_memory_bytes
print(json.dumps({
    "import_ms": (imported - started) * 1000, "load_ms": (loaded - imported) * 1000,
    "first_answer_ms": (answered - asked) * 1000, "peak_memory_bytes": peak_memory_bytes(),
}))
"""


@dataclass(frozen=True)
class FreshProcess:
    """Medians over several fresh processes; files come from the page cache.

    Attributes:
        import_ms: importing the run time and its libraries.
        load_ms: opening the artifact.
        first_answer_ms: the first call, with all that is set up lazily.
        peak_memory_bytes: highest resident memory, libraries included.
    """

    import_ms: float
    load_ms: float
    first_answer_ms: float
    peak_memory_bytes: int


def measure_fresh_process(folder: Path, inputs: Sequence[Any], *, repeats: int = 3) -> FreshProcess:
    """Open an artifact in fresh processes and let each answer ``inputs`` once, as one batch.

    Args:
        folder: the artifact.
        inputs: texts or pairs of texts.
        repeats: processes to start, one after the other.

    Raises:
        IntegrityError: the artifact does not load or does not answer.
        ResourceError: a process did not finish in five minutes.
    """
    runs = [_run(folder, inputs) for _ in range(repeats)]
    return FreshProcess(
        import_ms=statistics.median(run["import_ms"] for run in runs),
        load_ms=statistics.median(run["load_ms"] for run in runs),
        first_answer_ms=statistics.median(run["first_answer_ms"] for run in runs),
        peak_memory_bytes=int(statistics.median(run["peak_memory_bytes"] for run in runs)),
    )


def _run(folder: Path, inputs: Sequence[Any]) -> dict[str, float]:
    command = [sys.executable, "-c", _SCRIPT, str(folder.resolve())]
    try:
        done = subprocess.run(
            command, input=json.dumps(list(inputs)), capture_output=True, text=True, timeout=_TIME_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            f"a fresh process did not load and answer within {_TIME_LIMIT_S} s",
            where=str(folder),
            hint="the machine may be short of memory, or kept busy by others",
        ) from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise IntegrityError(f"a fresh process cannot run it: {last}", where=str(folder), hint="check it with: hfaccel verify")
    numbers: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers

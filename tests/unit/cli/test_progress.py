"""Progress on a terminal (a real pseudo terminal) and in a log."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
from hfaccel.cli.output import Output
with Output().progress() as progress:
    progress.stage("export", 1, 5)
    progress.step("export ...")
    progress.warn("look [here]")
    progress.stage("quantize", 4, 5)
    progress.step("quantizing: [static]")
    progress.advance(2, 3)
    progress._bar and progress._bar.refresh()
print("result")
"""
LINES = ["export ...", "warning: look [here]", "quantizing: [static]"]


def test_a_log_gets_plain_lines() -> None:
    process = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert process.stdout == "result\n"
    assert [re.sub(r"^ *[0-9.]+s  ", "", line) for line in process.stderr.splitlines()] == LINES


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo terminals are of Unix")
def test_a_terminal_gets_a_bar_and_finished_lines() -> None:
    import pty

    controller, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=terminal, env=environment, text=True
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(controller)
    assert process.communicate()[0] == "result\n"
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"quantize 4/5 ━+.* 2 of 3 0:00:0\d quantizing: \[static\]", text), text
    # Finished lines carry the time; the warning came while the first stage ran.
    finished = [line for line in re.split(r"[\r\n]+", text) if re.match(r" +[0-9.]+s  ", line)]
    assert [re.sub(r"^ *[0-9.]+s  ", "", line).strip() for line in finished] == [LINES[0], LINES[2]]
    assert "warning: look [here]" in text

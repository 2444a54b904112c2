"""What README.md says is true: its generated tables are those of the code, and its commands run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
# Standing in for the user's time, not for the command: measure a moment only.
SHORT = ("--workload", "1x8", "--set", "measure.seconds_per_point=0.05")


def commands(program: str) -> list[str]:
    """Commands in blocks, indented or fenced, without their comments."""
    fenced = re.findall(r"^```(?:bash|sh|console|text)?\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    lines = [*re.findall(r"^ {4}(\S.*)$", TEXT, re.MULTILINE), *(line for block in fenced for line in block.splitlines())]
    return [line.split("  #")[0].strip() for line in lines if line.startswith(f"{program} ")]


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def tables() -> Any:
    spec = importlib.util.spec_from_file_location("readme_tables", REPOSITORY / "tests" / "readme_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_tables_are_up_to_date(tables: Any) -> None:
    assert tables.rewritten(TEXT) == TEXT, "the tables of README.md are out of date: run `make readme`"


def test_a_block_without_a_table_is_an_error(tables: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        tables.rewritten(TEXT.replace("generated: recipes", "generated: receipts"))


def test_make_targets_exist() -> None:
    named = {target for command in commands("make") for target in command.split()[1:]}
    named |= set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert {"setup", "demo", "test"} <= named
    assert named <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def test_paths_in_the_text_exist() -> None:
    named = set(re.findall(r"`((?:hfaccel|tests|recipes|\.ci)/[\w./-]*)`", TEXT))
    assert named
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


def test_commands_and_python_run_as_written(
    tiny_checkpoint: Path,
    tiny_data: Path,
    tiny_decoder: Path,
    tiny_whisper: Path,
    tiny_recordings: Path,
    command_line: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    shutil.copyfile(tiny_data, tmp_path / "test.csv")
    shutil.copytree(tiny_decoder, tmp_path / "chat-model")
    (tmp_path / "texts.txt").write_text("".join(f"{' '.join(f'word{n * k % 90}' for n in range(40))}\n" for k in range(1, 9)))
    shutil.copytree(tiny_whisper, tmp_path / "whisper")
    shutil.copytree(tiny_recordings.parent, tmp_path, dirs_exist_ok=True)
    shutil.copyfile(tmp_path / "0.wav", tmp_path / "talk.wav")
    monkeypatch.chdir(tmp_path)
    written = commands("hfaccel")
    assert [command.split()[1] for command in written][:2] == ["compile", "run"]
    for command in written:
        arguments = shlex.split(command)[1:]
        short = SHORT if arguments[1] == "./checkpoint" else ("--workload", "8+2", *SHORT[2:])
        finished = command_line(*arguments, *(short if arguments[0] == "compile" else ()))
        assert finished.code == 0, f"{command}\n{finished.err}"
    assert python_blocks()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    for block in python_blocks():
        names: dict[str, Any] = {}
        exec(compile(block, "README.md", "exec"), names)
        if "answers" in names:
            assert names["answers"]

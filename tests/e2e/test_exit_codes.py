"""Each exit code by the real command line, and what is left behind when a compile ends in the middle."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hfaccel.errors import ExitCode

FAST = ("--workload", "1x8", "--set", "measure.seconds_per_point=0.05")
STAGES = ("export", "optimize", "fuse", "quantize", "accuracy")
WRITING = "writing the artifact"
DISK_BYTES = 64_000_000
TIMEOUT_S = 120
# A process started in the background of a shell ignores SIGINT, and so would its children.
PROGRAM = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from hfaccel.cli.app import main; main()"

AtStep = Callable[[str, Callable[[], None]], None]
Snapshot = dict[str, bytes]


def content(folder: Path) -> Snapshot:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def compile_arguments(tiny_compiled: tuple[Path, Any], tiny_checkpoint: Path, tiny_data: Path) -> tuple[str | Path, ...]:
    """All stages of this command are in the cache of the session."""
    return ("compile", tiny_checkpoint, "--data", tiny_data, *FAST)


@pytest.fixture
def output(tiny_compiled: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """An artifact of an earlier run, alone in its folder."""
    folder = tmp_path / "shelf" / "out"
    shutil.copytree(tiny_compiled[0], folder)
    return folder


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> AtStep:
    """Do something when the progress on the terminal reaches the line that starts with a text."""
    from hfaccel.cli.output import TerminalProgress

    show = TerminalProgress.step

    def register(start: str, act: Callable[[], None]) -> None:
        def step(self: TerminalProgress, text: str) -> None:
            show(self, text)
            if text.startswith(start):
                act()

        monkeypatch.setattr(TerminalProgress, "step", step)

    return register


def press_ctrl_c() -> NoReturn:
    raise KeyboardInterrupt


def no_counter() -> NoReturn:
    raise RuntimeError("no such counter")


@pytest.mark.parametrize("code", [code for code in ExitCode if code is not ExitCode.BATCH], ids=lambda code: code.name.lower())
def test_every_exit_code_is_forced(
    code: ExitCode,
    compile_arguments: tuple[str | Path, ...],
    tiny_checkpoint: Path,
    command_line: Callable[..., Any],
    at_step: AtStep,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    decoder = tmp_path / "decoder"
    shutil.copytree(tiny_checkpoint, decoder)
    config = json.loads((decoder / "config.json").read_text(encoding="utf-8"))
    config.update(model_type="longt5", architectures=["LongT5ForConditionalGeneration"])
    (decoder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    out = tmp_path / "shelf" / "out"
    compiling = (*compile_arguments, "-o", out)
    commands: dict[ExitCode, tuple[str | Path, ...]] = {
        ExitCode.DONE: ("targets",),
        ExitCode.UNEXPECTED: compiling,
        ExitCode.USAGE: (*compiling, "--max-loss", "lots"),
        ExitCode.SETTINGS: (*compiling, "--recipe", "no-such-recipe"),
        ExitCode.SOURCE: ("compile", tmp_path / "nowhere", "-o", out),
        ExitCode.EXPORT: ("compile", decoder, "-o", out),
        ExitCode.GATE: (*compiling, "--strict", "--set", "fuse.contract={BiasGelu: '99'}"),
        ExitCode.RESOURCES: compiling,
        ExitCode.TARGET: (*compiling, "--target", "cpu-avx3"),
        ExitCode.INTEGRITY: ("verify", tmp_path),
        ExitCode.INTERRUPTED: compiling,
    }
    if code is ExitCode.UNEXPECTED:
        monkeypatch.setattr("hfaccel.request.available_memory_bytes", no_counter)
    elif code is ExitCode.RESOURCES:
        monkeypatch.setattr("hfaccel.request.available_memory_bytes", lambda: 1)
    elif code is ExitCode.INTERRUPTED:
        at_step(STAGES[0], press_ctrl_c)
    finished = command_line(*commands[code])
    assert finished.code == code, finished.err
    assert "Traceback" not in finished.err
    assert not out.exists()
    if code is not ExitCode.DONE:
        assert finished.out == ""
        assert finished.err.strip()


def test_unexpected_fault_says_how_to_see_the_traceback(
    compile_arguments: tuple[str | Path, ...],
    command_line: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    output: Path,
) -> None:
    monkeypatch.setattr("hfaccel.request.available_memory_bytes", no_counter)
    before = content(output)
    command = (*compile_arguments, "-o", output, "--force")
    finished = command_line(*command)
    assert finished.err == (
        "error: unexpected RuntimeError: no such counter\n  what to do: run again with --debug and report the traceback\n"
    )
    with_traceback = command_line(*command, "--debug")
    assert with_traceback.code == ExitCode.UNEXPECTED
    assert "Traceback (most recent call last)" in with_traceback.err
    assert "in no_counter" in with_traceback.err
    assert content(output) == before


def test_too_little_memory_is_said_before_a_weight_is_loaded(
    compile_arguments: tuple[str | Path, ...],
    command_line: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("hfaccel.request.available_memory_bytes", lambda: 200_000_000)
    monkeypatch.setenv("HFACCEL_CACHE", str(tmp_path / "cache"))
    finished = command_line(*compile_arguments, "-o", tmp_path / "shelf" / "out")
    assert finished.code == ExitCode.RESOURCES
    assert "GB of memory, 0.2 GB are available" in finished.err
    assert "what to do: close other programs or use a larger machine" in finished.err
    assert "export" not in finished.err
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "shelf").exists()


@pytest.mark.parametrize("moment", [WRITING, "export: unchanged"])
def test_ctrl_c_leaves_an_existing_output_alone(
    moment: str,
    compile_arguments: tuple[str | Path, ...],
    command_line: Callable[..., Any],
    at_step: AtStep,
    output: Path,
) -> None:
    before = content(output.parent)
    at_step(moment, press_ctrl_c)
    finished = command_line(*compile_arguments, "-o", output, "--force")
    assert finished.code == ExitCode.INTERRUPTED
    assert finished.err.endswith("interrupted; finished stages are kept, run the same command to go on\n")
    assert content(output.parent) == before


def test_full_disk_while_copying_leaves_an_existing_output_alone(
    compile_arguments: tuple[str | Path, ...],
    command_line: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    output: Path,
) -> None:
    copy, copied = shutil.copyfile, []

    def copy_three_files(source: Path, destination: Path, **options: Any) -> Path:
        if output.parent in Path(destination).parents:
            copied.append(destination)
            if len(copied) > 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination))
        return copy(source, destination, **options)

    before = content(output.parent)
    monkeypatch.setattr(shutil, "copyfile", copy_three_files)
    finished = command_line(*compile_arguments, "-o", output, "--force")
    assert finished.code == ExitCode.RESOURCES, finished.err
    assert f"error: {output}: the disk is full\n  what to do: free space, or point -o" in finished.err
    assert content(output.parent) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        yield folder
    finally:
        # Lazily: sessions that failed may still map a file.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, *, but_bytes: int) -> None:
    """What another program does at a bad moment."""
    with (disk / "of-another-program").open("wb") as stream:
        stream.write(bytes(max(0, shutil.disk_usage(disk).free - but_bytes)))


def test_disk_full_at_publication(
    compile_arguments: tuple[str | Path, ...],
    command_line: Callable[..., Any],
    at_step: AtStep,
    output: Path,
    small_disk: Path,
) -> None:
    on_disk = small_disk / "out"
    shutil.copytree(output, on_disk)
    before = content(on_disk)
    at_step(WRITING, lambda: fill(small_disk, but_bytes=150_000))
    finished = command_line(*compile_arguments, "-o", on_disk, "--force")
    assert finished.code == ExitCode.RESOURCES, finished.err
    assert f"error: {on_disk}: the disk is full\n  what to do: free space, or point -o" in finished.err
    assert content(on_disk) == before
    assert {path.name for path in small_disk.iterdir()} == {"out", "of-another-program"}


def test_disk_of_the_cache_full_in_every_stage(
    compile_arguments: tuple[str | Path, ...],
    command_line: Callable[..., Any],
    at_step: AtStep,
    monkeypatch: pytest.MonkeyPatch,
    output: Path,
    small_disk: Path,
) -> None:
    """Libraries of four languages write here; each has its own way not to say that the disk is full, or not to notice."""
    monkeypatch.setenv("HFACCEL_CACHE", str(small_disk / "cache"))
    before = content(output.parent)
    command = (*compile_arguments, "-o", output, "--force")
    room = {
        "export": (250_000,),
        "optimize": (70_000,),
        "fuse": (250_000,),
        "quantize": (350_000, 1_000_000),
        "accuracy": (70_000,),
    }
    for number, stage in enumerate(STAGES):
        for room_bytes in room[stage]:
            at_step(f"{stage} ", lambda room_bytes=room_bytes: fill(small_disk, but_bytes=room_bytes))  # type: ignore[misc]
            finished = command_line(*command)
            assert finished.code == ExitCode.RESOURCES, f"{stage} with {room_bytes} bytes: {finished.err}"
            assert f"error: {small_disk / 'cache'}" in finished.err
            assert "the disk is full\n  what to do: free space, or point" in finished.err
            (small_disk / "of-another-program").unlink()
            assert len(list((small_disk / "cache" / "stages").iterdir())) == number
        if stage != STAGES[-1]:
            at_step(f"{STAGES[number + 1]} ", press_ctrl_c)
            assert command_line(*command).code == ExitCode.INTERRUPTED
    assert content(output.parent) == before


def wait_for(stages: int, cache: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while len(finished_stages(cache)) < stages:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the stages take too long"
        time.sleep(0.02)


def finished_stages(cache: Path) -> list[str]:
    return [path.name for path in (cache / "stages").glob("[!.]*")]


def test_stopped_runs_are_taken_up_where_they_ended(
    compile_arguments: tuple[str | Path, ...],
    command_line: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    cache, shelf = tmp_path / "cache", tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("HFACCEL_CACHE", str(cache))
    arguments = [str(argument) for argument in (*compile_arguments, "-o", shelf / "out", "--json")]
    for stop, stages in ((signal.SIGINT, 1), (signal.SIGKILL, 3)):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            wait_for(stages, cache, process)
            process.send_signal(stop)
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
        assert process.returncode == (ExitCode.INTERRUPTED if stop == signal.SIGINT else -signal.SIGKILL), err
        assert out == ""
        assert "Traceback" not in err
        assert list(shelf.iterdir()) == []
    kept = len(finished_stages(cache))
    assert 3 <= kept < len(STAGES)
    finished = command_line(*arguments)
    assert finished.code == ExitCode.DONE, finished.err
    statuses = [record["status"] for record in json.loads(finished.out)["stages"]]
    assert statuses == ["cached"] * kept + ["done"] * (len(STAGES) - kept)
    assert [path.name for path in shelf.iterdir()] == ["out"]
    assert command_line("verify", shelf / "out").code == ExitCode.DONE


def test_ctrl_c_in_a_terminal_while_a_stage_runs_in_its_own_process(
    write_tokenizer: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    checkpoint, shelf = tmp_path / "large", tmp_path / "shelf"
    shelf.mkdir()
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=140_000, **sizes)).save_pretrained(checkpoint)
    write_tokenizer(checkpoint)
    monkeypatch.setenv("HFACCEL_CACHE", str(tmp_path / "cache"))
    arguments = [str(argument) for argument in ("compile", checkpoint, "-o", shelf / "out")]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("into torch" in line for line in lines)  # said by the process of the stage
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == ExitCode.INTERRUPTED
    assert err.endswith("interrupted; finished stages are kept, run the same command to go on\n")
    assert "Traceback" not in err
    assert list(shelf.iterdir()) == []

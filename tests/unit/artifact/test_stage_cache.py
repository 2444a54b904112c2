from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from hfaccel.artifact.artifact import Artifact, record_files
from hfaccel.artifact.cache_space import DEFAULT_LIMIT_BYTES, cache_limit_bytes, entries, parse_size, prune
from hfaccel.artifact.contract import Contract, TensorSpec, TextSettings
from hfaccel.artifact.store import CachedStage, StageCache, atomic_folder
from hfaccel.errors import SettingsError

TEXT = TextSettings(max_length=8, pad_token_id=0)
CONTRACT = Contract("feature-extraction", (TensorSpec("input_ids", "int64", ("batch", "sequence")),), (), TEXT)
PAYLOAD_BYTES = 1000


def key_of(number: int) -> str:
    return f"{number:064x}"


def write(cache: StageCache, number: int, content: bytes = b"x" * PAYLOAD_BYTES) -> None:
    with cache.writing(key_of(number)) as temporary:
        folder = temporary / "artifact"
        (folder / "model.onnx").write_bytes(content)
        artifact = Artifact(folder, "model.onnx", "fp32", CONTRACT, record_files(folder))
        cache.write_record(temporary, artifact, {"stage": "export", "number": number})


def age(cache: StageCache, number: int, seconds: float) -> None:
    at = time.time() - seconds
    os.utime(cache.folder(key_of(number)), (at, at))


def numbers(root: Path) -> list[int]:
    return [entry.record["number"] for entry in entries(root)]


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("123", 123), ("50GB", 50_000_000_000), ("1.5 tb", 1_500_000_000_000), ("2GiB", 2**31), ("10M", 10_000_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "-1GB", "5 XB", "1e9", "GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFACCEL_CACHE_LIMIT", raising=False)
    assert cache_limit_bytes() == DEFAULT_LIMIT_BYTES == 20_000_000_000
    monkeypatch.setenv("HFACCEL_CACHE_LIMIT", "2GB")
    assert cache_limit_bytes() == 2_000_000_000
    monkeypatch.setenv("HFACCEL_CACHE_LIMIT", "lots")
    with pytest.raises(SettingsError) as caught:
        cache_limit_bytes()
    assert str(caught.value) == "HFACCEL_CACHE_LIMIT: 'lots' is not a size (write for example 50GB)"


def test_the_least_recently_used_entry_goes_first(tmp_path: Path) -> None:
    with StageCache(tmp_path, limit_bytes=10**9) as cache:
        for number in range(4):
            write(cache, number)
            age(cache, number, 1000 - number)
    size = entries(tmp_path)[0].size_bytes
    with StageCache(tmp_path, limit_bytes=10**9) as cache:
        assert cache.get(key_of(0)) is not None  # used now, so it is the newest
    assert numbers(tmp_path) == [1, 2, 3, 0]
    assert [entry.record["number"] for entry in prune(tmp_path, 2 * size)] == [1, 2]
    assert numbers(tmp_path) == [3, 0]


def test_a_look_is_not_a_use(tmp_path: Path) -> None:
    with StageCache(tmp_path) as cache:
        write(cache, 1)
        age(cache, 1, 500)
    before = cache.folder(key_of(1)).stat().st_mtime
    assert StageCache(tmp_path).find(key_of(1)) is not None
    assert cache.folder(key_of(1)).stat().st_mtime == before
    assert not entries(tmp_path)[0].in_use


def test_a_run_keeps_its_own_entries_above_the_limit(tmp_path: Path) -> None:
    with StageCache(tmp_path, limit_bytes=10**9) as old:
        write(old, 0)
        age(old, 0, 100)
    with StageCache(tmp_path, limit_bytes=0) as cache:
        write(cache, 1)
        write(cache, 2)
        assert sorted(numbers(tmp_path)) == [1, 2]
        assert prune(tmp_path, 0) == []
        assert all(entry.in_use for entry in entries(tmp_path))
    assert len(prune(tmp_path, 0)) == 2
    assert list((tmp_path / "stages").iterdir()) == []


def test_what_a_dead_process_held_is_free(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_write_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert numbers(tmp_path) == [7]
    assert len(prune(tmp_path, 0)) == 1
    assert list((tmp_path / "in-use").iterdir()) == []


def _write_and_die(root: Path) -> None:
    write(StageCache(root), 7)
    os._exit(0)


def test_damaged_and_vanishing_entries_are_misses(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    write(cache, 1)
    (cache.folder(key_of(1)) / "artifact" / "model.onnx").write_bytes(b"short")
    assert cache.get(key_of(1)) is None
    write(cache, 1)
    assert isinstance(cache.get(key_of(1)), CachedStage)
    (cache.folder(key_of(1)) / "record.json").write_text("{")
    assert cache.get(key_of(1)) is None
    assert entries(tmp_path)[0].record == {}
    shutil.rmtree(cache.folder(key_of(1)))
    assert cache.get(key_of(1)) is None


def test_an_entry_that_another_run_made_meanwhile_stays(tmp_path: Path) -> None:
    first, second = StageCache(tmp_path), StageCache(tmp_path)
    with first.writing(key_of(1)) as temporary:
        write(second, 1, b"theirs")
        folder = temporary / "artifact"
        (folder / "model.onnx").write_bytes(b"ours")
        first.write_record(temporary, Artifact(folder, "model.onnx", "fp32", CONTRACT, record_files(folder)), {"number": 1})
    taken = first.take(key_of(1))
    assert taken is not None
    assert taken.artifact.graph_path.read_bytes() == b"theirs"


def test_without_cache_entries_are_made_anew_unless_in_use(tmp_path: Path) -> None:
    with StageCache(tmp_path) as first:
        write(first, 1, b"first")
        with StageCache(tmp_path, enabled=False) as second:
            assert second.get(key_of(1)) is None
            write(second, 1, b"second")
        assert (first.folder(key_of(1)) / "artifact" / "model.onnx").read_bytes() == b"first"
    with StageCache(tmp_path, enabled=False) as third:
        write(third, 1, b"third")
        taken = third.take(key_of(1))
        assert taken is not None
        assert taken.artifact.graph_path.read_bytes() == b"third"


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    cache = StageCache(tmp_path)
    with pytest.raises(RuntimeError), cache.writing(key_of(1)):
        raise RuntimeError
    assert list((tmp_path / "stages").iterdir()) == []


def test_leftovers_of_killed_runs_go_after_a_day(tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    for name, seconds in ((".a.tmp", 100_000), (".b.tmp", 60)):
        (stages / name).mkdir(parents=True)
        os.utime(stages / name, (time.time() - seconds,) * 2)
    prune(tmp_path, 10**9)
    assert [path.name for path in stages.iterdir()] == [".b.tmp"]


def _work(root: Path, seed: int, faults: multiprocessing.Queue[str]) -> None:
    """Many short runs over few keys with no space at all, so that each run deletes what the others have left."""
    try:
        for turn in range(25):
            with StageCache(root, enabled=(turn + seed) % 5 != 0, limit_bytes=0) as cache:
                for number in range(3):
                    if cache.get(key_of(number)) is None:
                        write(cache, number, bytes([seed]) * 100)
                    taken = cache.take(key_of(number))
                    assert taken is not None, "an entry in use was deleted"
                    content = taken.artifact.graph_path.read_bytes()
                    assert len(content) == 100
                    assert taken.artifact.files == record_files(taken.artifact.folder)
    except BaseException as error:
        faults.put(f"{type(error).__name__}: {error}")
        raise


def test_runs_at_the_same_time_do_not_break_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    faults: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_work, args=(tmp_path, seed, faults)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0], faults.get(timeout=5)


@pytest.mark.parametrize("replace", [False, True])
def test_an_output_folder_is_replaced_only_on_request(tmp_path: Path, replace: bool) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "file").write_text("old")
    with atomic_folder(output, replace=replace) as temporary:
        (temporary / "file").write_text("new")
    assert (output / "file").read_text() == ("new" if replace else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["file"]

"""Keeps the cache of stage results below a size limit, also when several processes share the cache.

A run names the entries it holds in a file under ``in-use/``; nobody deletes or replaces those. Naming, deleting and replacing
happen under one short lock; files are read and written outside of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hfaccel.errors import SettingsError

LIMIT_VARIABLE = "HFACCEL_CACHE_LIMIT"
DEFAULT_LIMIT_BYTES = 20_000_000_000
_DAY_S = 86_400.0
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?")
_STAGES, _IN_USE = "stages", "in-use"


@dataclass(frozen=True)
class CacheEntry:
    """One stage result in the cache.

    Attributes:
        key: name of its folder, 64 hex digits.
        record: what the stage recorded about its run; empty when that cannot be read.
        used_at: seconds since the epoch at its last use.
        in_use: a running compile holds it.
    """

    key: str
    folder: Path
    record: dict[str, Any]
    size_bytes: int
    used_at: float
    in_use: bool


def parse_size(text: str) -> int:
    """``50GB``, ``1.5 TB``, ``500 MiB`` or a plain number of bytes, in bytes.

    Raises:
        ValueError: anything else.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None:
        raise ValueError(f"{text!r} is not a size")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))


def cache_limit_bytes() -> int:
    """The limit that ``$HFACCEL_CACHE_LIMIT`` sets, 20 GB by default.

    Raises:
        SettingsError: the variable is not a size.
    """
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return DEFAULT_LIMIT_BYTES
    try:
        return parse_size(text)
    except ValueError as error:
        raise SettingsError(str(error), where=LIMIT_VARIABLE, hint="write for example 50GB") from None


def entries(root: Path) -> list[CacheEntry]:
    """The entries of a cache, least recently used first; one that another process removes meanwhile is left out."""
    held = held_keys(root)
    found = []
    for folder in _subfolders(root / _STAGES):
        if folder.name.startswith("."):
            continue
        try:
            used_at, size_bytes = folder.stat().st_mtime, folder_bytes(folder)
        except FileNotFoundError:
            continue
        found.append(CacheEntry(folder.name, folder, _record(folder), size_bytes, used_at, folder.name in held))
    return sorted(found, key=lambda entry: entry.used_at)


def prune(root: Path, limit_bytes: int) -> list[CacheEntry]:
    """Delete the least recently used entries until all together fit the limit; entries in use stay, whatever the limit.

    Folders that a killed run left half-written are deleted too, a day later.

    Returns:
        what was deleted.
    """
    _remove_leftovers(root)
    if sum(entry.size_bytes for entry in entries(root)) <= limit_bytes:
        return []
    removed, asides = [], []
    with locked(root):
        found = entries(root)
        total = sum(entry.size_bytes for entry in found)
        for entry in found:
            if total <= limit_bytes:
                break
            aside = None if entry.in_use else _move_aside(entry.folder)
            if aside is not None:
                asides.append(aside)
                removed.append(entry)
                total -= entry.size_bytes
    for aside in asides:
        shutil.rmtree(aside, ignore_errors=True)
    return removed


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Only one process at a time is inside; the lock goes when its holder ends, however it ends."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("a") as stream:
        with suppress(OSError):  # a file system without locks: two runs at the same moment are rare enough there
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK, 1)
            else:
                import fcntl

                fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class Hold:
    """The entries that one run uses, written down where other processes look before they delete.

    Args:
        root: the cache folder.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / _IN_USE / f"{uuid.uuid4().hex}.json"
        self._keys: set[str] = set()

    def add(self, key: str) -> None:
        """From now on nobody deletes the entry of ``key``."""
        self._keys.add(key)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        content = {"host": socket.gethostname(), "pid": os.getpid(), "keys": sorted(self._keys)}
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self._path)

    def release(self) -> None:
        """The run is over."""
        self._keys.clear()
        self._path.unlink(missing_ok=True)


def held_keys(root: Path, *, but: Hold | None = None) -> set[str]:
    """Keys of the entries that running compiles hold, without those of ``but``; what ended processes held is forgotten."""
    keys: set[str] = set()
    for path in (root / _IN_USE).glob("*.json"):
        if but is not None and path == but._path:
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if _is_running(content, path.stat().st_mtime):
                keys.update(content["keys"])
            else:
                path.unlink(missing_ok=True)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another process has just released it
    return keys


def _move_aside(folder: Path) -> Path | None:
    """Take a folder out of its place at once, so that its files can go at leisure; None when it cannot be moved."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.old")
    try:
        return folder.rename(aside)
    except OSError:  # it is gone, or belongs to another user
        return None


def folder_bytes(folder: Path) -> int:
    """Sizes of all files below a folder; files that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _remove_leftovers(root: Path) -> None:
    for folder in _subfolders(root / _STAGES):
        try:
            abandoned = folder.name.startswith(".") and time.time() - folder.stat().st_mtime > _DAY_S
        except FileNotFoundError:
            continue
        if abandoned:
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(content: dict[str, Any], written_at: float) -> bool:
    """Whether the process that wrote this still runs; on another host only the age can tell."""
    if content["host"] != socket.gethostname():
        return time.time() - written_at < _DAY_S
    return bool(psutil.pid_exists(int(content["pid"])))


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))["record"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return record if isinstance(record, dict) else {}


def _subfolders(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        return

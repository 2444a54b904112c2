"""Folders that appear whole or not at all, and the content-addressed cache of stage results built on them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfaccel.artifact.artifact import Artifact
from hfaccel.artifact.cache_space import Hold, cache_limit_bytes, held_keys, locked, prune
from hfaccel.errors import HfaccelError, ResourceError, SettingsError

_FULL = re.compile(r"No space left on device|\d+ requested and \d+ written|problem writing element \d+ to file")
_FULL_BELOW_BYTES = 65_536


def default_cache_folder() -> Path:
    """``$HFACCEL_CACHE`` or ``~/.cache/hfaccel``."""
    named = os.environ.get("HFACCEL_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "hfaccel"


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn what the disk says into errors with advice: full, read-only, not allowed."""
    try:
        yield
    except HfaccelError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise SettingsError(
                f"cannot write here: {error.strerror}", where=str(where), hint="choose a folder that you may write to"
            ) from error
        if _says_full(error) or _is_full(where):
            raise ResourceError(
                "the disk is full", where=str(where), hint="free space, or point -o and HFACCEL_CACHE elsewhere"
            ) from error
        raise


def _says_full(error: Exception) -> bool:
    """Whether an error means that no space was left; numpy and the libraries in C++ and Rust drop the error number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return _FULL.search(str(error)) is not None


def _is_full(where: Path) -> bool:
    """Whether the disk has no room now: some libraries do not notice and fail later, when they read what they wrote."""
    try:
        place = next(folder for folder in (where, *where.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(place).free < _FULL_BELOW_BYTES
    except OSError:
        return False


@contextmanager
def atomic_folder(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write into a temporary sibling that takes the destination's place at the end; on any error nothing is left.

    Args:
        destination: the folder to make.
        replace: an existing folder is replaced, at the very end; otherwise it is kept and what was written is dropped.
    """
    with disk_errors(destination), _temporary_sibling(destination) as temporary:
        yield temporary
        _put(temporary, destination, replace=replace)


@contextmanager
def _temporary_sibling(destination: Path) -> Iterator[Path]:
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, destination: Path, *, replace: bool) -> None:
    if destination.exists() and not replace:
        return
    old = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:12]}.old")
    if destination.exists():
        destination.rename(old)
    try:
        temporary.rename(destination)
    except OSError:
        if old.exists():
            old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class CachedStage:
    """A stage result found in the cache."""

    artifact: Artifact
    record: dict[str, Any]


class StageCache:
    """Results of finished stages by key. A stage that failed leaves nothing, so a failure is never replayed.

    Entries that it has given out or written stay until :meth:`close` (or the end of a ``with`` block), or until the process ends.

    Args:
        root: cache folder; entries are ``root/stages/<64 hex digits>``.
        enabled: with False nothing is read (results are still written, the stages that follow need them).
        limit_bytes: the least recently used entries are deleted above it; None takes ``$HFACCEL_CACHE_LIMIT`` or 20 GB.
    """

    def __init__(self, root: Path, *, enabled: bool = True, limit_bytes: int | None = None) -> None:
        self.root = root
        self.enabled = enabled
        self.limit_bytes = cache_limit_bytes() if limit_bytes is None else limit_bytes
        self._hold = Hold(root)

    def __enter__(self) -> StageCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the run: its entries may be deleted from now on."""
        self._hold.release()

    def folder(self, key: str) -> Path:
        """Where the entry of ``key`` lies or will lie."""
        return self.root / "stages" / key

    def find(self, key: str) -> CachedStage | None:
        """The entry of ``key`` if it is whole (every file there with its size), else None; it does not count as a use."""
        folder = self.folder(key)
        try:
            data = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            artifact = Artifact.from_json(data["artifact"], folder / "artifact")
            whole = all((artifact.folder / file.path).stat().st_size == file.size_bytes for file in artifact.files)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return CachedStage(artifact, data["record"]) if whole else None

    def get(self, key: str) -> CachedStage | None:
        """The entry of ``key`` for use by this run; None when there is none or the cache is not to be read."""
        return self.take(key) if self.enabled else None

    def take(self, key: str) -> CachedStage | None:
        """The entry of ``key`` for use by this run, also when nothing is read from earlier runs: what this run has written."""
        with disk_errors(self.root), locked(self.root):
            self._hold.add(key)
            found = self.find(key)
        if found is not None:
            with suppress(OSError):  # gone, or a cache that may only be read
                os.utime(self.folder(key))
        return found

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A temporary entry; it becomes the entry of ``key`` when the block ends without an error.

        When another process has finished the same entry meanwhile, that one stays and this one is dropped, because the other
        process reads from it: call :meth:`take` afterwards.
        """
        destination = self.folder(key)
        with disk_errors(destination):
            with _temporary_sibling(destination) as temporary:
                (temporary / "artifact").mkdir()
                yield temporary
                with locked(self.root):
                    keep_theirs = self.find(key) is not None and (self.enabled or key in held_keys(self.root, but=self._hold))
                    _put(temporary, destination, replace=not keep_theirs)
                    self._hold.add(key)
            prune(self.root, self.limit_bytes)

    @staticmethod
    def write_record(temporary: Path, artifact: Artifact, record: dict[str, Any]) -> None:
        """Complete a temporary entry; the last write before it is renamed into place."""
        data = {"artifact": artifact.to_json(), "record": record}
        (temporary / "record.json").write_text(json.dumps(data, indent=2), encoding="utf-8")

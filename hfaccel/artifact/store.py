"""Folders that appear whole or not at all, and the content-addressed cache of stage results built on them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfaccel.artifact.artifact import Artifact
from hfaccel.errors import ResourceError, SettingsError


def default_cache_folder() -> Path:
    """``$HFACCEL_CACHE`` or ``~/.cache/hfaccel``."""
    return Path(os.environ.get("HFACCEL_CACHE") or Path.home() / ".cache" / "hfaccel")


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn what the disk says into errors with advice: full, read-only, not allowed."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                "the disk is full", where=str(where), hint="free space, or point -o and HFACCEL_CACHE elsewhere"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise SettingsError(
                f"cannot write here: {error.strerror}", where=str(where), hint="choose a folder that you may write to"
            ) from error
        raise


@contextmanager
def atomic_folder(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write into a temporary sibling that takes the destination's place at the end; on any error nothing is left.

    Args:
        destination: the folder to make.
        replace: an existing folder is replaced, at the very end; otherwise it is kept and what was written is dropped.
    """
    with disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:12]}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            _rename(temporary, destination, replace=replace)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, destination: Path, *, replace: bool) -> None:
    if destination.exists() and replace:
        old = destination.with_name(f".{destination.name}.{uuid.uuid4().hex[:12]}.old")
        destination.rename(old)
        temporary.rename(destination)
        shutil.rmtree(old, ignore_errors=True)
    elif not destination.exists():
        temporary.rename(destination)


@dataclass(frozen=True)
class CachedStage:
    """A stage result found in the cache."""

    artifact: Artifact
    record: dict[str, Any]


class StageCache:
    """Results of finished stages by key. A stage that failed leaves nothing, so a failure is never replayed.

    Args:
        root: cache folder; entries are ``root/stages/<64 hex digits>``.
        enabled: with False nothing is read (results are still written, the stages that follow need them).
    """

    def __init__(self, root: Path, *, enabled: bool = True) -> None:
        self.root = root
        self.enabled = enabled

    def folder(self, key: str) -> Path:
        """Where the entry of ``key`` lies or will lie."""
        return self.root / "stages" / key

    def get(self, key: str) -> CachedStage | None:
        """The entry of ``key`` if it is whole (every file there with its size), else None."""
        folder = self.folder(key)
        try:
            data = json.loads((folder / "record.json").read_text(encoding="utf-8"))
            artifact = Artifact.from_json(data["artifact"], folder / "artifact")
            whole = all((artifact.folder / file.path).stat().st_size == file.size_bytes for file in artifact.files)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not whole or not self.enabled:
            return None
        return CachedStage(artifact, data["record"])

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """A temporary entry; it becomes the entry of ``key`` when the block ends without an error."""
        with atomic_folder(self.folder(key), replace=True) as temporary:
            (temporary / "artifact").mkdir()
            yield temporary

    @staticmethod
    def write_record(temporary: Path, artifact: Artifact, record: dict[str, Any]) -> None:
        """Complete a temporary entry; the last write before it is renamed into place."""
        data = {"artifact": artifact.to_json(), "record": record}
        (temporary / "record.json").write_text(json.dumps(data, indent=2), encoding="utf-8")

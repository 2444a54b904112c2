"""``manifest.json``: what an artifact is, how it came about, and the hash of each of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfaccel.artifact.artifact import sha256_of
from hfaccel.errors import IntegrityError

FILE_NAME = "manifest.json"
FORMAT_REVISION = 1


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a compiled folder.

    Raises:
        IntegrityError: there is none, it is not JSON, or its format is newer than this version knows.
    """
    path = folder / FILE_NAME
    again = "copy the folder again, or compile again with --force"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        what = f"no {FILE_NAME} here: this is not a compiled artifact" if folder.is_dir() else "there is no such folder"
        raise IntegrityError(what, where=str(folder), hint="make one with: hfaccel compile MODEL -o OUT") from None
    except (OSError, ValueError) as error:
        raise IntegrityError(f"the manifest cannot be read: {error}", where=str(path), hint=again) from error
    if not isinstance(data, dict):
        raise IntegrityError("the manifest is not a JSON object", where=str(path), hint=again)
    if not isinstance(data.get("format_revision"), int):
        raise IntegrityError("the manifest has no format_revision", where=str(path), hint=again)
    if data["format_revision"] > FORMAT_REVISION:
        raise IntegrityError(
            f"the manifest has format revision {data['format_revision']}, this hfaccel reads up to {FORMAT_REVISION}",
            where=str(path),
            hint="update hfaccel: pip install -U hfaccel",
        )
    return data


def write_manifest(folder: Path, data: dict[str, Any]) -> None:
    """Write the manifest; keys in the order given, so that a person can read it from the top."""
    text = json.dumps({"format_revision": FORMAT_REVISION, **data}, indent=2, ensure_ascii=False)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def verify_files(folder: Path) -> list[str]:
    """Compare every file with the manifest; one line per file that is missing, changed or not listed."""
    problems = []
    listed = {FILE_NAME}
    for record in read_manifest(folder)["files"]:
        path = folder / record["path"]
        listed.add(record["path"])
        if not path.is_file():
            problems.append(f"{record['path']}: missing")
        elif path.stat().st_size != record["size_bytes"]:
            problems.append(f"{record['path']}: {path.stat().st_size} bytes, the manifest says {record['size_bytes']}")
        elif sha256_of(path) != record["sha256"]:
            problems.append(f"{record['path']}: content changed (sha256 differs)")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in listed:
            problems.append(f"{name}: not listed in the manifest")
    return problems

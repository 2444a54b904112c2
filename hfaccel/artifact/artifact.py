"""A frozen description of a folder on disk: what a stage takes and gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfaccel.artifact.contract import Contract, Precision

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact; ``path`` is relative to the artifact's folder, with forward slashes."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """What a stage hands on. The folder is never edited once this object exists.

    Attributes:
        folder: where the files are.
        graph: file name of the ONNX graph inside the folder.
        precision: lowest precision that the graph computes in.
        contract: inputs, outputs, task.
        files: every file of the folder, sorted by path.
    """

    folder: Path
    graph: str
    precision: Precision
    contract: Contract
    files: tuple[FileRecord, ...]

    @property
    def graph_path(self) -> Path:
        """Absolute path of the ONNX graph."""
        return self.folder / self.graph

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(record.size_bytes for record in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 over contents, contract and precision; independent of where the folder lies."""
        payload = {
            "files": [asdict(record) for record in self.files],
            "graph": self.graph,
            "precision": self.precision,
            "contract": self.contract.to_json(),
        }
        return digest_of(payload)

    def to_json(self) -> dict[str, Any]:
        """Everything but the folder, as plain JSON types."""
        return {
            "graph": self.graph,
            "precision": self.precision,
            "contract": self.contract.to_json(),
            "files": [asdict(record) for record in self.files],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], folder: Path) -> Artifact:
        """The inverse of :meth:`to_json` for a folder."""
        return cls(
            folder=folder,
            graph=data["graph"],
            precision=data["precision"],
            contract=Contract.from_json(data["contract"]),
            files=tuple(FileRecord(**record) for record in data["files"]),
        )


def digest_of(data: Any) -> str:
    """SHA-256 of the canonical JSON form of plain data."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, streamed."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def record_files(folder: Path, *, skip: Iterable[str] = ()) -> tuple[FileRecord, ...]:
    """Size and hash of every file below ``folder`` except the relative paths in ``skip``, sorted by path."""
    left_out = set(skip)
    records = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in left_out:
            records.append(FileRecord(name, path.stat().st_size, sha256_of(path)))
    return tuple(records)

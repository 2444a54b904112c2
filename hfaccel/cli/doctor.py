"""``hfaccel doctor``: what this machine and this installation can do."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hfaccel.cli.output import Output
from hfaccel.errors import SettingsError

_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")
_GIB = 2**30


def doctor(json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False) -> None:
    """Check this machine and this installation: CPU, memory, disk, libraries, execution providers.

    Exit code 0 when the base install is complete. Example: hfaccel doctor
    """
    from hfaccel.recipe.targets import detect_host

    output = Output(as_json=json)
    groups = {name: _versions(name) for name in ("base", "compile")}
    missing = {name: [package for package, version in group.items() if version is None] for name, group in groups.items()}
    # Base packages that are missing make the rest of this report impossible.
    if missing["base"]:
        raise SettingsError(
            f"the base install is not complete, missing: {', '.join(missing['base'])}", hint="run: pip install hfaccel"
        )
    host = detect_host()
    cache = _cache_folder()
    disk_free_bytes = shutil.disk_usage(_existing_parent(cache)).free
    providers = _providers()
    commands = ["pip install 'hfaccel[compile]'"] if missing["compile"] else []

    output.line(f"host profile   {host.profile}")
    output.line(
        f"cpu            {host.brand} ({host.microarchitecture}), {host.physical_cores} cores, {host.logical_cores} threads"
    )
    output.line(f"memory         {host.memory_bytes / _GIB:.1f} GiB")
    output.line(f"cache folder   {cache}, {disk_free_bytes / _GIB:.1f} GiB free")
    output.line(f"system         {host.os}, Python {host.python}")
    output.line(f"providers      {', '.join(providers)}")
    rows = [(name, package, version or "missing") for name, group in groups.items() for package, version in group.items()]
    output.table("", ("install", "package", "version"), rows)
    for command in commands:
        output.line(f"to compile models, run: {command}")
    output.result(
        {
            "host": asdict(host),
            "cache": {"folder": str(cache), "disk_free_bytes": disk_free_bytes},
            "providers": providers,
            "packages": groups,
            "missing": missing,
            "commands": commands,
        }
    )


def _versions(group: str) -> dict[str, str | None]:
    """Package -> installed version (None: missing) of the base install or of an extra."""
    versions: dict[str, str | None] = {}
    for requirement in importlib.metadata.requires("hfaccel") or []:
        name = _REQUIREMENT.match(requirement)
        extra = _EXTRA.search(requirement)
        if name is None or (extra.group(1) if extra else "base") != group:
            continue
        try:
            versions[name.group(1)] = importlib.metadata.version(name.group(1))
        except importlib.metadata.PackageNotFoundError:
            versions[name.group(1)] = None
    return dict(sorted(versions.items()))


def _cache_folder() -> Path:
    named = os.environ.get("HFACCEL_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "hfaccel"


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())

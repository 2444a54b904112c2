"""``hfaccel doctor``: what this machine and this installation can do."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfaccel.cli.output import Output
from hfaccel.errors import ExitCode

if TYPE_CHECKING:
    from hfaccel.recipe.targets import HostInfo

_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)\s*([^;]*)")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")
_BOUND = re.compile(r"(>=|<)\s*([0-9.]+)")
_MODULES = {"pyyaml": "yaml"}
"""Modules of the base install whose name differs from that of their package."""
_GIB = 2**30
_INSTALL = {"base": "pip install --upgrade --force-reinstall hfaccel", "compile": "pip install 'hfaccel[compile]'"}


@dataclass(frozen=True)
class _Package:
    """A package that hfaccel asks for; ``problem`` is empty when it is there and fits."""

    name: str
    version: str | None
    problem: str


def doctor(json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False) -> None:
    """Check this machine and this installation: CPU, memory, disk, libraries, execution providers.

    Exit code 0 when all that the base install needs works, 8 when not. The packages that compiling needs may be absent.

    Example: hfaccel doctor
    """
    output = Output(as_json=json)
    groups = {"base": [_imported(package) for package in _packages("base")], "compile": _packages("compile")}
    problems = {name: {package.name: package.problem for package in group if package.problem} for name, group in groups.items()}
    if not groups["base"]:
        problems["base"]["hfaccel"] = "is not installed as a package"
    commands = [_INSTALL[name] for name, found in problems.items() if found]
    # With a broken package the machine cannot be looked at, but what is broken can still be said.
    machine = {} if problems["base"] else _machine(output)
    rows = [(name, package.name, package.version or "", package.problem) for name, group in groups.items() for package in group]
    output.table("", ("install", "package", "version", "problem"), rows)
    if problems["compile"]:
        output.line(f"to compile models, run: {_INSTALL['compile']}")
    output.result(
        {
            **machine,
            "packages": {name: {package.name: package.version for package in group} for name, group in groups.items()},
            "missing": {name: [package.name for package in group if package.version is None] for name, group in groups.items()},
            "problems": problems,
            "commands": commands,
        }
    )
    if problems["base"]:
        for name, problem in problems["base"].items():
            output.warn(f"{name} {problem}")
        output.info(f"the base install is broken, run: {_INSTALL['base']}")
        raise typer.Exit(ExitCode.TARGET)


def _machine(output: Output) -> dict[str, Any]:
    import onnxruntime

    from hfaccel.artifact.contract import ENGINES
    from hfaccel.artifact.store import default_cache_folder
    from hfaccel.measure.host import library_versions
    from hfaccel.recipe.targets import detect_host
    from hfaccel.runtime.cores import cpu_quota

    host, cache, providers = detect_host(), default_cache_folder(), list(onnxruntime.get_available_providers())
    free_bytes = shutil.disk_usage(_existing_parent(cache)).free
    engines = {name: None if version == "absent" else version for name, version in library_versions(ENGINES).items()}
    quota = cpu_quota()
    _show(output, host, quota, f"{cache}, {free_bytes / _GIB:.1f} GiB free", providers)
    told = (f"{name} {version}" if version else f"{name}: pip install 'hfaccel[{name}]'" for name, version in engines.items())
    output.line(f"engines        {', '.join(told)}")
    return {
        "host": asdict(host),
        "cpu_limit_cores": quota,
        "cache": {"folder": str(cache), "disk_free_bytes": free_bytes},
        "providers": providers,
        "engines": engines,
    }


def _show(output: Output, host: HostInfo, quota: float | None, cache: str, providers: list[str]) -> None:
    limit = "" if quota is None else f", of which a limit leaves the time of {quota:.3g}"
    cores = f"{host.physical_cores} cores, {host.logical_cores} threads{limit}"
    output.line(f"host profile   {host.profile}")
    output.line(f"cpu            {host.brand} ({host.microarchitecture}), {cores}")
    output.line(f"memory         {host.memory_bytes / _GIB:.1f} GiB")
    output.line(f"cache folder   {cache}")
    output.line(f"system         {host.os}, Python {host.python}")
    output.line(f"providers      {', '.join(providers)}")


def _packages(group: str) -> list[_Package]:
    """The packages of the base install or of an extra, by name."""
    try:
        requirements = importlib.metadata.requires("hfaccel") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in requirements:
        match, extra = _REQUIREMENT.match(requirement), _EXTRA.search(requirement)
        if match is None or (extra.group(1) if extra else "base") != group:
            continue
        name, bounds = match.groups()
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(_Package(name, None, "missing"))
            continue
        found.append(_Package(name, version, "" if _fits(version, bounds) else f"does not fit {bounds.strip()}"))
    return sorted(found, key=lambda package: package.name)


def _imported(package: _Package) -> _Package:
    """The package with the problem that importing it shows: a file may be there and its system library not."""
    if package.problem:
        return package
    try:
        importlib.import_module(_MODULES.get(package.name, package.name))
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return _Package(package.name, package.version, f"cannot be imported: {type(error).__name__}: {text[0]}")
    return package


def _fits(version: str, bounds: str) -> bool:
    number = _number(version)
    return all((number >= _number(bound)) == (sign == ">=") for sign, bound in _BOUND.findall(bounds))


def _number(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, without trailing zeros: 2.13.0+cpu is (2, 13)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(part) for part in match.group().split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder

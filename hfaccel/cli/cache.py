"""``hfaccel cache``: what the stage results of earlier runs take, and deleting them."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfaccel.cli.output import Output
from hfaccel.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfaccel.artifact.cache_space import CacheEntry

cache_app = typer.Typer(help="Show and shrink the cache of stage results.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@cache_app.command("show")
def show(json: JsonOption = False) -> None:
    """Show the entries, least recently used first, their size and the limit.

    HFACCEL_CACHE names the folder, HFACCEL_CACHE_LIMIT the limit (20GB if not set).

    Example: hfaccel cache show
    """
    from hfaccel.artifact.cache_space import cache_limit_bytes, entries
    from hfaccel.artifact.store import default_cache_folder

    output = Output(as_json=json)
    folder, limit_bytes = default_cache_folder(), cache_limit_bytes()
    found = entries(folder)
    size_bytes = _total(found)
    rows = [
        (
            entry.key[:12],
            entry.record.get("stage", ""),
            entry.record.get("source", ""),
            f"{entry.size_bytes / 1e6:.1f}",
            datetime.datetime.fromtimestamp(entry.used_at).isoformat(" ", "minutes"),
            "yes" if entry.in_use else "",
        )
        for entry in found
    ]
    output.table("", ("entry", "stage", "model", "MB", "last used", "in use"), rows)
    output.line(f"{folder}: {len(found)} entries, {size_bytes / 1e9:.2f} GB of {limit_bytes / 1e9:.2f} GB")
    output.result(
        {
            "folder": str(folder),
            "size_bytes": size_bytes,
            "limit_bytes": limit_bytes,
            "entries": [
                {
                    "key": entry.key,
                    "stage": entry.record.get("stage"),
                    "model": entry.record.get("source"),
                    "size_bytes": entry.size_bytes,
                    "used_at": datetime.datetime.fromtimestamp(entry.used_at, datetime.UTC).isoformat(timespec="seconds"),
                    "in_use": entry.in_use,
                }
                for entry in found
            ],
        }
    )


@cache_app.command("prune")
def prune_command(
    to: Annotated[str | None, typer.Option(help="Size to shrink to, e.g. 5GB; by default the limit.")] = None,
    json: JsonOption = False,
) -> None:
    """Delete the least recently used entries until the rest fits. Entries of running compiles stay.

    Examples:
      hfaccel cache prune
      hfaccel cache prune --to 5GB
    """
    from hfaccel.artifact.cache_space import cache_limit_bytes, parse_size

    try:
        limit_bytes = cache_limit_bytes() if to is None else parse_size(to)
    except ValueError as error:
        raise UsageError(str(error), where="--to", hint="write for example 5GB") from None
    _shrink(limit_bytes, Output(as_json=json))


@cache_app.command("clear")
def clear(json: JsonOption = False) -> None:
    """Delete all entries but those of running compiles. The next compile does all its work again.

    Example: hfaccel cache clear
    """
    _shrink(0, Output(as_json=json))


def _shrink(limit_bytes: int, output: Output) -> None:
    from hfaccel.artifact.cache_space import entries, prune
    from hfaccel.artifact.store import default_cache_folder, disk_errors

    folder = default_cache_folder()
    with disk_errors(folder):
        removed = prune(folder, limit_bytes) if folder.is_dir() else []
    left = entries(folder)
    result: dict[str, Any] = {
        "folder": str(folder),
        "removed": len(removed),
        "removed_bytes": _total(removed),
        "left": len(left),
        "left_bytes": _total(left),
        "in_use": sum(entry.in_use for entry in left),
    }
    output.result(result)
    output.line(
        f"{folder}: {len(removed)} entries deleted ({_total(removed) / 1e9:.2f} GB), {len(left)} left ({_total(left) / 1e9:.2f} GB)"
    )
    if _total(left) > limit_bytes:
        output.warn(f"{result['in_use']} entries belong to running compiles; the others that stayed could not be deleted")


def _total(found: Sequence[CacheEntry]) -> int:
    return sum(entry.size_bytes for entry in found)

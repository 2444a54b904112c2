"""The float graphs that a compiled folder was made from, as far as the stage cache still holds them: steps of a ladder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hfaccel.artifact.store import StageCache, default_cache_folder
from hfaccel.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.artifact.artifact import Artifact

EXPORT, FUSE = "export", "fuse"


@contextmanager
def cached_stages(manifest: Mapping[str, Any], cache_folder: Path | None = None) -> Iterator[dict[str, Artifact]]:
    """Results of the stages by name; they stay in the cache as long as the ``with`` block.

    Args:
        manifest: of the compiled folder; its records name the keys of the stages.
        cache_folder: default: the one that ``hfaccel compile`` uses.

    Yields:
        Those that the cache holds whole; stages that were skipped or were deleted since are not among them.
    """
    root = default_cache_folder() if cache_folder is None else cache_folder
    keys = {str(record["stage"]): str(record["key"]) for record in manifest.get("stages", ())}
    with StageCache(root) as cache:
        # Looked for before it is taken, so that a cache that was never made is not made for nothing.
        present = {name: key for name, key in keys.items() if cache.find(key) is not None}
        taken = {name: cache.take(key) for name, key in present.items()}
        yield {name: found.artifact for name, found in taken.items() if found is not None}


def check_stages(stages: Mapping[str, Artifact], manifest: Mapping[str, Any], folder: Path) -> None:
    """Refuse a way whose float graphs are gone.

    Raises:
        SettingsError: the stage cache has lost the export, or a fused graph that was made.
    """
    made = [str(record["stage"]) for record in manifest.get("stages", ()) if record.get("status") != "skipped"]
    missing = [name for name in (EXPORT, FUSE) if name not in stages and (name == EXPORT or name in made)]
    if missing:
        source = manifest.get("source", {}).get("id", "MODEL")
        raise SettingsError(
            f"the stage cache no longer holds the float graphs of this folder ({', '.join(missing)})",
            where=str(folder),
            hint=f"compile it again, on this machine: hfaccel compile {source} -o {folder} --force; "
            "or point HFACCEL_CACHE to the cache that it was compiled with",
        )


def graph_steps(stages: Mapping[str, Artifact], manifest: Mapping[str, Any], folder: Path) -> tuple[tuple[str, Path], ...]:
    """What each step from the float graph to the artifact's is called, and its graph.

    Args:
        stages: results of the stages, checked by :func:`check_stages`.
        manifest: of the compiled folder.
        folder: the compiled folder.
    """
    steps = [("compiled: exported float graph, default session", stages[EXPORT].graph_path)]
    if FUSE in stages:
        steps.append(("fused: rewritten float graph, default session", stages[FUSE].graph_path))
    precision = str(manifest.get("precision", ""))
    what = "the artifact's graph, default session" if precision == "fp32" else f"quantized to {precision}, default session"
    return (*steps, (what, folder / str(manifest["graph"])))

"""The float graphs that a compiled folder was made from, as far as the stage cache still holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hfaccel.artifact.store import StageCache, default_cache_folder

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.artifact.artifact import Artifact


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

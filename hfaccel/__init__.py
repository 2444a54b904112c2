"""hfaccel compiles Hugging Face Transformers checkpoints into measured, gated, deployable artifacts.

``hfaccel.load(folder)`` opens a compiled artifact without torch; ``hfaccel.compile(model, output=...)`` makes one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfaccel.api import compile  # noqa: A004 - the design's public name
    from hfaccel.runtime.load import load

__version__ = "0.1.0"
__all__ = ["__version__", "compile", "load"]


def __getattr__(name: str) -> Any:
    """Import the two entry points on first use, so that ``import hfaccel`` and ``hfaccel --help`` stay cheap."""
    if name == "load":
        from hfaccel.runtime.load import load

        return load
    if name == "compile":
        from hfaccel.api import compile  # noqa: A004

        return compile
    raise AttributeError(f"module 'hfaccel' has no attribute {name!r}")

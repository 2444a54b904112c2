"""Remove identities, and nodes, initializers and functions that nothing reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def drop_unused(model: onnx_ir.Model) -> int:
    """Remove what has no effect (onnx-ir's passes); returns how many nodes and initializers fewer there are."""
    from onnx_ir.passes import common

    def size() -> int:
        return len(model.graph) + len(model.graph.initializers)

    before = size()
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]  # its __init__ has no annotations
    return before - size()

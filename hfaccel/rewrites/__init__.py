"""One exact graph rewrite per file: ``model -> number of changes``. The tables say what exists; recipes say what is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hfaccel.rewrites.common_subexpressions import eliminate_common_subexpressions
from hfaccel.rewrites.drop_empty_row_guard import drop_empty_row_guard
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.fold_attention_scale import fold_attention_scale
from hfaccel.rewrites.fold_constants import fold_constants
from hfaccel.rewrites.fuse_attention import fuse_attention
from hfaccel.rewrites.last_layer_pooled_token import run_last_layer_for_pooled_token
from hfaccel.rewrites.last_token_logits import last_token_logits
from hfaccel.rewrites.merge_transposes import merge_transposes
from hfaccel.rewrites.name_symbols import name_symbols
from hfaccel.rewrites.narrow_relative_positions import narrow_relative_positions
from hfaccel.rewrites.pack_projections import pack_projections
from hfaccel.rewrites.score_at_once import score_at_once
from hfaccel.rewrites.untie_head import untie_head

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.recipe.schema import CleanupName, FusionName, RewriteName

    Rewrite = Callable[[onnx_ir.Model], int]

CLEANUPS: Mapping[CleanupName, Rewrite] = {
    "name_symbols": name_symbols,
    "fold_constants": fold_constants,
    "common_subexpressions": eliminate_common_subexpressions,
    "drop_unused": drop_unused,
}
REWRITES: Mapping[RewriteName, Rewrite] = {
    "last_layer_pooled_token": run_last_layer_for_pooled_token,
    "drop_empty_row_guard": drop_empty_row_guard,
    "merge_transposes": merge_transposes,
    "fold_attention_scale": fold_attention_scale,
    "narrow_relative_positions": narrow_relative_positions,
    "pack_projections": pack_projections,
    "untie_head": untie_head,
    "last_token_logits": last_token_logits,
}
FUSIONS: Mapping[FusionName, Rewrite] = {
    "attention": fuse_attention,
    "score_at_once": score_at_once,
}
"""Beside those of onnxruntime, which transformers makes."""

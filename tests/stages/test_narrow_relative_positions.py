"""Relative positions that do not occur are left out of a product, and no answer changes, whatever the length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hfaccel.api import SilentProgress
from hfaccel.pipeline import compile_model
from hfaccel.request import CompileRequest
from hfaccel.rewrites.graphs import load_graph, operator_counts, save_graph
from hfaccel.rewrites.narrow_relative_positions import narrow_relative_positions
from hfaccel.runtime.session import GraphSession
from tests.stages.conftest import SIZES, SPECIAL, TOKEN_TYPES, WORDS

LAYERS = SIZES["num_hidden_layers"]
PLAIN = ("fuse.enabled=false", "quantize.enabled=false", "optimize.rewrites=[merge_transposes]")
KINDS: dict[str, dict[str, Any]] = {
    "DeBERTa v3": {
        "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0,
        "position_biased_input": False,
    },
    "every distance": {"pos_att_type": ["c2p", "p2c"]},
    "keys of their own": {"position_buckets": 16, "pos_att_type": ["c2p", "p2c"]},
    "one way": {"position_buckets": 8, "pos_att_type": ["c2p"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[..., None]) -> Callable[[str], Path]:
    """Path of the graph of a kind of DeBERTa, without this rewrite."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            import torch
            from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("deberta")
            config = DebertaV2Config(**{**SIZES, "relative_attention": True, **KINDS[kind]})
            config.initializer_range = 0.5  # positions must matter
            DebertaV2ForSequenceClassification(config).save_pretrained(folder / "checkpoint")
            write_tokenizer(folder / "checkpoint", words=WORDS, settings=SPECIAL | TOKEN_TYPES)
            request = CompileRequest(model=str(folder / "checkpoint"), output=folder / "plain", overrides=PLAIN)
            compile_model(request, SilentProgress())
            made[kind] = folder / "plain" / "model.onnx"
        return made[kind]

    return make


def answers(graph: GraphSession, mask: np.ndarray) -> np.ndarray:
    ids = np.random.default_rng(mask.size).integers(5, 90, mask.shape)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return graph.run({name: given[name] for name in graph.input_names})["logits"]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stay_the_same_at_every_length(kind: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_graph(plain(kind))
    ways = len(KINDS[kind]["pos_att_type"])
    assert narrow_relative_positions(model) == ways * LAYERS
    counts = operator_counts(model)
    assert "Tile" not in counts
    assert counts["GatherElements"] == ways * LAYERS
    onnx_ir.to_proto(model)
    before, after = GraphSession(plain(kind)), GraphSession(save_graph(model, tmp_path))

    @settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(1, 3), st.integers(1, 60), st.data())
    def compare(batch: int, length: int, data: st.DataObject) -> None:
        counting = [data.draw(st.integers(1, length)) for _ in range(batch)]
        mask = (np.arange(length) < np.array(counting)[:, None]).astype(np.int64)
        np.testing.assert_allclose(answers(after, mask), answers(before, mask), rtol=1e-4, atol=1e-4)

    compare()


def test_products_get_as_small_as_the_text(plain: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_graph(plain("every distance"))
    narrow_relative_positions(model)
    product = next(node.inputs[0] for node in model.graph if node.op_type == "GatherElements")
    assert product is not None
    product.name = "product"
    model.graph.outputs.append(product)
    session = GraphSession(save_graph(model, tmp_path))
    ids = np.full((2, 5), 7)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    shape = session.run({name: given[name] for name in session.input_names})["product"].shape
    assert shape == (2 * SIZES["num_attention_heads"], 5, 9)  # distances from -4 to 4


def test_positions_that_depend_on_the_tokens_are_left_alone(plain: Callable[[str], Path]) -> None:
    model = load_graph(plain("one way"))
    ids = next(value for value in model.graph.inputs if value.name == "input_ids")
    expands = {
        node.inputs[1].producer() for node in model.graph if node.op_type == "GatherElements" and node.inputs[1] is not None
    }
    for expand in expands:
        assert expand is not None
        assert expand.inputs[0] is not None
        least = onnx_ir.node("ReduceMin", [ids], {"keepdims": 0}, name=f"{expand.name}_least")
        shifted = onnx_ir.node("Min", [expand.inputs[0], least.outputs[0]], name=f"{expand.name}_shifted")
        for node in (least, shifted):
            node.outputs[0].name = f"{node.name}_value"
        model.graph.insert_before(expand, [least, shifted])
        expand.replace_input_with(0, shifted.outputs[0])
    assert expands
    assert narrow_relative_positions(model) == 0


def test_a_compile_narrows_them_by_itself(make_architecture: Callable[[str], Path], tmp_path: Path) -> None:
    overrides = ("quantize.enabled=false",)
    request = CompileRequest(model=str(make_architecture("deberta-v2")), output=tmp_path / "out", overrides=overrides)
    compile_model(request, SilentProgress())
    counts = operator_counts(load_graph(tmp_path / "out" / "model.onnx"))
    assert counts["GatherElements"] == 2 * LAYERS
    assert counts["Slice"] >= 2 * LAYERS
    assert "Tile" not in counts

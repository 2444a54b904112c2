"""The activation of a cross encoder, wherever a release of sentence-transformers put it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfaccel.errors import ExportError, SourceError
from hfaccel.source.cross_encoder import read_activation

SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@pytest.mark.parametrize(
    ("config", "settings", "activation"),
    [
        ({}, None, "sigmoid"),
        ({"sentence_transformers": {"version": "4.1.0"}}, {"default_prompt_name": None}, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": IDENTITY}}, None, "identity"),
        ({"sentence_transformers": {"activation_fn": SIGMOID}}, None, "sigmoid"),
        ({"sbert_ce_default_activation_function": IDENTITY}, None, "identity"),
        ({"sentence_transformers": {"activation_fn": SIGMOID}}, {"activation_fn": IDENTITY}, "identity"),
        (
            {"sentence_transformers": {"activation_fn": SIGMOID}, "sbert_ce_default_activation_function": IDENTITY},
            None,
            "sigmoid",
        ),
    ],
)
def test_activation(tmp_path: Path, config: dict[str, Any], settings: dict[str, Any] | None, activation: str) -> None:
    if settings is not None:
        (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings), encoding="utf-8")
    assert read_activation(config, tmp_path) == activation


@pytest.mark.parametrize("named", ["torch.nn.modules.activation.Tanh", "mine.Identity"])
def test_unknown_activation_is_refused(tmp_path: Path, named: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_activation({"sentence_transformers": {"activation_fn": named}}, tmp_path)
    assert caught.value.what == f"the activation '{named}' of the cross encoder is not supported"
    assert caught.value.where == str(tmp_path / "config.json")


def test_modules_beside_the_transformer_are_refused(tmp_path: Path) -> None:
    modules = [{"type": "sentence_transformers.base.modules.Transformer"}, {"type": "sentence_transformers.base.modules.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(ExportError, match="cross-encoder modules Transformer -> Dense are not supported yet"):
        read_activation({}, tmp_path)


def test_default_prompt_is_refused(tmp_path: Path) -> None:
    text = '{"prompts": {"query": "query: "}, "default_prompt_name": "query"}'
    (tmp_path / "config_sentence_transformers.json").write_text(text, encoding="utf-8")
    with pytest.raises(ExportError, match="default prompt 'query' is not supported yet"):
        read_activation({}, tmp_path)

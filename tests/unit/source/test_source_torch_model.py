from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.artifact.contract import PoolingMode
from hfaccel.errors import ExportError, SourceError
from hfaccel.source.contract import build_contract
from hfaccel.source.resolve import resolve_source
from hfaccel.source.text import check_tokenizer, text_settings, write_tokenizer
from hfaccel.source.torch_model import TorchRunner, load_torch_model

Make = Callable[..., Path]
FEEDS = {
    "input_ids": np.array([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0]]),
    "attention_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "token_type_ids": np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]),
}


@pytest.mark.parametrize(
    ("class_name", "names", "shapes"),
    [
        ("BertForSequenceClassification", ["logits"], [("batch", 3)]),
        ("BertForTokenClassification", ["logits"], [("batch", "sequence", 3)]),
        ("BertForQuestionAnswering", ["start_logits", "end_logits"], [("batch", "sequence")] * 2),
        ("BertForMaskedLM", ["logits"], [("batch", "sequence", 32)]),
        ("BertModel", ["last_hidden_state"], [("batch", "sequence", 32)]),
    ],
)
def test_equals_plain_transformers(make_checkpoint: Make, class_name: str, names: list[str], shapes: list[Any]) -> None:
    import torch
    import transformers

    settings = {} if class_name == "BertForQuestionAnswering" else {"num_labels": 3}
    folder = make_checkpoint(class_name, **settings)
    source = resolve_source(str(folder))
    model = load_torch_model(source, attention="eager")
    got = TorchRunner(model).run(FEEDS)
    plain = getattr(transformers, class_name).from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = plain(**{name: torch.from_numpy(value) for name, value in FEEDS.items()})
    assert list(got) == names
    for name in names:
        np.testing.assert_allclose(got[name], expected[name].numpy(), atol=1e-6)
    contract = build_contract(source, model)
    assert [spec.name for spec in contract.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [(spec.name, spec.shape) for spec in contract.outputs] == list(zip(names, shapes, strict=True))
    assert contract.text.max_length == 48
    assert (contract.text.mask_token, contract.text.mask_token_id, contract.text.pad_token_id) == ("[MASK]", 4, 0)


def test_labels_in_id_order(make_checkpoint: Make) -> None:
    folder = make_checkpoint(id2label={1: "b", 0: "a", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    source = resolve_source(str(folder))
    contract = build_contract(source, load_torch_model(source, attention="sdpa"))
    assert contract.labels == ("a", "b", "c")
    assert contract.problem_type == "single_label_classification"


def test_one_label_is_regression(make_checkpoint: Make) -> None:
    source = resolve_source(str(make_checkpoint(num_labels=1)))
    contract = build_contract(source, load_torch_model(source, attention="sdpa"))
    assert (contract.problem_type, contract.activation) == ("regression", "sigmoid")  # the pipeline squashes what was not named
    source = resolve_source(str(make_checkpoint(name="named", num_labels=1, problem_type="regression")))
    contract = build_contract(source, load_torch_model(source, attention="sdpa"))
    assert (contract.problem_type, contract.activation) == ("regression", None)


def test_no_token_types_where_the_model_has_one_type(make_checkpoint: Make) -> None:
    model = load_torch_model(resolve_source(str(make_checkpoint(type_vocab_size=1))), attention="sdpa")
    assert TorchRunner(model).input_names == ("input_ids", "attention_mask")


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "mean_sqrt_len", "weightedmean", "last"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_pooling_ignores_padding(mode: PoolingMode, data: st.DataObject) -> None:
    import torch

    from hfaccel.source.wrapper import pool

    length = data.draw(st.integers(1, 6))
    padding = data.draw(st.integers(0, 4))
    values = data.draw(st.lists(st.floats(-1e3, 1e3, width=32), min_size=length * 2, max_size=length * 2))
    rows = np.array(values, dtype=np.float32).reshape(length, 2)
    hidden = np.concatenate([rows, np.full((padding, 2), 1e6, dtype=np.float32)])
    mask = np.array([1] * length + [0] * padding)
    expected = {
        "cls": rows[0],
        "mean": rows.astype(np.float64).mean(0),
        "max": rows.max(0),
        "mean_sqrt_len": rows.astype(np.float64).sum(0) / np.sqrt(length),
        "weightedmean": np.average(rows.astype(np.float64), axis=0, weights=np.arange(1, length + 1)),
        "last": rows[-1],
    }[mode]
    got = pool(torch.from_numpy(hidden[None]), torch.from_numpy(mask[None]), mode).numpy()[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-2)


def test_sentence_embedding(make_checkpoint: Make, add_sentence_files: Callable[..., None]) -> None:
    folder = make_checkpoint("BertModel")
    add_sentence_files(folder)
    source = resolve_source(str(folder))
    model = load_torch_model(source, attention="sdpa")
    vectors = TorchRunner(model).run(FEEDS)["sentence_embedding"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    hidden = TorchRunner(load_torch_model(resolve_source(str(folder), task="feature-extraction"), attention="sdpa")).run(FEEDS)
    mean = hidden["last_hidden_state"][1, :3].mean(0)
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), atol=1e-5)
    contract = build_contract(source, model)
    assert (contract.pooling, contract.normalize, contract.text.max_length) == ("mean", True, 40)
    assert contract.outputs[0].shape == ("batch", 32)


def test_no_token_types_where_the_tokenizer_makes_none(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["model_input_names"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = load_torch_model(resolve_source(str(folder)), attention="sdpa")
    assert TorchRunner(model).input_names == ("input_ids", "attention_mask")


def test_attention_that_the_architecture_lacks_is_refused(make_checkpoint: Make) -> None:
    import transformers

    folder = make_checkpoint("BertModel")
    sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    transformers.MPNetModel(transformers.MPNetConfig(**sizes)).save_pretrained(folder)
    source = resolve_source(str(folder))
    with pytest.raises(SourceError) as caught:
        load_torch_model(source, attention="sdpa")
    assert str(caught.value) == (
        f"{source.id}: transformers has no 'sdpa' attention for architecture 'mpnet' "
        "(--set export.attention=eager, or state it in the recipe)"
    )
    assert load_torch_model(source, attention="eager").config._attn_implementation == "eager"
    assert load_torch_model(source, attention=None).config._attn_implementation == "eager"


def test_random_head_is_refused(make_checkpoint: Make) -> None:
    folder = make_checkpoint("BertModel")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["BertForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SourceError) as caught:
        load_torch_model(resolve_source(str(folder)), attention="sdpa")
    assert caught.value.what == "the checkpoint has no weights for classifier.bias, classifier.weight: they would be random"


def test_weights_of_another_size(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] = 48
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        SourceError, match="weights have other shapes than the config says, the first is bert.encoder.layer.0".replace(".", r"\.")
    ):
        load_torch_model(resolve_source(str(folder)), attention="sdpa")


def test_unknown_model_type(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "distil-bert"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ExportError) as caught:
        load_torch_model(resolve_source(str(folder)), attention="sdpa")
    assert caught.value.what == "the installed transformers does not know model_type 'distil-bert'"
    assert caught.value.hint.startswith("closest known: distilbert")


def test_written_tokenizer_answers_alike(make_checkpoint: Make, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = make_checkpoint()
    write_tokenizer(resolve_source(str(folder)), tmp_path / "out")
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.encode("word1 word2").ids == [2, 6, 7, 3]
    assert (tmp_path / "out" / "config.json").is_file()


def test_tokenizer_is_built_from_a_vocabulary(make_checkpoint: Make, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    folder = make_checkpoint()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}', encoding="utf-8")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    source = resolve_source(str(folder))
    write_tokenizer(source, tmp_path / "out")
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("red blue").ids == [2, 5, 6, 3]
    assert (text_settings(source).pad_token_id, text_settings(source).max_length) == (0, 64)


def test_max_length_of_offset_positions(make_checkpoint: Make) -> None:
    folder = make_checkpoint()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.update(model_type="roberta", max_position_embeddings=40, pad_token_id=1)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert text_settings(resolve_source(str(folder))).max_length == 38


WORDS_AND_CASES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word", "Word", "hello", "Hello", "who", "is", "it", "?", "##d"]


def write_cased_tokenizer(folder: Path, *, lower_case: bool) -> None:
    """tokenizer.json keeps the case; the settings of the class of transformers may not."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate(WORDS_AND_CASES)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    tokenizer.add_special_tokens(WORDS_AND_CASES[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").write_text("\n".join(WORDS_AND_CASES), encoding="utf-8")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower_case, "model_max_length": 20}
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special), encoding="utf-8")


def test_tokenizers_that_agree_pass(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint()
    write_tokenizer(resolve_source(str(folder)), tmp_path / "a")
    check_tokenizer(resolve_source(str(folder)), tmp_path / "a")
    write_cased_tokenizer(folder, lower_case=False)
    write_tokenizer(resolve_source(str(folder)), tmp_path / "b")
    check_tokenizer(resolve_source(str(folder)), tmp_path / "b")


def test_tokenizers_that_disagree_are_named(make_checkpoint: Make, tmp_path: Path) -> None:
    folder = make_checkpoint()
    write_cased_tokenizer(folder, lower_case=True)
    source = resolve_source(str(folder))
    write_tokenizer(source, tmp_path / "out")
    with pytest.raises(SourceError) as caught:
        check_tokenizer(source, tmp_path / "out")
    assert caught.value.what.startswith(
        "tokenizer.json and the tokenizer that transformers makes of the checkpoint disagree on "
        "\"Hello, World! It's 3.14 o'clock\": ids from position 0 on are [2, 8, 1, "
    )
    assert "and [2, 7, 1, " in caught.value.what

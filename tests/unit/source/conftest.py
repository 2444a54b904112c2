from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(27))]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_tokenizer_files(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "[PAD]",
            "mask_token": "[MASK]",
            "model_max_length": 48,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        },
    )


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A tiny random BERT checkpoint: ``make_checkpoint("BertForSequenceClassification", num_labels=3)``."""

    def make(class_name: str = "BertForSequenceClassification", name: str = "checkpoint", **settings: Any) -> Path:
        import torch
        import transformers

        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            **settings,
        )
        folder = tmp_path / name
        getattr(transformers, class_name)(config).save_pretrained(folder)
        write_tokenizer_files(folder)
        return folder

    return make


@pytest.fixture
def add_sentence_files() -> Callable[..., None]:
    """Add the files that sentence-transformers writes."""

    def add(
        folder: Path,
        *,
        pooling: dict[str, Any] | None = None,
        kinds: tuple[str, ...] = ("Transformer", "Pooling", "Normalize"),
        text: dict[str, Any] | None = None,
    ) -> None:
        modules = [
            {
                "idx": index,
                "name": str(index),
                "path": f"{index}_{kind}" if index else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for index, kind in enumerate(kinds)
        ]
        write_json(folder / "modules.json", modules)
        write_json(
            folder / "1_Pooling" / "config.json", pooling or {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
        )
        write_json(folder / "sentence_bert_config.json", text or {"max_seq_length": 40, "do_lower_case": False})

    return add

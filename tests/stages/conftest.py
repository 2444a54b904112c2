from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(95))]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}

# One row an architecture: model_type -> (class, settings that differ from SIZES).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "roberta": ("RobertaForTokenClassification", {}),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", {}),
    "camembert": ("CamembertForSequenceClassification", {}),
    "mpnet": ("MPNetModel", {}),
    "electra": ("ElectraForSequenceClassification", {"embedding_size": 32}),
    "albert": ("AlbertForMaskedLM", {"embedding_size": 32}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8},
    ),
}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.fixture(scope="session")
def make_architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random checkpoint of an architecture, made once per run."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            import torch
            import transformers

            torch.manual_seed(0)
            class_name, different = ARCHITECTURES[model_type]
            model_class = getattr(transformers, class_name)
            folder = tmp_path_factory.mktemp("checkpoint") / model_type
            model_class(model_class.config_class(**{**SIZES, **different})).save_pretrained(folder)
            write_tokenizer(folder)
            made[model_type] = folder
        return made[model_type]

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests of this run share one cache, none touches the user's."""
    monkeypatch.setenv("HFACCEL_CACHE", str(tmp_path_factory.getbasetemp() / "hfaccel-cache"))

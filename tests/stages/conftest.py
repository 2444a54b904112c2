from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WORDS = 100
SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}

# Tokenizers of these architectures tell the two texts of a pair apart.
READS_TOKEN_TYPES = ("bert", "electra", "albert", "deberta-v2")
TOKEN_TYPES = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}

# One row an architecture: model_type -> (class, settings that differ from SIZES).
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", {}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "roberta": ("RobertaForTokenClassification", {}),
    "xlm-roberta": ("XLMRobertaForQuestionAnswering", {}),
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


@pytest.fixture(scope="session")
def make_architecture(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[..., None]) -> Callable[[str], Path]:
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
            write_tokenizer(folder, words=WORDS, settings=SPECIAL | (TOKEN_TYPES if model_type in READS_TOKEN_TYPES else {}))
            made[model_type] = folder
        return made[model_type]

    return make


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All tests of this run, and what they share in a module, have one cache; none touches the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFACCEL_CACHE", str(tmp_path_factory.getbasetemp() / "hfaccel-cache"))
        yield

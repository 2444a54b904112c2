"""Tiny random BERT models with a WordPiece tokenizer, run by torch, so that no ONNX export is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hfaccel.artifact.contract import Contract, ProblemType, Task, TensorSpec, TextSettings
from hfaccel.runtime.model import Model
from hfaccel.runtime.tokenizer import TextTokenizer

CORPUS = [
    "Microsoft opened an office in New York last summer, and Anna moved there from Paris.",
    "The quick brown fox jumps over the lazy dog while it rains.",
    "A film that is too long, too loud and not worth the money; I loved it anyway!",
    "Who opened the office? Where does Anna live? What jumps over the dog?",
]
MAX_LENGTH = 64
LABELS = {
    "text-classification": ("bad", "fine", "good"),
    "token-classification": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
    "text-ranking": ("score",),
}


class TorchRunner:
    """Runs the source model itself."""

    def __init__(self, model: PreTrainedModel, output_names: tuple[str, ...]) -> None:
        self.input_names = ("input_ids", "attention_mask", "token_type_ids")
        self.batch_shapes: list[tuple[int, ...]] = []
        self._model = model
        self._output_names = output_names

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.batch_shapes.append(feeds["input_ids"].shape)
        with torch.no_grad():
            result = self._model(**{name: torch.tensor(feeds[name]) for name in self.input_names})
        return {name: result[name].numpy() for name in self._output_names}


class PoolingRunner(TorchRunner):
    """Mean-pools the hidden states, as a compiled sentence encoder does inside its graph."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        hidden = super().run(feeds)["last_hidden_state"]
        mask = feeds["attention_mask"][..., None]
        return {"sentence_embedding": (hidden * mask).sum(1) / mask.sum(1)}


@dataclass(frozen=True)
class Tiny:
    """A model both ways: ours, and what the transformers pipeline needs."""

    model: Model
    source: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    runner: TorchRunner


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json with padding and truncation baked in, which the run time must switch off."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False))
    ids = [("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    tokenizer.enable_padding(length=100)
    tokenizer.enable_truncation(5)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def text_settings(tokenizer_file: Path) -> TextSettings:
    mask = Tokenizer.from_file(str(tokenizer_file)).token_to_id("[MASK]")
    return TextSettings(max_length=MAX_LENGTH, pad_token_id=0, mask_token="[MASK]", mask_token_id=mask)


@pytest.fixture(scope="session")
def transformers_tokenizer(tokenizer_file: Path) -> PreTrainedTokenizerFast:
    plain = Tokenizer.from_file(str(tokenizer_file))
    plain.no_padding()
    plain.no_truncation()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


MakeTiny = Callable[..., Tiny]


@pytest.fixture
def make_tiny(tokenizer_file: Path, text_settings: TextSettings, transformers_tokenizer: PreTrainedTokenizerFast) -> MakeTiny:
    def make(
        task: Task,
        *,
        problem_type: ProblemType | None = None,
        labels: tuple[str, ...] | None = None,
        padding_side: str = "right",
        max_length: int = MAX_LENGTH,
    ) -> Tiny:
        torch.manual_seed(7)
        names = LABELS.get(task, ()) if labels is None else labels
        config = BertConfig(
            vocab_size=len(transformers_tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=128,
            initializer_range=0.5,
            **({"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}),
        )
        config.problem_type = problem_type
        source, outputs = _source(task, config)
        source.eval()
        runner = (PoolingRunner if task == "sentence-similarity" else TorchRunner)(source, outputs)
        settings = replace(text_settings, padding_side=padding_side, max_length=max_length)
        contract = Contract(
            task=task,
            inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in runner.input_names),
            outputs=_output_specs(task, outputs),
            text=settings,
            labels=names,
            problem_type=problem_type,
        )
        model = Model(runner, TextTokenizer(tokenizer_file, settings), contract)
        return Tiny(model, source, transformers_tokenizer, runner)

    return make


def _source(task: Task, config: BertConfig) -> tuple[Any, tuple[str, ...]]:
    if task in ("text-classification", "text-ranking"):
        return BertForSequenceClassification(config), ("logits",)
    if task == "token-classification":
        return BertForTokenClassification(config), ("logits",)
    if task == "question-answering":
        return BertForQuestionAnswering(config), ("start_logits", "end_logits")
    if task == "fill-mask":
        return BertForMaskedLM(config), ("logits",)
    return BertModel(config), ("last_hidden_state",)


def _output_specs(task: Task, outputs: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    if task == "sentence-similarity":
        return (TensorSpec("sentence_embedding", "float32", ("batch", 32)),)
    if task in ("text-classification", "text-ranking"):
        return (TensorSpec("logits", "float32", ("batch", "labels")),)
    return tuple(TensorSpec(name, "float32", ("batch", "sequence")) for name in outputs)

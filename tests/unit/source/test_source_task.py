from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfaccel.errors import ExportError, HfaccelError, SourceError, UsageError
from hfaccel.source.model import SentenceTransformers
from hfaccel.source.sentence_transformers import read_sentence_transformers
from hfaccel.source.task import infer_task, resolve_task_name

AddFiles = Callable[..., None]
ONE_LABEL = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


@pytest.mark.parametrize(
    ("requested", "task"),
    [
        ("sentence-embeddings", "sentence-similarity"),
        ("embeddings", "sentence-similarity"),
        ("ner", "token-classification"),
        ("sentiment-analysis", "text-classification"),
        ("sequence_classification", "text-classification"),
        ("QA", "question-answering"),
        ("masked-lm", "fill-mask"),
        ("reranker", "text-ranking"),
        ("cross-encoder", "text-ranking"),
        ("fill-mask", "fill-mask"),
        ("translation", "text2text-generation"),
        ("summarization", "text2text-generation"),
        ("speech-to-text", "automatic-speech-recognition"),
    ],
)
def test_synonyms(requested: str, task: str) -> None:
    assert resolve_task_name(requested) == task


@pytest.mark.parametrize("requested", ["object-detection", "nonsense"])
def test_unknown_task(requested: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_task_name(requested)
    assert str(caught.value) == (
        f"--task: unknown task '{requested}' (use one of: text-classification, token-classification, question-answering, "
        "fill-mask, feature-extraction, sentence-similarity, text-ranking, text-generation, text2text-generation, "
        "automatic-speech-recognition)"
    )


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("RobertaForQuestionAnswering", "question-answering"),
        ("ModernBertForMaskedLM", "fill-mask"),
        ("BertModel", "feature-extraction"),
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
        ("T5ForConditionalGeneration", "text2text-generation"),
        ("MarianMTModel", "text2text-generation"),
    ],
)
def test_task_of_architecture(tmp_path: Path, architecture: str, task: str) -> None:
    assert infer_task({"architectures": [architecture]}, tmp_path) == task


def test_one_label_is_a_ranker_only_with_a_hint(tmp_path: Path) -> None:
    assert infer_task(ONE_LABEL, tmp_path) == "text-classification"
    assert infer_task({**ONE_LABEL, "sentence_transformers": {"version": "4.1.0"}}, tmp_path) == "text-ranking"
    (tmp_path / "README.md").write_text("---\npipeline_tag: text-ranking\n---\n", encoding="utf-8")
    assert infer_task(ONE_LABEL, tmp_path) == "text-ranking"


def test_sentence_files_win(tmp_path: Path, add_sentence_files: AddFiles) -> None:
    add_sentence_files(tmp_path)
    assert infer_task({"architectures": ["BertModel"]}, tmp_path) == "sentence-similarity"
    assert infer_task({"architectures": ["BertModel"]}, tmp_path, "feature-extraction") == "feature-extraction"


def test_task_cannot_be_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        infer_task({"architectures": ["BertForNextSentencePrediction"]}, tmp_path)
    assert caught.value.what == "cannot tell the task from the architecture 'BertForNextSentencePrediction'"
    assert caught.value.hint.startswith("name it with --task: text-classification, ")


def test_requested_task_without_its_head(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        infer_task({"architectures": ["BertForSequenceClassification"]}, tmp_path, "ner")
    assert str(caught.value) == (
        "--task: task 'token-classification' needs a head that 'BertForSequenceClassification' does not have "
        "(use one of: feature-extraction, sentence-similarity, text-classification, text-ranking)"
    )


def test_ranking_needs_one_value_for_a_pair(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        infer_task({"architectures": ["BertForSequenceClassification"], "num_labels": 3}, tmp_path, "reranker")
    assert str(caught.value) == (
        "--task: task 'text-ranking' needs one value for a pair, this checkpoint gives 3 (use text-classification)"
    )


@pytest.mark.parametrize(
    ("pooling", "mode"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_pooling_files(tmp_path: Path, add_sentence_files: AddFiles, pooling: dict[str, Any], mode: str) -> None:
    add_sentence_files(tmp_path, pooling=pooling, kinds=("Transformer", "Pooling"), text={"do_lower_case": True})
    expected = SentenceTransformers(pooling=mode, normalize=False, max_length=None, lowercase=True)  # type: ignore[arg-type]
    assert read_sentence_transformers(tmp_path) == expected


def test_no_sentence_files_means_mean_pooling(tmp_path: Path) -> None:
    assert read_sentence_transformers(tmp_path) == SentenceTransformers("mean", False, None, False)


@pytest.mark.parametrize(
    ("files", "error", "expected"),
    [
        (
            {"kinds": ("Transformer", "Pooling", "Dense", "Normalize")},
            ExportError,
            "sentence-transformers module 'Dense' is not supported yet",
        ),
        (
            {"kinds": ("Transformer", "Normalize", "Pooling")},
            ExportError,
            "sentence-transformers modules Transformer -> Normalize -> Pooling are not supported yet",
        ),
        (
            {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            ExportError,
            "2 pooling modes at once (cls_token, mean_tokens) are not supported yet",
        ),
        ({"pooling": {"pooling_mode": "attention"}}, ExportError, "pooling mode 'attention' is not supported yet"),
    ],
)
def test_refused_sentence_files(
    tmp_path: Path, add_sentence_files: AddFiles, files: dict[str, Any], error: type[HfaccelError], expected: str
) -> None:
    add_sentence_files(tmp_path, **files)
    with pytest.raises(error) as caught:
        read_sentence_transformers(tmp_path)
    assert caught.value.what == expected


def test_default_prompt_is_refused(tmp_path: Path, add_sentence_files: AddFiles) -> None:
    add_sentence_files(tmp_path)
    text = '{"prompts": {"query": "query: "}, "default_prompt_name": "query"}'
    (tmp_path / "config_sentence_transformers.json").write_text(text, encoding="utf-8")
    with pytest.raises(ExportError, match="default prompt 'query' is not supported yet"):
        read_sentence_transformers(tmp_path)


def test_missing_pooling_file(tmp_path: Path, add_sentence_files: AddFiles) -> None:
    add_sentence_files(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(SourceError, match=r"is missing, but modules\.json names it"):
        read_sentence_transformers(tmp_path)

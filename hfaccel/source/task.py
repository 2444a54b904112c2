"""What a checkpoint is compiled for: the task that the user names, or the one that its files imply."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfaccel.artifact.contract import TASKS, Task
from hfaccel.errors import SourceError, UsageError
from hfaccel.source.model import read_json

_SYNONYMS: dict[str, Task] = {
    "asr": "automatic-speech-recognition",
    "causal-lm": "text-generation",
    "chat": "text-generation",
    "cross-encoder": "text-ranking",
    "embedding": "sentence-similarity",
    "embeddings": "sentence-similarity",
    "masked-lm": "fill-mask",
    "ner": "token-classification",
    "qa": "question-answering",
    "reranker": "text-ranking",
    "reranking": "text-ranking",
    "sentence-embedding": "sentence-similarity",
    "sentence-embeddings": "sentence-similarity",
    "sentiment-analysis": "text-classification",
    "seq2seq-lm": "text2text-generation",
    "sequence-classification": "text-classification",
    "speech-recognition": "automatic-speech-recognition",
    "speech-to-text": "automatic-speech-recognition",
    "summarization": "text2text-generation",
    "text-to-text": "text2text-generation",
    "text-generation-with-past": "text-generation",
    "transcription": "automatic-speech-recognition",
    "translation": "text2text-generation",
}
_HEADS: dict[str, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForQuestionAnsweringSimple": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
_ENCODER_DECODER_HEADS = ("ForConditionalGeneration", "MTModel")
_HEADLESS_TASKS = ("feature-extraction", "sentence-similarity")


def infer_task(config: Mapping[str, Any], folder: Path, requested: str | None = None) -> Task:
    """The task to compile for.

    Args:
        config: content of ``config.json``.
        folder: checkpoint folder; sentence-transformers files and README in it are hints.
        requested: task or synonym that the user named; None to infer it.

    Raises:
        UsageError: the requested task is unknown or its head is not in the checkpoint, or no task can be inferred.
    """
    head = _head_task(config)
    if requested is not None:
        task = resolve_task_name(requested)
        same_head = "text-classification" if task == "text-ranking" else task
        if head is not None and same_head != head and task not in _HEADLESS_TASKS:
            raise UsageError(
                f"task '{task}' needs a head that '{_architecture(config)}' does not have",
                where="--task",
                hint=f"use one of: {', '.join((*_HEADLESS_TASKS, *_tasks_of_head(head)))}",
            )
        if task == "text-ranking" and _label_count(config) != 1:
            raise UsageError(
                f"task 'text-ranking' needs one value for a pair, this checkpoint gives {_label_count(config)}",
                where="--task",
                hint="use text-classification",
            )
        return task
    if (folder / "modules.json").is_file() and (head != "text-classification" or _has_pooling_module(folder)):
        return "sentence-similarity"
    if head == "text-classification" and _label_count(config) == 1 and _is_cross_encoder(config, folder):
        return "text-ranking"
    if head is not None and head in TASKS:
        return head
    raise UsageError(
        f"cannot tell the task from the architecture '{_architecture(config)}'",
        where=str(folder / "config.json"),
        hint=f"name it with --task: {', '.join(TASKS)}",
    )


def resolve_task_name(requested: str) -> Task:
    """The canonical name of a task that the user named; synonyms are ours first, then optimum's.

    Raises:
        UsageError: no such task, or one that hfaccel does not compile.
    """
    name = requested.strip().lower().replace("_", "-")
    name = _SYNONYMS.get(name, name)
    if name not in TASKS:
        name = _optimum_synonym(name)
    for task in TASKS:
        if task == name:
            return task
    raise UsageError(f"unknown task '{requested}'", where="--task", hint=f"use one of: {', '.join(TASKS)}")


def _optimum_synonym(name: str) -> str:
    try:
        from optimum.exporters.tasks import TasksManager
    except ImportError:
        return name  # the base install has no optimum; our own table above covers the usual names
    return str(TasksManager.map_from_synonym(name))


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or ()
    return str(names[0]) if names else ""


def _head_task(config: Mapping[str, Any]) -> Task | None:
    """The task of the head named by ``architectures``; None when it names none that we know."""
    name = _architecture(config)
    if config.get("is_encoder_decoder", True) and name.endswith(_ENCODER_DECODER_HEADS):
        return "automatic-speech-recognition" if "num_mel_bins" in config else "text2text-generation"
    for suffix, task in _HEADS.items():
        if name.endswith(suffix):
            return task
    headless = name.endswith(("Model", "EncoderModel")) and not name.endswith(("LMHeadModel", "HeadsModel"))
    return "feature-extraction" if headless else None


def _tasks_of_head(head: Task) -> tuple[Task, ...]:
    if head in _HEADLESS_TASKS:
        return ()
    return ("text-classification", "text-ranking") if head == "text-classification" else (head,)


def _label_count(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, dict) else int(config.get("num_labels") or 2)


def _has_pooling_module(folder: Path) -> bool:
    try:
        modules = read_json(folder / "modules.json")
    except SourceError:
        return False
    return isinstance(modules, list) and any(str(module.get("type", "")).endswith(".Pooling") for module in modules)


def _is_cross_encoder(config: Mapping[str, Any], folder: Path) -> bool:
    if "sentence_transformers" in config or (folder / "modules.json").is_file():
        return True
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    text = readme.read_text(encoding="utf-8", errors="replace")
    return re.search(r"^pipeline_tag:\s*['\"]?text-ranking", text, re.MULTILINE) is not None

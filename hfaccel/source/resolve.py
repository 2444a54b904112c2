"""From what the user typed to a checked :class:`SourceModel`: a local folder or GGUF file, else a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from hfaccel.errors import ExportError, MissingExtraError, SourceError, UsageError
from hfaccel.source.checks import find_problems, unsupported_architecture
from hfaccel.source.cross_encoder import read_activation
from hfaccel.source.gguf import checkpoint_of_gguf, find_gguf
from hfaccel.source.model import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    SENTENCE_TRANSFORMERS_FILES,
    TOKENIZER_FILES,
    SourceModel,
    hash_files,
    read_object,
)
from hfaccel.source.sentence_transformers import read_sentence_transformers
from hfaccel.source.task import infer_task, resolve_task_name
from hfaccel.source.weights import PICKLE_FILE, SAFETENSORS_FILE, SAFETENSORS_INDEX, find_weight_files

_HUB_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "README.md")
_HUB_IGNORED = ("onnx/*", "openvino/*", "*.onnx", "*.msgpack", "*.h5", "*/pytorch_model*")


def resolve_source(
    model: str,
    *,
    revision: str | None = None,
    task: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> SourceModel:
    """Find a checkpoint, check its files and read what is needed to plan its compilation; no weight is loaded.

    Args:
        model: local folder, GGUF file or hub id.
        revision: branch, tag or commit of a hub id.
        task: task or synonym; None to infer it.
        trust_remote_code: let Python code of the checkpoint run.
        allow_pickle: let pickled weights be read.

    Raises:
        SourceError: no such checkpoint, or its files are incomplete, corrupt or refused; all problems at once.
        ExportError: the architecture is not supported yet.
        MissingExtraError: it is a GGUF file, and what reads those is not installed.
        UsageError: the task is unknown, does not fit, or cannot be inferred.
    """
    if task is not None:
        resolve_task_name(task)
    path = Path(model).expanduser()
    gguf = find_gguf(path) if path.exists() and revision is None else None
    if gguf is not None:
        folder, commit = checkpoint_of_gguf(gguf, beside=path.is_dir()), None
    else:
        folder, commit = _locate(model, revision, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    problems = find_problems(folder, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    if len(problems) == 1:
        raise SourceError(problems[0], where=model)
    if problems:
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise SourceError(f"{len(problems)} problems with the checkpoint:{lines}", where=model)
    config = read_object(folder / CONFIG_FILE)
    unsupported = unsupported_architecture(config)
    if unsupported is not None:
        raise ExportError(
            unsupported,
            where=model,
            hint="hfaccel compiles encoders (BERT and its like), decoders (Llama and its like), T5, BART and its kin, Marian, NLLB and Whisper",
        )
    resolved_task = infer_task(config, folder, task)
    weight_files = find_weight_files(folder, allow_pickle=allow_pickle)
    settings_files = [str(path.relative_to(folder)) for path in folder.glob("*/config.json")]
    settings_files += [path.name for path in folder.glob("sentence_*_config.json")]
    if trust_remote_code:
        settings_files += [str(path.relative_to(folder)) for path in folder.rglob("*.py")]
    hashed = (
        CONFIG_FILE,
        "generation_config.json",
        PREPROCESSOR_FILE,
        *TOKENIZER_FILES,
        *SENTENCE_TRANSFORMERS_FILES,
        *settings_files,
        *weight_files,
    )
    return SourceModel(
        id=model,
        revision=commit,
        folder=folder,
        config=config,
        model_type=config["model_type"],
        task=resolved_task,
        weight_files=weight_files,
        weight_bytes=sum((folder / name).stat().st_size for name in weight_files),
        sha256=hash_files(folder, hashed),
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        dequantized_from=None if gguf is None else gguf.name,
        sentence_transformers=read_sentence_transformers(folder) if resolved_task == "sentence-similarity" else None,
        activation=read_activation(config, folder) if resolved_task == "text-ranking" else None,
    )


def _locate(model: str, revision: str | None, *, trust_remote_code: bool, allow_pickle: bool) -> tuple[Path, str | None]:
    """The folder with the files and, of a hub id, the commit."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UsageError("a local folder has no revisions", where="--revision", hint="leave it out, or give a hub id")
        return path.resolve(), None
    if path.is_file():
        raise SourceError(
            "is a file, not a checkpoint folder", where=model, hint="give the folder with config.json, or a GGUF file"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith((".", "/")):
        raise SourceError("is neither a folder nor a hub id", where=model, hint="check the path")
    folder = _download(model, revision, _HUB_PATTERNS + (("*.py",) if trust_remote_code else ()))
    if allow_pickle and not any((folder / name).is_file() for name in (SAFETENSORS_FILE, SAFETENSORS_INDEX)):
        folder = _download(model, revision, (*_HUB_PATTERNS, "pytorch_model*.bin"), ignored=_HUB_IGNORED[:-1])
    if not allow_pickle and not any(folder.glob("*.safetensors")) and (folder / CONFIG_FILE).is_file():
        raise SourceError(
            "the repository has no safetensors weights, and pickled ones are not downloaded",
            where=model,
            hint=f"pass --allow-pickle to use its {PICKLE_FILE} if you trust where it comes from",
        )
    return folder, folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision


def _download(model: str, revision: str | None, patterns: tuple[str, ...], ignored: tuple[str, ...] = _HUB_IGNORED) -> Path:
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub import errors as hub_errors
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", extra="compile", needed_for="downloading a checkpoint") from error
    what = "is neither a folder nor reachable on the hub"
    try:
        folder = snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(ignored))
    except hub_errors.GatedRepoError as error:
        raise SourceError(
            "is a gated repository", where=model, hint="accept its terms on the hub, then: hf auth login"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise SourceError(what, where=model, hint="no such repository: check the spelling, or log in for private ones") from error
    except hub_errors.RevisionNotFoundError as error:
        raise SourceError(f"has no revision '{revision}'", where=model, hint="give a branch, a tag or a commit") from error
    except (hub_errors.HfHubHTTPError, ValueError, OSError, RuntimeError) as error:
        offline = (
            "HF_HUB_OFFLINE is set and the local hub cache does not hold it" if constants.HF_HUB_OFFLINE else "check the network"
        )
        raise SourceError(what, where=model, hint=f"{offline}; or give a local folder") from error
    return Path(folder)

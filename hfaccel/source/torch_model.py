"""The source model in torch: what the exporter traces and what every later result is compared with."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hfaccel.artifact.contract import ENCODER_DECODER_TASKS
from hfaccel.errors import ExportError, SourceError
from hfaccel.source.text import tokenizer_inputs

if TYPE_CHECKING:
    import torch

    from hfaccel.artifact.contract import Task
    from hfaccel.source.model import SourceModel

_AUTO_CLASSES: dict[Task, str] = {
    "text-classification": "AutoModelForSequenceClassification",
    "text-ranking": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "feature-extraction": "AutoModel",
    "sentence-similarity": "AutoModel",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
}
_HEADLESS_TASKS = ("feature-extraction", "sentence-similarity")


def output_names(task: Task) -> tuple[str, ...]:
    """Names of the graph outputs of a task."""
    if task == "question-answering":
        return ("start_logits", "end_logits")
    if task == "feature-extraction":
        return ("last_hidden_state",)
    return ("sentence_embedding",) if task == "sentence-similarity" else ("logits",)


def load_torch_model(source: SourceModel, *, attention: Literal["sdpa", "eager"] | None) -> torch.nn.Module:
    """Load the checkpoint as a :class:`~hfaccel.source.wrapper.TaskModel`: eval mode, float32, a dict of plain tensors out.

    Args:
        source: the checkpoint.
        attention: implementation of attention; None leaves it to transformers, which takes ``sdpa`` where there is one.

    Raises:
        ExportError: transformers does not know the architecture, or has no such head for it.
        SourceError: the weights do not fit the architecture, parts of it would be randomly initialised, or it does not have the
            attention asked for.
    """
    import transformers

    from hfaccel.source.wrapper import TaskModel

    config = _load_config(source)
    auto_class = getattr(transformers, _AUTO_CLASSES[source.task])
    model_class = _model_class(auto_class, config, source)
    options: dict[str, Any] = {}
    if model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    if source.task not in _HEADLESS_TASKS:
        options = {}
    if attention == "sdpa" and model_class is not None and not getattr(model_class, "_supports_sdpa", False):
        raise _no_such_attention(source, attention)
    hf_model = _load_weights(source, auto_class, config, attention, options)
    # Another implementation than asked for would be measured and exported under the wrong name.
    if attention is not None and hf_model.config._attn_implementation != attention:
        raise _no_such_attention(source, attention)
    if hasattr(hf_model.config, "use_cache"):
        hf_model.config.use_cache = False
    return TaskModel(
        hf_model.eval(),
        task=source.task,
        input_names=_input_names(source, hf_model),
        output_names=output_names(source.task),
        pooling=source.sentence_transformers.pooling if source.sentence_transformers is not None else None,
        normalize=source.sentence_transformers.normalize if source.sentence_transformers is not None else False,
    ).eval()


def attention_of(model: torch.nn.Module) -> str:
    """Which implementation of attention transformers computes a loaded model with: ``sdpa``, ``eager``."""
    return str(model.hf_model.config._attn_implementation)  # type: ignore[union-attr]  # TaskModel has it


class TorchRunner:
    """Runs a loaded model on numpy arrays, like a session of the run time.

    Args:
        model: what :func:`load_torch_model` gave.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.input_names: tuple[str, ...] = tuple(str(name) for name in model.input_names)  # type: ignore[union-attr]

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name for int64 feeds (batch, sequence) or float32 features; feeds that the model does not read are ignored."""
        import torch

        with torch.inference_mode():
            inputs = {name: torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self.input_names}
            outputs = self._model(**inputs)
        return {name: value.numpy() for name, value in outputs.items()}


def _load_config(source: SourceModel) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if source.model_type not in CONFIG_MAPPING_NAMES and not source.trust_remote_code:
        closest = difflib.get_close_matches(source.model_type, CONFIG_MAPPING_NAMES, n=3)
        raise ExportError(
            f"the installed transformers does not know model_type '{source.model_type}'",
            where=str(source.folder / "config.json"),
            hint=f"closest known: {', '.join(closest)}" if closest else "it may need a newer transformers or --trust-remote-code",
        )
    try:
        return AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=source.trust_remote_code)
    except Exception as error:  # configs validate themselves with many exception types, all mean the same to the user
        raise SourceError(
            f"transformers refuses the config: {_first_line(error)}", where=str(source.folder / "config.json")
        ) from error


def _model_class(auto_class: Any, config: Any, source: SourceModel) -> Any:
    """The class that ``auto_class`` will build; None when only the checkpoint's own code knows."""
    try:
        found = auto_class._model_mapping[type(config)]
    except KeyError as error:
        if source.trust_remote_code:
            return None
        raise ExportError(
            f"transformers has no model of task '{source.task}' for architecture '{source.model_type}'",
            where=source.id,
            hint="choose another --task",
        ) from error
    return found[0] if isinstance(found, tuple) else found


def _no_such_attention(source: SourceModel, attention: str) -> SourceError:
    return SourceError(
        f"transformers has no '{attention}' attention for architecture '{source.model_type}'",
        where=source.id,
        hint=f"--set export.attention={'eager' if attention == 'sdpa' else 'sdpa'}, or state it in the recipe",
    )


def _load_weights(source: SourceModel, auto_class: Any, config: Any, attention: str | None, options: Mapping[str, Any]) -> Any:
    import torch

    with quiet_transformers():
        try:
            hf_model, report = auto_class.from_pretrained(
                source.folder,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the names
                local_files_only=True,
                use_safetensors=source.weight_files[0].endswith(".safetensors"),
                trust_remote_code=source.trust_remote_code,
                **options,
            )
        except ImportError as error:
            raise SourceError(f"loading needs a package that is not installed: {error}", where=source.id) from error
        except MemoryError:
            raise
        except Exception as error:  # safetensors, pickle and torch each have their own exception types for a bad file
            if attention is not None and "attn_implementation" in str(error):  # of a class that only the checkpoint knows
                raise _no_such_attention(source, attention) from error
            raise SourceError(
                f"the weights do not load: {_first_line(error)}", where=source.id, hint="download the checkpoint again"
            ) from error
    missing = sorted(key for key in report["missing_keys"] if not _is_harmless(key, source))
    mismatched = sorted(str(entry[0]) for entry in report["mismatched_keys"])
    if mismatched:
        raise SourceError(
            f"{len(mismatched)} weights have other shapes than the config says, the first is {mismatched[0]}",
            where=source.id,
            hint="config.json and weights are of different models: download the checkpoint again",
        )
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise SourceError(
            f"the checkpoint has no weights for {names}: they would be random",
            where=source.id,
            hint=f"'{source.task}' may be the wrong --task for this checkpoint, or the checkpoint was not fine-tuned for it",
        )
    return hf_model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_harmless(key: str, source: SourceModel) -> bool:
    """Whether a missing key changes no output: position numbers, or a pooler that no output reads."""
    parts = key.split(".")
    if parts[-1] in ("position_ids", "token_type_ids"):
        return True
    return "pooler" in parts and source.task in _HEADLESS_TASKS


def _input_names(source: SourceModel, hf_model: Any) -> tuple[str, ...]:
    names: tuple[str, ...] = ("input_ids", "attention_mask")
    if source.task in ENCODER_DECODER_TASKS:
        source_names = names if source.task == "text2text-generation" else ("input_features",)
        return (*source_names, "decoder_input_ids")
    if "token_type_ids" not in inspect.signature(hf_model.forward).parameters:
        return names
    type_count = getattr(hf_model.config, "type_vocab_size", None)
    if type_count is not None and type_count < 2:
        return names
    # Classes of tokenizers differ: where theirs gives no token types the source reads zeros, also for the second text of a pair.
    return (*names, "token_type_ids") if "token_type_ids" in tokenizer_inputs(source) else names


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the progress bar and the load report of transformers off the user's terminal; our own errors say what matters."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_progress_bar:
            logging.enable_progress_bar()

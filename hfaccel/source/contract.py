"""The contract of the graph that a loaded source model will be exported to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfaccel.artifact.contract import GENERATIVE_TASKS, Activation, Contract, ProblemType, TensorSpec
from hfaccel.errors import SourceError
from hfaccel.source.encoder_decoder import cross_outputs, decoder_inputs
from hfaccel.source.generation import cache_inputs, cache_outputs, generation_settings
from hfaccel.source.text import text_settings

if TYPE_CHECKING:
    from hfaccel.source.model import SourceModel

_PROBLEM_TYPES: tuple[ProblemType, ...] = ("single_label_classification", "multi_label_classification", "regression")


def build_contract(source: SourceModel, model: Any) -> Contract:
    """Tensors, labels and text handling of a source model.

    Args:
        source: the checkpoint.
        model: what :func:`hfaccel.source.torch_model.load_torch_model` gave for it.

    Raises:
        SourceError: the labels of the config are not numbered 0, 1, 2, ... or its problem_type is unknown.
    """
    config = model.config
    shape: tuple[int | str, ...] = ("batch", "sequence")
    has_labels = source.task in ("text-classification", "token-classification")
    sentence_files = source.sentence_transformers
    text = text_settings(source)
    generation = generation_settings(source, model, text) if source.task in GENERATIVE_TASKS else None
    past, present = (cache_inputs(generation), cache_outputs(generation)) if generation is not None else ((), ())
    read: tuple[TensorSpec, ...] = ()
    crossing: tuple[TensorSpec, ...] = ()
    if generation is not None and generation.encoder is not None:
        read, crossing = decoder_inputs(generation), cross_outputs(generation)
    return Contract(
        task=source.task,
        inputs=(*read, *past) if read else (*(TensorSpec(name, "int64", shape) for name in model.input_names), *past),
        outputs=(
            *(TensorSpec(name, "float32", _output_shape(source, config)) for name in model.output_names),
            *present,
            *crossing,
        ),
        text=text,
        labels=_labels(source, config) if has_labels else (),
        problem_type=_problem_type(source, config),
        activation=_activation(source, config),
        pooling=sentence_files.pooling if sentence_files is not None else None,
        normalize=sentence_files.normalize if sentence_files is not None else False,
        generation=generation,
    )


def _output_shape(source: SourceModel, config: Any) -> tuple[int | str, ...]:
    if source.task == "question-answering":
        return ("batch", "sequence")
    if source.task == "sentence-similarity":
        return ("batch", int(config.hidden_size))
    if source.task == "feature-extraction":
        return ("batch", "sequence", int(config.hidden_size))
    if source.task == "fill-mask" or source.task in GENERATIVE_TASKS:
        return ("batch", "sequence", int(config.vocab_size))
    if source.task == "token-classification":
        return ("batch", "sequence", int(config.num_labels))
    return ("batch", int(config.num_labels))


def _labels(source: SourceModel, config: Any) -> tuple[str, ...]:
    names = {int(number): str(label) for number, label in config.id2label.items()}
    if sorted(names) != list(range(len(names))):
        raise SourceError(
            f"id2label is not numbered 0 to {len(names) - 1}",
            where=str(source.folder / "config.json"),
            hint="correct its numbers",
        )
    return tuple(names[number] for number in range(len(names)))


def _activation(source: SourceModel, config: Any) -> Activation | None:
    """A single label without a problem type is trained as a regression, yet the transformers pipeline answers with its sigmoid."""
    if source.task == "text-classification" and int(config.num_labels) == 1 and getattr(config, "problem_type", None) is None:
        return "sigmoid"
    return source.activation


def _problem_type(source: SourceModel, config: Any) -> ProblemType | None:
    if source.task != "text-classification":
        return None
    named = getattr(config, "problem_type", None)
    if named is None:
        return "regression" if int(config.num_labels) == 1 else "single_label_classification"
    for problem_type in _PROBLEM_TYPES:
        if problem_type == named:
            return problem_type
    raise SourceError(
        f"unknown problem_type '{named}'",
        where=str(source.folder / "config.json"),
        hint=f"use one of: {', '.join(_PROBLEM_TYPES)}",
    )

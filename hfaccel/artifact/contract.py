"""The contract between a compiled graph and whoever runs it: tensors, task, labels and text handling.

Plain dataclasses on purpose: the torch-free run time reads them, so this module and
``generation.py`` import nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from hfaccel.artifact.generation import GenerationSettings

Task = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "feature-extraction",
    "sentence-similarity",
    "text-ranking",
    "text-generation",
    "text2text-generation",
    "automatic-speech-recognition",
]
TASKS: tuple[Task, ...] = get_args(Task)
ENCODER_DECODER_TASKS: tuple[Task, ...] = ("text2text-generation", "automatic-speech-recognition")
GENERATIVE_TASKS: tuple[Task, ...] = ("text-generation", *ENCODER_DECODER_TASKS)

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
PoolingMode = Literal["cls", "mean", "max", "mean_sqrt_len", "weightedmean", "last"]
Activation = Literal["sigmoid", "identity"]
Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Engine = Literal["onnxruntime", "openvino"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
InferencePrecision = Literal["f32", "bf16"]
_CACHE_BITS = {"int8": 8, "uint8": 4}
"""Type in the graph -> bits of a key or value, of caches that are not in float."""
GraphOptimization = Literal["disabled", "basic", "extended", "layout", "all"]


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output. ``shape`` mixes sizes and symbolic names (``batch``, ``sequence``)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class TextSettings:
    """How text becomes ids: everything the run time needs beside ``tokenizer.json``.

    ``max_length`` counts tokens, special tokens included. ``lowercase`` is a wish of the sentence-transformers files
    (``do_lower_case``) on top of what the tokenizer does itself.
    """

    max_length: int
    pad_token_id: int
    pad_token_type_id: int = 0
    padding_side: Literal["right", "left"] = "right"
    truncation_side: Literal["right", "left"] = "right"
    mask_token: str | None = None
    mask_token_id: int | None = None
    lowercase: bool = False


@dataclass(frozen=True)
class Contract:
    """What the graph takes and gives, and what its numbers mean.

    Attributes:
        task: Hugging Face task name.
        inputs: graph inputs; of ``input_ids``, ``attention_mask`` and ``token_type_ids`` those that the graph reads.
        outputs: graph outputs: ``logits``, ``start_logits`` and ``end_logits``, ``last_hidden_state`` or
            ``sentence_embedding``.
        text: text handling.
        labels: label names in id order; empty for tasks without labels.
        problem_type: of classification tasks only.
        activation: what the run time puts on the logits of a single value; None (also in manifests of older versions) leaves
            it to ``problem_type``, and is the sigmoid for ``text-ranking``.
        pooling: pooling folded into the graph (``sentence-similarity`` only).
        normalize: whether the graph L2-normalizes its sentence embedding.
        generation: of generative tasks only.
    """

    task: Task
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    text: TextSettings
    labels: tuple[str, ...] = ()
    problem_type: ProblemType | None = None
    activation: Activation | None = None
    pooling: PoolingMode | None = None
    normalize: bool = False
    generation: GenerationSettings | None = None

    @property
    def cache(self) -> tuple[TensorSpec, ...]:
        """Keys and values of earlier tokens as the graph reads them, of each layer; empty for encoders."""
        return tuple(spec for spec in self.inputs if spec.name.startswith("past_key_values."))

    @property
    def cache_bits(self) -> int | None:
        """Bits of a key or value in the cache; None for encoders."""
        return next((_CACHE_BITS.get(spec.dtype, 32) for spec in self.cache), None)

    @property
    def cache_bytes(self) -> int:
        """Memory that a token takes in the cache."""
        sizes = ((spec.shape[1], spec.shape[-1], 1 if spec.dtype in _CACHE_BITS else 4) for spec in self.cache)
        return sum(int(heads) * int(width) * item for heads, width, item in sizes)

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Contract:
        """The inverse of :meth:`to_json`; unknown keys raise ``TypeError``."""

        def tensors(items: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in items)

        values = dict(data)
        values["inputs"] = tensors(values["inputs"])
        values["outputs"] = tensors(values["outputs"])
        values["text"] = TextSettings(**values["text"])
        values["labels"] = tuple(values.get("labels", ()))
        if values.get("generation") is not None:
            values["generation"] = GenerationSettings.from_json(values["generation"])
        return cls(**values)


@dataclass(frozen=True)
class SessionSettings:
    """The engine and how it runs; part of a candidate, because both change its speed. Older manifests lack the later ones.

    Attributes:
        intra_op_num_threads: 0 means one thread per physical core.
        allow_spinning: onnxruntime: let idle worker threads wait actively.
        disabled_optimizers: onnxruntime: run-time fusions to leave out (a fusion can be a loss; the measurement says which).
        engine: what runs the graph.
        encoder_engine: of encoder-decoders: what runs the encoder; ``engine`` runs the decoder.
        inference_precision: openvino: what is computed in float may be computed in bfloat16.
        enable_cpu_mem_arena: onnxruntime: keep freed memory for the next run.
        graph_optimization_level: onnxruntime: how far the graph is optimized when it is opened.
        flush_denormals: onnxruntime: treat denormal numbers as zero.
        spin_after_run: onnxruntime: idle worker threads wait actively for some 40 ms after a run. The next run starts quicker,
            everything else on those cores slower.
    """

    intra_op_num_threads: int = 0
    allow_spinning: bool = True
    disabled_optimizers: tuple[str, ...] = ()
    engine: Engine = "onnxruntime"
    encoder_engine: Engine = "onnxruntime"
    inference_precision: InferencePrecision = "f32"
    enable_cpu_mem_arena: bool = True
    graph_optimization_level: GraphOptimization = "all"
    flush_denormals: bool = False
    spin_after_run: bool = True

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Every engine that takes part, once."""
        return tuple(dict.fromkeys((self.engine, self.encoder_engine)))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SessionSettings:
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**data, "disabled_optimizers": tuple(data.get("disabled_optimizers", ()))})

"""The shape of a recipe: what to do for one architecture. Data only; the defaults stand once, in ``recipes/encoder.yaml``.

Unknown keys are errors (``extra="forbid"``): an ignored typo would ship an unquantized model. All models are frozen.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hfaccel.artifact.contract import Engine, GraphOptimization, InferencePrecision, Precision, SessionSettings
from hfaccel.recipe.weight_format import WeightFormat

ExporterName = Literal["transformers", "torch", "mobius", "constructed", "traced"]
CleanupName = Literal["fold_constants", "common_subexpressions", "drop_unused", "name_symbols"]
RewriteName = Literal[
    "last_layer_pooled_token",
    "drop_empty_row_guard",
    "merge_transposes",
    "fold_attention_scale",
    "narrow_relative_positions",
    "pack_projections",
    "untie_head",
    "last_token_logits",
]
FusionName = Literal["onnxruntime", "attention", "score_at_once"]
GraphScope = Literal["optimized", "fused"]
Objective = Literal["latency", "throughput", "size"]
Part = Literal["head", "attention", "down"]
Scheme = Literal["dynamic", "static", "per-token", "weight-only", "none"]
SLICE_FACTOR = 3.0
"""A part of the data may lose this many times the budget of the whole, where the recipe does not say."""


class Section(BaseModel):
    """Base of all recipe sections: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ExportSection(Section):
    """Stage 1. ``exporters`` are tried in order; the first whose graph passes parity is taken.

    ``attention``: as transformers computes it. ``auto`` is ``sdpa`` where it has that for the architecture and ``eager`` elsewhere,
    what its users get by default; another one that is named must be there.
    """

    exporters: tuple[ExporterName, ...] = Field(min_length=1)
    opset: int = Field(ge=18, le=23)
    attention: Literal["auto", "sdpa", "eager"]

    @property
    def attention_implementation(self) -> Literal["sdpa", "eager"] | None:
        """What transformers is asked for; None: its default."""
        return None if self.attention == "auto" else self.attention


class ParitySection(Section):
    """Gate after each float stage: recorded outputs of the source against the graph, over several lengths, paddings, batch sizes.

    ``max_abs`` bounds the largest difference relative to the largest recorded magnitude (at least 1); ``min_cosine`` the worst
    cosine of one example.
    """

    max_abs: float = Field(gt=0)
    min_cosine: float = Field(gt=0, le=1)
    shapes: tuple[str, ...] = Field(min_length=1, description="batch x sequence, e.g. 1x7, 3x33")


class OptimizeSection(Section):
    """Stage 2: clean-ups to a fixed point, then the named exact rewrites where their pattern is found."""

    cleanups: tuple[CleanupName, ...]
    rewrites: tuple[RewriteName, ...]
    max_rounds: int = Field(ge=1, le=50)


class FuseSection(Section):
    """Stage 3. ``fusions`` are made in order; ``onnxruntime`` stands for those that transformers knows for that engine.

    ``contract``: operator -> expected count, a formula over the model's config (``2 * num_hidden_layers``).
    """

    enabled: bool
    fusions: tuple[FusionName, ...]
    contract: dict[str, str]


class Rung(Section):
    """One candidate of the quantization ladder.

    Attributes:
        name: unique name, as reports show it.
        scheme: ``dynamic`` (activation ranges per call), ``static`` (calibrated ranges), ``per-token`` (a scale for each token as
            it comes, one for each output channel), ``weight-only`` (weights in blocks, activation ranges per token and block) or
            ``none`` (the float graph as it is, in another engine or with other settings).
        graph: quantize the optimized (unfused) or the fused float graph.
        per_channel: one weight scale per output channel.
        smooth: move activation outliers into the weights before quantizing (SmoothQuant); exact in float, so any scheme may
            follow; needs calibration data.
        outlier_neurons: feed-forward neurons per layer that stay in float because their activations are outliers; needs
            calibration data. 0 = none.
        scaled_neurons: share of a feed-forward block's neurons that may be larger than what all are scaled to before they are rounded (exact
            in float); openvino scales on the way, and method gptq rounds their weights for it. Needs calibration data. 0 = none.
        keep_float: how many of the most sensitive MatMuls stay in float; needs calibration data. 0 = none.
        float_matmuls: names of MatMuls that stay in float, as the search for a fallback found them for this very checkpoint.
        blockwise_matmuls: names of MatMuls that are stored in blocks of 8 bit (see ``weight-only``) while the others follow the
            scheme: nearly as accurate as float and faster. Found by the same search.
        outlier_matmuls: names of MatMuls of whose input the channels that stand out stay in float, and no others: faster than all of the MatMul
            in float. Found by the same search; needs calibration data.
        blockwise_decoder: of encoder-decoders: the decoder's MatMuls are stored like these. A step of it reads all its weights for a
            few tokens, while the encoder computes many at once.
        quantize_embeddings: also store embedding tables in 8 bit (whatever the bits of the weights).
        calibration: range estimator of the static scheme.
        eight_bit_scores: static in openvino: queries and keys of fused attention are rounded to 8 bit too; of encoder-decoders those of the encoder.
        eight_bit_shares: static in openvino: attention rounds its shares and its values to 8 bit too, in as many layers as together move the
            outputs by no more than this, relative to them. 0 = in none.
        eight_bit_convolutions: static in openvino: convolutions compute in 8 bit too.
        weight_only_bits: weight-only: bits of a weight; 8 is nearly exact, 4 is for size.
        block_size: weight-only: how many inputs of an output channel share a scale; smaller blocks are closer and slower.
        symmetric: weight-only: without a zero point per block.
        method: weight-only: ``rtn`` rounds to the nearest; ``k-quant`` searches the grid of each block, ``hqq`` its zero point. The
            others need calibration data: ``gptq`` lets the other weights make up for each rounding, ``quant-ease`` improves what it
            finds, level by level; ``auto-round`` learns offsets and clipping by signed gradients; ``awq`` scales activations first
            (exact in float), then clips and rounds to the nearest; ``awq-quant-ease`` does both. All but ``rtn`` and ``gptq`` need zero
            points.
        eight_bit: weight-only of decoders: parts whose weights have 8 bits whatever the others have, and are rounded to the nearest:
            the head, attention, or the second product of feed-forward blocks.
        split_head: weight-only of decoders: the rows of the head for rare tokens, which tokenizers number last but for those added by hand, are a
            product of their own, that ``eight_bit: [head]`` does not mean.
        eight_bit_matmuls: weight-only of 4 bit: names of MatMuls that have 8 bits beside those parts, as the search found them for this
            very checkpoint.
        rotate: weight-only of decoders: turn the residual stream first (exact in float), so that no channel of it stands out; auto does
            so where its norms allow it (root mean square norms do).
        prompt_graph: weight-only of decoders: ship a second graph for prompts, in which products have weights of 8 bits with one scale per
            channel, and one scale per token. Those of 8 bits without zero points serve both graphs; beside 4 bit it has its own.
        cache_bits: of decoders: bits of a key or value in the cache, one scale per channel of a head; None leaves them in float32, and so
            does auto where the graph has no attention that reads integers or the accuracy gate refuses 8 bits. Needs calibration data.
        massive_channels: weight-only of decoders: channels of a product's input whose largest value is more than this many times that of the
            median channel stay in float, where they are few; of two graphs, in that for prompts alone, and where the other one has 4 bits
            such products have 8 there. Needs calibration data. 0 = none.
        objectives: the rung competes only where one of these is asked for; empty = always.
        least_budget: the rung competes only where at least this loss is allowed: with less it is known to be refused, after it has
            cost its time.
        engine: what runs this candidate.
        encoder_engine: of encoder-decoders: what runs the encoder alone, whose products the scheme ``static`` stores for it; ``engine`` runs
            the decoder.
        inference_precision: openvino: compute what is float in bfloat16; auto does where the target has it and it is measured to be faster.
        disabled_optimizers: onnxruntime fusions to leave out when this candidate runs.
        allow_spinning: onnxruntime: let idle worker threads wait actively.
        enable_cpu_mem_arena: onnxruntime: keep freed memory for the next run.
        graph_optimization_level: onnxruntime: how far the graph is optimized when it is opened.
        flush_denormals: onnxruntime: treat denormal numbers as zero.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    scheme: Scheme
    graph: GraphScope
    per_channel: bool = True
    smooth: float | None = Field(default=None, gt=0, lt=1)
    outlier_neurons: int = Field(default=0, ge=0, le=256)
    scaled_neurons: float = Field(default=0.0, ge=0, lt=0.5)
    keep_float: int = Field(default=0, ge=0)
    float_matmuls: tuple[str, ...] = ()
    blockwise_matmuls: tuple[str, ...] = ()
    outlier_matmuls: tuple[str, ...] = ()
    blockwise_decoder: bool = False
    quantize_embeddings: bool = False
    calibration: Literal["minmax", "percentile"] = "minmax"
    eight_bit_scores: bool = False
    eight_bit_shares: float = Field(default=0.0, ge=0, lt=1)
    eight_bit_convolutions: bool = False
    weight_only_bits: Literal[4, 8] = 8
    block_size: Literal[16, 32, 64, 128, 256] = 128
    symmetric: bool = True
    method: Literal["rtn", "k-quant", "hqq", "gptq", "quant-ease", "awq", "awq-quant-ease", "auto-round"] = "rtn"
    eight_bit: tuple[Part, ...] = ()
    split_head: bool = False
    eight_bit_matmuls: tuple[str, ...] = ()
    rotate: bool | Literal["auto"] = False
    prompt_graph: bool = False
    cache_bits: Literal[4, 8, "auto"] | None = None
    massive_channels: float = Field(default=0.0, ge=0)
    objectives: tuple[Objective, ...] = ()
    least_budget: float = Field(default=0.0, ge=0, lt=1)
    engine: Engine = "onnxruntime"
    encoder_engine: Engine = "onnxruntime"
    inference_precision: InferencePrecision | Literal["auto"] = "f32"
    disabled_optimizers: tuple[str, ...] = ()
    allow_spinning: bool = True
    enable_cpu_mem_arena: bool = True
    graph_optimization_level: GraphOptimization = "all"
    flush_denormals: bool = False

    @property
    def needs_statistics(self) -> bool:
        """Whether this rung can be built only with statistics of the activations."""
        scales = self.smooth is not None or self.scaled_neurons > 0
        return self.scheme == "static" or scales or self.outlier_neurons > 0 or bool(self.outlier_matmuls)

    @property
    def needs_runs(self) -> bool:
        """Whether building this rung runs the whole graph on calibration texts."""
        measures = self.keep_float > 0 or self.massive_channels > 0 or self.cache_bits is not None
        return measures or self.method in _CALIBRATED_METHODS

    @property
    def needs_calibration(self) -> bool:
        """Whether this rung can be built only with calibration texts."""
        return self.needs_statistics or self.needs_runs

    @property
    def precision(self) -> Precision:
        """The lowest precision that this rung, made :meth:`for_target`, computes its MatMuls in."""
        if self.scheme == "weight-only" and self.weight_only_bits == 4:
            return "int4"
        if self.scheme != "none":
            return "int8"
        return "bf16" if self.inference_precision == "bf16" else "fp32"

    @property
    def masks_always(self) -> bool:
        """Whether fused attention reads its mask even where there is nothing to mask: only onnxruntime gains by asking first."""
        return self.graph == "fused" and self.engine != "onnxruntime"

    @property
    def portable(self) -> bool:
        """Whether its calibrated products are stored in standard operators, which any engine reads."""
        return self.scheme == "static" and {self.engine, self.encoder_engine} != {"onnxruntime"}

    def for_target(self, *, bf16: bool) -> Rung:
        """This rung with the precision that ``auto`` stands for on a target with or without bfloat16."""
        if self.inference_precision != "auto":
            return self
        return self.model_copy(update={"inference_precision": "bf16" if bf16 else "f32"})

    def session(self) -> SessionSettings:
        """The settings that this rung, made :meth:`for_target`, runs with."""
        return SessionSettings(**self.model_dump(include=set(SESSION_FIELDS)))

    def quantization(self) -> Rung:
        """This rung with nothing but what makes its graph: rungs that differ in the rest share one graph."""
        own = self.scheme == "static" or self.masks_always  # each engine has operators, or a graph, of its own
        others = SESSION_FIELDS - {"engine", "encoder_engine"} if own else SESSION_FIELDS
        return Rung(**{**self.model_dump(exclude={*others, "objectives", "least_budget"}), "name": "any"})


_CALIBRATED_METHODS = frozenset({"gptq", "quant-ease", "awq", "awq-quant-ease", "auto-round"})
SESSION_FIELDS = frozenset(SessionSettings.__dataclass_fields__) & frozenset(Rung.model_fields)


class QuantizeSection(Section):
    """Stage 4: the ladder of candidates. A ``precision`` other than ``auto`` leaves only rungs of that precision."""

    enabled: bool
    precision: Precision | Literal["auto"]
    weight_bits: Literal[7, 8] = Field(
        description="7 keeps u8 x s8 products from saturating on CPUs without VNNI, at a loss of precision"
    )
    sums_in_16_bits: bool = Field(
        description="scale weights so that no two u8 x s8 products exceed 16 bits, in which CPUs without VNNI add them; set for such targets"
    )
    calibration_examples: int = Field(ge=8, le=4096)
    engines: tuple[Engine, ...] | Literal["auto"] = Field(
        description="engines that may compete; auto: onnxruntime, and where candidates are timed whatever else is installed"
    )
    ladder: tuple[Rung, ...]
    fallback: Literal["off", "needed", "thorough"] = Field(
        description="search MatMuls to return to float, for rungs that missed the accuracy gate: when no quantized candidate holds it "
        "or such a rung is at least a fifth faster (needed), or whenever it is faster than the best that holds it (thorough); of decoders: "
        "search what of a rung of 4 bit needs 8, when no quantized candidate holds the gate (needed) or always (thorough)"
    )
    search_seconds: float = Field(gt=0, description="when the search ends with the best found so far")

    @property
    def weights(self) -> WeightFormat:
        """How weights are stored."""
        return WeightFormat(self.weight_bits, self.sums_in_16_bits)


class AccuracySection(Section):
    """Stage 5 and its gates.

    ``max_loss`` is relative (0.01 = 1 %); the one-sided 95 % bound of the loss must lie inside. ``min_cosine`` gates vectors
    (lower bound of the mean). Without labels ``max_loss`` gates the accuracy to expect by the source's own probabilities, and
    ``min_agreement`` the share of equal answers (lower bound); where a model gives a single number, ``min_same_order`` gates the
    share of pairs of texts that it puts in the same order. ``batch_invariance`` is the smallest cosine allowed between an example
    alone and in a padded batch. Of parts of the data (by length, label, language) with at least ``slice_examples`` examples none
    may be proven to lose more than ``max_slice_loss`` (null: 3 times ``max_loss``).
    """

    max_loss: float = Field(gt=0, lt=1)
    max_slice_loss: float | None = Field(gt=0, lt=1)
    slice_examples: int = Field(ge=10)
    min_cosine: float = Field(gt=0, le=1)
    min_agreement: float = Field(gt=0, le=1)
    min_same_order: float = Field(gt=0, le=1)
    batch_invariance: float = Field(gt=0, le=1)
    max_examples: int = Field(ge=8)
    max_tokens: int = Field(
        default=5000, ge=100, description="of models that write: tokens of text, or of answers, that every candidate reads"
    )
    resamples: int = Field(ge=200, le=20000)

    @property
    def slice_limit(self) -> float:
        """The largest loss of a slice that is not held against a candidate."""
        return self.max_slice_loss if self.max_slice_loss is not None else min(1.0, SLICE_FACTOR * self.max_loss)


class MeasureSection(Section):
    """How candidates are timed: the grid (batch x sequence) with equal weights, the objective that ranks them, and limits.

    ``threads`` is how many the artifact will run with; null: as many as there are cores, fewer where that is measured to be faster.
    ``max_p95_ms`` bounds the 95th percentile of the time of a run, at every point of the workload; ``max_size_bytes`` the graph
    with its weights. What exceeds a limit cannot ship, the float graph included.
    """

    workload: tuple[str, ...] = Field(min_length=1)
    objective: Objective
    threads: int | None = Field(ge=1, le=1024)
    max_p95_ms: float | None = Field(gt=0)
    max_size_bytes: int | None = Field(gt=0)
    seconds_per_point: float = Field(gt=0)


class Recipe(Section):
    """A resolved recipe. ``model_types`` are the ``model_type`` values of config.json it is chosen for."""

    name: str
    description: str
    extends: str | None = None
    model_types: tuple[str, ...] = ()
    seed: int
    export: ExportSection
    parity: ParitySection
    optimize: OptimizeSection
    fuse: FuseSection
    quantize: QuantizeSection
    accuracy: AccuracySection
    measure: MeasureSection

"""The shape of a recipe: what to do for one architecture. Data only; the defaults stand once, in ``recipes/encoder.yaml``.

Unknown keys are errors (``extra="forbid"``): an ignored typo would ship an unquantized model. All models are frozen.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hfaccel.artifact.contract import Precision

ExporterName = Literal["transformers", "torch"]
CleanupName = Literal["fold_constants", "common_subexpressions", "drop_unused", "name_symbols"]
RewriteName = Literal["last_layer_pooled_token"]
GraphScope = Literal["optimized", "fused"]
Objective = Literal["latency", "throughput", "size"]


class Section(BaseModel):
    """Base of all recipe sections: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ExportSection(Section):
    """Stage 1. ``exporters`` are tried in order; the first whose graph passes parity is taken."""

    exporters: tuple[ExporterName, ...] = Field(min_length=1)
    opset: int = Field(ge=18, le=23)
    attention: Literal["sdpa", "eager"]


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
    """Stage 3. ``contract``: operator -> expected count, a formula over the model's config (``2 * num_hidden_layers``)."""

    enabled: bool
    contract: dict[str, str]


class Rung(Section):
    """One candidate of the quantization ladder.

    Attributes:
        name: unique name, as reports show it.
        scheme: ``dynamic`` (activation ranges per call) or ``static`` (calibrated ranges, QDQ).
        graph: quantize the optimized (unfused) or the fused float graph.
        per_channel: one weight scale per output channel.
        smooth: move activation outliers into the weights before quantizing (SmoothQuant); needs calibration data.
        outlier_neurons: feed-forward neurons per layer that stay in float because their activations are outliers; needs
            calibration data. 0 = none.
        keep_float: how many of the most sensitive MatMuls stay in float; needs calibration data. 0 = none.
        float_matmuls: names of MatMuls that stay in float, as the search for a fallback found them for this very checkpoint.
        quantize_embeddings: also store embedding tables in 8 bit.
        calibration: range estimator of the static scheme.
        disabled_optimizers: onnxruntime fusions to leave out when this candidate runs.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    scheme: Literal["dynamic", "static"]
    graph: GraphScope
    per_channel: bool = True
    smooth: float | None = Field(default=None, gt=0, lt=1)
    outlier_neurons: int = Field(default=0, ge=0, le=256)
    keep_float: int = Field(default=0, ge=0)
    float_matmuls: tuple[str, ...] = ()
    quantize_embeddings: bool = False
    calibration: Literal["minmax", "percentile"] = "minmax"
    disabled_optimizers: tuple[str, ...] = ()

    @property
    def needs_calibration(self) -> bool:
        """Whether this rung can be built only with calibration data."""
        return self.scheme == "static" or self.smooth is not None or self.outlier_neurons > 0 or self.keep_float > 0


class QuantizeSection(Section):
    """Stage 4: the ladder of candidates. ``precision`` fp32 skips the stage; ``auto`` lets the float graph compete."""

    enabled: bool
    precision: Precision | Literal["auto"]
    weight_bits: Literal[7, 8] = Field(description="7 where u8 x s8 products saturate (CPUs without VNNI)")
    calibration_examples: int = Field(ge=8, le=4096)
    ladder: tuple[Rung, ...]
    fallback: Literal["off", "needed", "thorough"] = Field(
        description="search MatMuls to return to float: for rungs that missed the accuracy gate when none holds it (needed), "
        "or whenever such a rung is faster than the best that holds it (thorough)"
    )
    search_seconds: float = Field(gt=0, description="when the search ends with the best found so far")


class AccuracySection(Section):
    """Stage 5 and its gates.

    ``max_loss`` is relative (0.01 = 1 %); the one-sided 95 % bound of the loss must lie inside. ``min_cosine`` gates vectors
    (lower bound of the mean), ``min_agreement`` the label-free top-1 agreement (lower bound). ``batch_invariance`` is the
    smallest cosine allowed between an example alone and in a padded batch.
    """

    max_loss: float = Field(gt=0, lt=1)
    min_cosine: float = Field(gt=0, le=1)
    min_agreement: float = Field(gt=0, le=1)
    batch_invariance: float = Field(gt=0, le=1)
    max_examples: int = Field(ge=8)
    resamples: int = Field(ge=200, le=20000)


class MeasureSection(Section):
    """How candidates are timed: the grid (batch x sequence) with equal weights, and the objective that ranks them."""

    workload: tuple[str, ...] = Field(min_length=1)
    objective: Objective
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

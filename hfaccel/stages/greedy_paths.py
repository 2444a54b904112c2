"""How what ships continues prompts, beside the float graph: told in the reports, refusing nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfaccel.evaluate.greedy_paths import GreedyAgreement, PathPrompt, greedy_agreement
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.sampling import SamplingSettings
from hfaccel.stages.candidates import FLOAT_PARENT, Candidate
from hfaccel.stages.parents import graph_path

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.stages.base import StageContext

STEPS = 64
"""Tokens that each prompt is continued by: enough for paths to part, and some seconds of work."""


def with_greedy_paths(
    chosen: Candidate,
    model: GenerationModel,
    judged: Sequence[Candidate],
    prompts: Sequence[PathPrompt],
    quantized: Artifact,
    ctx: StageContext,
) -> Candidate:
    """The candidate with ``greedy`` in its verdict: how much of 64 greedy steps it writes as the float graph does.

    The float graph stands for the source: parity has proved it to be, and it has a cache. Where it ships itself, or is not there,
    there is nothing to compare. The gate is the perplexity of given text; see :mod:`hfaccel.evaluate.greedy_paths` for why this
    cannot be one.

    Args:
        chosen: what ships, of a decoder.
        model: that it is, open.
        judged: all candidates.
        prompts: of texts that nothing was calibrated on.
        quantized: of the quantize stage.
        ctx: of the stage.
    """
    floating = next((item for item in judged if item.name == FLOAT_PARENT), None)
    if floating is None or chosen.name == FLOAT_PARENT or not prompts:
        return chosen
    ctx.progress.step(f"continuing {len(prompts)} prompts by {STEPS} tokens")
    contract = quantized.contract
    assert contract.generation is not None  # asked of decoders only
    decoder = Decoder(graph_path(floating, quantized, ctx), floating.session, contract.generation)
    source = GenerationModel(decoder, ctx.artifacts["export"].folder, contract)
    clusters = [prompt.cluster for prompt in prompts]
    found: GreedyAgreement = greedy_agreement(_continued(source, prompts), _continued(model, prompts), clusters, steps=STEPS)
    return replace(chosen, verdict={**(chosen.verdict or {}), "greedy": found.to_json()})


def _continued(model: GenerationModel, prompts: Sequence[PathPrompt]) -> list[list[int]]:
    """What the run time of the compiled folder writes after each prompt, all of them in one batch."""
    return model.generate_ids([prompt.ids for prompt in prompts], SamplingSettings(max_new_tokens=STEPS), max_batch=len(prompts))

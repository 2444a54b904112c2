"""What ships: the chosen graph as serving teams open it, with golden answers that show whether it was opened right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.evaluate.cached_decoding import open_encoder_decoder
from hfaccel.evaluate.prompted import PromptReader
from hfaccel.evaluate.sample import multilingual_sample
from hfaccel.rewrites.graphs import GRAPH_NAME, copy_graph
from hfaccel.rewrites.split_encoder_decoder import DECODER_NAME, ENCODER_NAME, write_parts
from hfaccel.runtime.answering import answering_model
from hfaccel.runtime.engines import open_graph
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.model import Model
from hfaccel.runtime.speech.model import SpeechModel

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.artifact.contract import Contract, SessionSettings
    from hfaccel.evaluate.example import Example
    from hfaccel.runtime.tokenizer import TextTokenizer
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.candidates import Candidate
    from hfaccel.stages.own_answers import Answers

GOLDEN_TEXTS = 4
GOLDEN_TONES_HZ = (220.0, 440.0)
"""Sound has no text that it is made of; tones are made anew everywhere, to the bit."""


def write_shipped(graph: Path, chosen: Candidate, contract: Contract, tokenizer: TextTokenizer, ctx: StageContext) -> str:
    """Write a graph, and its golden answers, into the stage's folder.

    Args:
        graph: of the candidate.
        chosen: the candidate.
        contract: of the graph.
        tokenizer: of the checkpoint.
        ctx: of the stage.

    Returns:
        File name of the graph; of an encoder-decoder, whose parts become two files, that of the decoder.
    """
    generation = contract.generation
    if generation is not None and generation.encoder is not None:
        write_parts(graph, ctx.workdir)
        name = DECODER_NAME
    else:
        copy_graph(graph, ctx.workdir)
        name = GRAPH_NAME
    speech = generation is not None and generation.encoder is not None and generation.encoder.speech is not None
    inputs: list[Any] = list(GOLDEN_TONES_HZ) if speech else [str(text) for text in multilingual_sample().texts()[:GOLDEN_TEXTS]]
    outputs = _raw_outputs(inputs, chosen, contract, tokenizer, ctx)
    golden = ctx.workdir / "golden"
    golden.mkdir()
    (golden / "inputs.json").write_text(json.dumps(inputs, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    arrays = {f"{index}/{name}": array for index, item in enumerate(outputs) for name, array in item.items()}
    with (golden / "outputs.npz").open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # the stub takes the keyword allow_pickle for one of ours
    return name


def written_by(graph: Path, session: SessionSettings, contract: Contract, ctx: StageContext) -> Answers:
    """How a graph of a generative model answers examples: with the run time of the compiled folder.

    A decoder writes no more than the examples' references call for; see :class:`hfaccel.evaluate.prompted.AnswerLimits`.

    Args:
        graph: of the model.
        session: that it runs with.
        contract: of the graph.
        ctx: of the stage.
    """
    folder, generation = ctx.artifacts["export"].folder, contract.generation
    assert generation is not None  # asked of generative models only

    def answer(examples: Sequence[Example]) -> list[str]:
        parts = open_encoder_decoder(graph, session, generation)
        model = answering_model(parts, folder, contract)
        sources = [str(example.text) for example in examples]
        if isinstance(model, SpeechModel):
            return [transcript.text for transcript in model.transcribe(sources)]
        answers: list[str] = model.generate(sources)
        return answers

    def go_on(examples: Sequence[Example]) -> list[str]:
        reader = PromptReader(folder)
        model, limits = GenerationModel(Decoder(graph, session, generation), folder, contract), reader.limits(examples)
        prompts = [reader.prompt(example) for example in examples]
        texts = model.generate(prompts, max_new_tokens=limits.max_new_tokens, do_sample=False, stop=limits.stop)
        return [str(text).strip() for text in texts]

    return go_on if generation.encoder is None else answer


def _raw_outputs(
    inputs: Sequence[Any], chosen: Candidate, contract: Contract, tokenizer: TextTokenizer, ctx: StageContext
) -> list[dict[str, np.ndarray]]:
    """As ``raw_outputs`` of the loaded folder gives them."""
    generation, folder = contract.generation, ctx.artifacts["export"].folder
    if generation is None:
        return Model(open_graph(ctx.workdir / GRAPH_NAME, chosen.session), tokenizer, contract).raw_outputs(inputs)
    if generation.encoder is None:
        decoder = Decoder(ctx.workdir / GRAPH_NAME, chosen.session, generation)
        return GenerationModel(decoder, folder, contract).raw_outputs(inputs)
    parts = EncoderDecoder.open(ctx.workdir / ENCODER_NAME, ctx.workdir / DECODER_NAME, chosen.session, generation)
    return answering_model(parts, folder, contract).raw_outputs(inputs)

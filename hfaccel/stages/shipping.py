"""What ships: the chosen graph as serving teams open it, with golden answers that show whether it was opened right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.evaluate.cached_decoding import open_encoder_decoder
from hfaccel.evaluate.prompted import PromptReader
from hfaccel.evaluate.sample import multilingual_sample
from hfaccel.rewrites.graphs import GRAPH_NAME, copy_graph
from hfaccel.rewrites.split_encoder_decoder import DECODER_NAME, ENCODER_NAME, write_parts
from hfaccel.runtime.answering import answering_model
from hfaccel.runtime.cores import physical_cores
from hfaccel.runtime.engines import open_graph
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.text_to_text import TextToTextModel
from hfaccel.runtime.model import Model
from hfaccel.runtime.speech.model import SpeechModel

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.artifact.contract import Contract, SessionSettings
    from hfaccel.evaluate.example import Example
    from hfaccel.runtime.tokenizer import TextTokenizer
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.own_answers import Answers

Shipped = Model | GenerationModel | TextToTextModel | SpeechModel

GOLDEN_TEXTS = 4
GOLDEN_TONES_HZ = (220.0, 440.0)
"""Sound has no text that it is made of; tones are made anew everywhere, to the bit."""


def write_graph(graph: Path, contract: Contract, ctx: StageContext) -> str:
    """Write a candidate's graph into the stage's folder.

    Returns:
        Its file name; of an encoder-decoder, whose parts become two files, that of the decoder.
    """
    if contract.generation is not None and contract.generation.encoder is not None:
        write_parts(graph, ctx.workdir)
        return DECODER_NAME
    copy_graph(graph, ctx.workdir)
    return GRAPH_NAME


def open_shipped(session: SessionSettings, contract: Contract, tokenizer: TextTokenizer, ctx: StageContext) -> Shipped:
    """What :func:`write_graph` has written, as the compiled folder will be opened."""
    generation, folder = contract.generation, ctx.artifacts["export"].folder
    if generation is None:
        return Model(open_graph(ctx.workdir / GRAPH_NAME, session), tokenizer, contract)
    if generation.encoder is None:
        threads = session.intra_op_num_threads or physical_cores()
        # Threads of one of its graphs that wait actively would take the cores from the other, which in use runs alone.
        alone = replace(session, intra_op_num_threads=threads, spin_after_run=False)
        return GenerationModel(Decoder(ctx.workdir / GRAPH_NAME, alone, generation), folder, contract)
    parts = EncoderDecoder.open(ctx.workdir / ENCODER_NAME, ctx.workdir / DECODER_NAME, session, generation)
    return answering_model(parts, folder, contract)


def write_golden(model: Shipped, contract: Contract, ctx: StageContext) -> None:
    """Write golden answers of what ships into the stage's folder."""
    generation = contract.generation
    speech = generation is not None and generation.encoder is not None and generation.encoder.speech is not None
    inputs: list[Any] = list(GOLDEN_TONES_HZ) if speech else [str(text) for text in multilingual_sample().texts()[:GOLDEN_TEXTS]]
    outputs = model.raw_outputs(inputs)
    golden = ctx.workdir / "golden"
    golden.mkdir()
    (golden / "inputs.json").write_text(json.dumps(inputs, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    arrays = {f"{index}/{name}": array for index, item in enumerate(outputs) for name, array in item.items()}
    with (golden / "outputs.npz").open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # the stub takes the keyword allow_pickle for one of ours


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

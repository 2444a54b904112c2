"""The steps from transformers without a cache to a compiled decoder, each ready to be timed on the same request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfaccel.artifact.contract import SessionSettings
from hfaccel.measure.cached_stages import graph_steps
from hfaccel.measure.decoding import Request
from hfaccel.measure.ladder import HUGE_PAGES_NOTE, RUST_TOKENIZER, LeftOut, Rung, Share, Way, interpolation_weights, is_default
from hfaccel.measure.workload import Point, make_texts
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.sampling import PROMPT_LOOKUP_NUM_TOKENS, SamplingSettings

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.source.model import SourceModel

_STEPS_AT_A_LENGTH = 4
_LENGTHS = 3
_GUESSED = "tokens guessed ahead (prompt lookup)"


@dataclass(frozen=True)
class DecoderWay:
    """What the steps are made from.

    Attributes:
        folder: the artifact.
        model: the artifact, open as its manifest says.
        manifest: of the artifact.
        source: the causal language model of transformers, which is changed: its end tokens are taken away.
        stages: float graphs by stage, at least that of the export.
        request: tokens of the prompt, about, and new ones.
        threads: that every step may use.
        huge_pages: whether the weights of ``model`` lie in such pages, where those of the other steps do not.
        python: ids of a text as a tokenizer in Python gives them, or why there is none, in one line.
        prompts: texts that people wrote, each of about as many tokens as the request; none: everyday words stand in, and the step
            that guesses tokens is left out.
        together: requests that the last step answers at once; 1 leaves it out.
    """

    folder: Path
    model: GenerationModel
    manifest: Mapping[str, Any]
    source: Any
    stages: Mapping[str, Artifact]
    request: Request
    threads: int
    huge_pages: bool
    python: Callable[[str], list[int]] | str
    prompts: Sequence[str] = ()
    together: int = 1

    @property
    def first_tokenizer(self) -> Callable[[str], list[int]]:
        """The one in Python where there is one."""
        return self.model.encode if isinstance(self.python, str) else self.python


def python_encoder(source: SourceModel, folder: Path, model: GenerationModel) -> Callable[[str], list[int]] | str:
    """Ids as the tokenizer in Python of a checkpoint gives them, or why there is none that gives those of the artifact.

    Args:
        source: the checkpoint.
        folder: the artifact.
        model: the artifact, open.
    """
    from hfaccel.measure.peers.texts import packaged_texts
    from hfaccel.measure.python_tokenizer import load_python_tokenizer

    library = load_python_tokenizer(source, folder)
    if isinstance(library, str):
        return library

    def encode(text: str) -> list[int]:
        ids: list[int] = library(text, verbose=False)["input_ids"]
        return ids

    texts = [str(text) for text in packaged_texts(model.contract)[0]]
    others = sum(encode(text) != model.encode(text) for text in texts)
    return f"{type(library).__name__} gives other ids on {others} of {len(texts)} texts" if others else encode


def decoder_way(way: DecoderWay, *, seed: int = 0) -> Way:
    """The steps in order. Each answers the same text greedily, with all new tokens whatever the model says."""
    texts = way.prompts or _made_up(way.model, Point(way.together, way.request.prompt), seed)
    text = texts[0]
    defaults = SessionSettings(intra_op_num_threads=way.threads)
    cached = Share("with cache", _transformers(way, text, way.first_tokenizer, use_cache=True))
    rungs = [_without_cache(way, text), Rung("key-value cache (use_cache=True)", (cached,))]
    left_out: list[LeftOut] = []
    if isinstance(way.python, str):
        left_out.append(LeftOut(RUST_TOKENIZER, way.python))
    else:
        rungs.append(Rung(RUST_TOKENIZER, (Share("Rust", _transformers(way, text, way.model.encode, use_cache=True)),)))
    for what, graph in graph_steps(way.stages, way.manifest, way.folder):
        rungs.append(_session_rung(what, graph, defaults, way, text))
    rungs.append(_tuned(way, text, rungs[-1]))
    if not way.prompts:
        left_out.append(LeftOut(_GUESSED, "how much an answer repeats depends on the text: give your own with --stream FILE"))
    elif not way.model.decoder.gives_several_logits:
        left_out.append(LeftOut(_GUESSED, "the graph gives the logits of one token only, as older versions made it"))
    else:
        rungs.append(_guessing(way))
    if way.together > 1:
        rungs.append(_together(way, [texts[index % len(texts)] for index in range(way.together)]))
    return Way(tuple(rungs), tuple(left_out))


def _made_up(model: GenerationModel, point: Point, seed: int) -> tuple[str, ...]:
    return tuple(make_texts(point, lambda text: len(model.encode(text)), seed=seed))


def _without_cache(way: DecoderWay, text: str) -> Rung:
    """The whole request where it is short, else some steps at several lengths that stand for the others."""
    tokenizer = "" if isinstance(way.python, str) else ", tokenizer in Python"
    what, new = f"transformers eager, no cache (use_cache=False){tokenizer}", way.request.new
    encode = way.first_tokenizer
    if new <= _LENGTHS * _STEPS_AT_A_LENGTH:
        return Rung(what, (Share("no cache", _transformers(way, text, encode, use_cache=False)),))
    ids = encode(text)
    last = len(ids) + new - _STEPS_AT_A_LENGTH
    starts = [len(ids) + (last - len(ids)) * index // (_LENGTHS - 1) for index in range(_LENGTHS)]
    # A prompt goes through the model anew for every token, so what its tokens are does not matter; its length does.
    longer = ids + [ids[index % len(ids)] for index in range(new)]
    # Steps from a start on stand for the middle of the lengths that they cover.
    middles = [start + (_STEPS_AT_A_LENGTH - 1) // 2 for start in starts]
    weights = interpolation_weights(middles, len(ids), new)
    shares = tuple(
        Share(
            f"no cache from {start}",
            _generate(way.source, lambda length=start: longer[:length], _STEPS_AT_A_LENGTH, use_cache=False),  # type: ignore[misc]
            weight / _STEPS_AT_A_LENGTH,
        )
        for start, weight in zip(starts, weights, strict=True)
    )
    lengths = ", ".join(map(str, starts))
    note = (
        f"extrapolated by length from {_STEPS_AT_A_LENGTH} new tokens timed after each of {lengths} tokens, in place of all {new}"
    )

    def tokenize() -> None:
        encode(text)

    return Rung(f"{what}, extrapolated", (Share("tokenize", tokenize), *shares), note)


def _transformers(way: DecoderWay, text: str, encode: Callable[[str], list[int]], *, use_cache: bool) -> Callable[[], None]:
    return _generate(way.source, lambda: encode(text), way.request.new, use_cache=use_cache)


def _generate(source: Any, encode: Callable[[], list[int]], new_tokens: int, *, use_cache: bool) -> Callable[[], None]:
    """A run of ``generate`` as transformers has it."""
    import torch
    from transformers import GenerationConfig

    # Without end tokens: every step answers with as many.
    source.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def run() -> None:
        ids = torch.tensor([encode()])
        with torch.inference_mode():
            answer = source.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, use_cache=use_cache)
        if answer.shape[1] != ids.shape[1] + new_tokens:
            raise RuntimeError(f"transformers stopped after {answer.shape[1] - ids.shape[1]} of {new_tokens} tokens")

    return run


def _session_rung(what: str, graph: Path, settings: SessionSettings, way: DecoderWay, text: str) -> Rung:
    generation = way.model.contract.generation
    assert generation is not None  # a GenerationModel checks it
    return Rung(what, (Share(what, _answer(Decoder(graph, settings, generation), way, text)),))


def _tuned(way: DecoderWay, text: str, before: Rung) -> Rung:
    """The artifact as it is; timed anew only if its session or its memory differs from the step before."""
    what = "tuned session: the artifact as it is"
    session = SessionSettings.from_json(way.manifest.get("session", {}))
    if not way.huge_pages and is_default(session, way.threads):
        return Rung(what, before.shares, "its session has the default settings, so this is the run of the step before")
    note = HUGE_PAGES_NOTE if way.huge_pages else ""
    return Rung(what, (Share(what, _answer(way.model.decoder, way, text)),), note)


def _together(way: DecoderWay, texts: Sequence[str]) -> Rung:
    """Several requests in one batch; as long as all of them, the time of one is its part."""
    what = f"{len(texts)} requests answered together"
    note = f"the time of a batch of {len(texts)} requests, divided by {len(texts)}; the steps before answer one after the other"
    return Rung(what, (Share(what, _answer(way.model.decoder, way, *texts), 1 / len(texts)),), note)


def _guessing(way: DecoderWay) -> Rung:
    """One request after the other, with tokens guessed ahead: how many are right differs from text to text."""
    count = len(way.prompts)
    runs = [_answer(way.model.decoder, way, text, guesses=PROMPT_LOOKUP_NUM_TOKENS) for text in way.prompts]

    def run() -> None:
        for answer in runs:
            answer()

    note = f"the mean of {count} texts; the steps before are timed on the first of them, whose words do not matter to them"
    return Rung(_GUESSED, (Share(_GUESSED, run, 1 / count),), note)


def _answer(decoder: Decoder, way: DecoderWay, *texts: str, guesses: int = 0) -> Callable[[], None]:
    """A request to the run time, or several: tokenize, read, write greedily; nothing is kept from the request before."""
    contract = way.model.contract
    assert contract.generation is not None  # a GenerationModel checks it
    endless = replace(contract, generation=replace(contract.generation, end_token_ids=()))
    model = GenerationModel(decoder, way.folder, endless)
    settings = SamplingSettings(max_new_tokens=way.request.new, prompt_lookup_num_tokens=guesses)

    def run() -> None:
        decoder.forget()
        model.generate_ids([model.encode(text) for text in texts], settings, max_batch=len(texts))

    return run

"""The steps from transformers without a cache to a compiled decoder, each ready to be timed on the same request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfaccel.artifact.contract import SessionSettings
from hfaccel.errors import SettingsError
from hfaccel.measure.decoding import Request
from hfaccel.measure.ladder import Rung, Share, interpolation_weights
from hfaccel.measure.workload import Point, make_texts
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.sampling import SamplingSettings

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact

EXPORT, FUSE = "export", "fuse"
_STEPS_AT_A_LENGTH = 4
_LENGTHS = 3


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
    """

    folder: Path
    model: GenerationModel
    manifest: Mapping[str, Any]
    source: Any
    stages: Mapping[str, Artifact]
    request: Request
    threads: int


def check_stages(stages: Mapping[str, Artifact], manifest: Mapping[str, Any], folder: Path) -> None:
    """Refuse a way whose float graphs are gone.

    Raises:
        SettingsError: the stage cache has lost the export, or a fused graph that was made.
    """
    made = [str(record["stage"]) for record in manifest.get("stages", ()) if record.get("status") != "skipped"]
    missing = [name for name in (EXPORT, FUSE) if name not in stages and (name == EXPORT or name in made)]
    if missing:
        source = manifest.get("source", {}).get("id", "MODEL")
        raise SettingsError(
            f"the stage cache no longer holds the float graphs of this folder ({', '.join(missing)})",
            where=str(folder),
            hint=f"compile it again, on this machine: hfaccel compile {source} -o {folder} --force; "
            "or point HFACCEL_CACHE to the cache that it was compiled with",
        )


def decoder_rungs(way: DecoderWay, *, seed: int = 0) -> tuple[Rung, ...]:
    """The steps in order. Each answers the same text greedily, with all new tokens whatever the model says."""
    text = _prompt_text(way.model, way.request.prompt, seed)
    defaults = SessionSettings(intra_op_num_threads=way.threads)
    rungs = [
        _without_cache(way, text),
        Rung("key-value cache (use_cache=True)", (Share("with cache", _transformers(way, text, use_cache=True)),)),
        _session_rung("compiled: exported float graph, default session", way.stages[EXPORT].graph_path, defaults, way, text),
    ]
    if FUSE in way.stages:
        rungs.append(_session_rung("fused: rewritten float graph", way.stages[FUSE].graph_path, defaults, way, text))
    graph = way.folder / str(way.manifest["graph"])
    precision = str(way.manifest.get("precision", ""))
    what = "the artifact's graph, default session" if precision == "fp32" else f"quantized to {precision}, default session"
    rungs.append(_session_rung(what, graph, defaults, way, text))
    rungs.append(_tuned(way, text, rungs[-1]))
    return tuple(rungs)


def _prompt_text(model: GenerationModel, tokens: int, seed: int) -> str:
    return make_texts(Point(1, tokens), lambda text: len(model.encode(text)), seed=seed)[0]


def _without_cache(way: DecoderWay, text: str) -> Rung:
    """The whole request where it is short, else some steps at several lengths that stand for the others."""
    what, new = "transformers eager, no cache (use_cache=False)", way.request.new
    if new <= _LENGTHS * _STEPS_AT_A_LENGTH:
        return Rung(what, (Share("no cache", _transformers(way, text, use_cache=False)),))
    ids = way.model.encode(text)
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
    return Rung(f"{what}, extrapolated", shares, note)


def _transformers(way: DecoderWay, text: str, *, use_cache: bool) -> Callable[[], None]:
    return _generate(way.source, lambda: way.model.encode(text), way.request.new, use_cache=use_cache)


def _generate(source: Any, encode: Callable[[], list[int]], new_tokens: int, *, use_cache: bool) -> Callable[[], None]:
    """A run of ``generate`` as transformers has it. Tokenizing is done by the artifact's tokenizer, as in all steps."""
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
    """The artifact as it is; timed anew only if its session differs from the defaults in more than the number of threads."""
    what = "tuned session: the artifact as it is"
    session = SessionSettings.from_json(way.manifest.get("session", {}))
    if replace(session, intra_op_num_threads=0) == SessionSettings():
        return Rung(what, before.shares, "its session has the default settings, so this is the run of the step before")
    return Rung(what, (Share(what, _answer(way.model.decoder, way, text)),))


def _answer(decoder: Decoder, way: DecoderWay, text: str) -> Callable[[], None]:
    """A request to the run time: tokenize, read, write greedily; nothing is kept from the request before."""
    contract = way.model.contract
    assert contract.generation is not None  # a GenerationModel checks it
    endless = replace(contract, generation=replace(contract.generation, end_token_ids=()))
    model = GenerationModel(decoder, way.folder, endless)
    settings = SamplingSettings(max_new_tokens=way.request.new)

    def run() -> None:
        decoder.forget()
        model.generate_ids([model.encode(text)], settings)

    return run

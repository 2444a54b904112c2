"""Peers of text generation: each is opened and asked for some logits, or says in one line why it cannot take part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from hfaccel.errors import UsageError
from hfaccel.measure.likeness import Likeness
from hfaccel.measure.peers import missing_packages
from hfaccel.measure.peers.genai_decoder import CONFIG_FILE, GenaiDecoder
from hfaccel.measure.peers.llama_cpp_decoder import LlamaCppDecoder
from hfaccel.measure.peers.open import Absent, one_line
from hfaccel.measure.peers.openvino_decoder import MODEL_FILE, OpenvinoDecoder
from hfaccel.measure.token_engines import TokenEngine

DecoderPeerName = Literal["torch", "onnxruntime-genai", "openvino", "llama-cpp"]
DECODER_PEERS: tuple[DecoderPeerName, ...] = get_args(DecoderPeerName)
_HOW_TO_NAME = (
    f"known peers: torch, onnxruntime-genai=FOLDER (a folder with {CONFIG_FILE}), openvino=FOLDER (a folder with {MODEL_FILE}), "
    "llama-cpp=FILE.gguf"
)
_PACKAGES: Mapping[DecoderPeerName, tuple[str, str]] = {
    "onnxruntime-genai": ("onnxruntime_genai", "onnxruntime-genai"),
    "openvino": ("openvino", "openvino"),
    "llama-cpp": ("llama_cpp", "llama-cpp-python"),
}
"""The module of a peer, and what to install for it."""
_FOLDERS: Mapping[DecoderPeerName, tuple[str, str]] = {
    "onnxruntime-genai": (CONFIG_FILE, "its model builder"),
    "openvino": (MODEL_FILE, "optimum-cli export openvino"),
}
"""Of peers that read a folder of their own: a file in it, and what makes it."""


@dataclass(frozen=True)
class DecoderPeer:
    """A peer that was asked for; ``model`` is the folder or file that it reads, None for torch."""

    name: DecoderPeerName
    model: Path | None = None


@dataclass(frozen=True)
class OpenDecoder:
    """An open engine: its name in reports, and how far its logits are the source's (None: not compared)."""

    label: str
    engine: TokenEngine
    likeness: Likeness | None = None


@dataclass(frozen=True)
class OpenDecoders:
    """The artifact, and peers and absentees in the order asked for."""

    artifact: OpenDecoder
    peers: tuple[OpenDecoder, ...]
    absent: tuple[Absent, ...]


def parse_decoder_peers(text: str) -> tuple[DecoderPeer, ...]:
    """Read peers of text generation, separated by commas; an empty text is no peer.

    Raises:
        UsageError: one is not known, or names no model that its engine can open.
    """
    found: dict[DecoderPeer, None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, model = part.partition("=")
        known = next((item for item in DECODER_PEERS if item == name.strip().lower()), None)
        if known is None or (known == "torch" and equals):
            raise UsageError(f"no peer '{part}' to compare text generation with", where="--against", hint=_HOW_TO_NAME)
        _check_model(known, model)
        found[DecoderPeer(known, Path(model) if equals else None)] = None
    return tuple(found)


def _check_model(name: DecoderPeerName, model: str) -> None:
    file, maker = _FOLDERS.get(name, (None, ""))
    if file is not None and not (Path(model) / file).is_file():
        raise UsageError(
            f"{name} needs a model folder of its own, and '{model}' has no {file}",
            where="--against",
            hint=f"write {name}=FOLDER, with a folder that {maker} made from the same checkpoint",
        )
    if name == "llama-cpp" and not Path(model).is_file():
        raise UsageError(
            f"llama.cpp reads a GGUF file, and there is none at '{model}'",
            where="--against",
            hint="write llama-cpp=FILE.gguf, with a file made from the same checkpoint",
        )


def open_decoders(
    peers: Sequence[DecoderPeer],
    artifact: TokenEngine,
    load_source: Callable[[], Any],
    *,
    threads: int,
    prompts: Sequence[Sequence[int]],
    most_tokens: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> OpenDecoders:
    """Open peers. Sets torch's number of threads for the whole process, where torch is asked for.

    Args:
        peers: what to compare with; likeness is told only where torch, the source, is among them.
        artifact: what is compared.
        load_source: gives the causal language model of transformers.
        threads: threads that each may use.
        prompts: token ids on which logits are compared with the source's.
        most_tokens: that a request has, prompt and answer together.
        on_step: told what is being opened now.
    """
    room = max(most_tokens, *map(len, prompts)) + 1
    engines: dict[str, TokenEngine] = {}
    absent: list[Absent] = []
    reference: list[np.ndarray] = []
    for peer in peers:
        on_step(f"opening {peer.name}")
        missing = _missing(peer.name)
        if missing:
            absent.append(Absent(peer.name, f"not installed (pip install {' '.join(missing)})"))
            continue
        try:
            label, engine = _open(peer, load_source, threads, room)
            logits = [engine.logits(prompt) for prompt in prompts]
        except Exception as error:  # other libraries fail in any way; the others are compared all the same
            absent.append(Absent(peer.name, one_line(error)))
            continue
        engines[label] = engine
        if peer.name == "torch":
            reference = logits

    def opened(label: str, engine: TokenEngine) -> OpenDecoder:
        return OpenDecoder(label, engine, _likeness(reference, engine, prompts) if reference else None)

    return OpenDecoders(
        opened("artifact", artifact), tuple(opened(label, engine) for label, engine in engines.items()), tuple(absent)
    )


def _missing(name: DecoderPeerName) -> tuple[str, ...]:
    if name == "torch":
        return missing_packages("torch")
    module, package = _PACKAGES[name]
    return () if find_spec(module) is not None else (package,)


def _open(peer: DecoderPeer, load_source: Callable[[], Any], threads: int, room: int) -> tuple[str, TokenEngine]:
    """The name and the engine of a peer, with room for so many tokens; its library is imported only now."""
    if peer.name == "onnxruntime-genai" and peer.model is not None:
        return f"onnxruntime-genai {peer.model.resolve().name}", GenaiDecoder(peer.model, threads)
    if peer.name == "openvino" and peer.model is not None:
        return f"openvino {peer.model.resolve().name}", OpenvinoDecoder(peer.model, threads)
    if peer.name == "llama-cpp" and peer.model is not None:
        return f"llama.cpp {peer.model.stem}", LlamaCppDecoder(peer.model, threads, room)
    import torch

    from hfaccel.measure.peers.torch_decoder import TorchDecoder

    torch.set_num_threads(threads)
    return "torch fp32", TorchDecoder(load_source())


def _likeness(reference: Sequence[np.ndarray], engine: TokenEngine, prompts: Sequence[Sequence[int]]) -> Likeness:
    """Agreement of the logits that follow the prompts."""
    own = [engine.logits(prompt) for prompt in prompts]
    pairs = list(zip(own, reference, strict=True))
    return Likeness(
        cosine=float(np.mean([_cosine(mine, theirs) for mine, theirs in pairs])),
        same_top=float(np.mean([mine.argmax() == theirs.argmax() for mine, theirs in pairs])),
        finite=all(bool(np.isfinite(mine).all()) for mine in own),
        texts=len(own),
    )


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first.astype(np.float64), second.astype(np.float64)
    return float(first @ second / max(np.linalg.norm(first) * np.linalg.norm(second), 1e-12))

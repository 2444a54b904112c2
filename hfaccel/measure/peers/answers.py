"""Peers of encoder-decoders: each is opened, or says in one line why it cannot take part."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, get_args

from hfaccel.artifact.contract import Contract
from hfaccel.errors import UsageError
from hfaccel.measure.answer_bench import AnswerEngine, OpenAnswerer
from hfaccel.measure.peers import missing_packages
from hfaccel.measure.peers.open import Absent, one_line
from hfaccel.measure.speech_bench import Listen, OpenListener

if TYPE_CHECKING:
    from hfaccel.artifact.generation import EncoderSettings, GenerationSettings
    from hfaccel.source.model import SourceModel

AnswerPeerName = Literal["torch", "ctranslate2"]
ANSWER_PEERS: tuple[AnswerPeerName, ...] = get_args(AnswerPeerName)

_Engine = TypeVar("_Engine")
_Open = TypeVar("_Open")


@dataclass(frozen=True)
class AnswerSetup:
    """What a peer is made from.

    Attributes:
        source: the checkpoint.
        contract: of the artifact.
        threads: threads that a peer may use.
        folder: scratch folder, removed after the comparison.
    """

    source: SourceModel
    contract: Contract
    threads: int
    folder: Path

    @property
    def generation(self) -> GenerationSettings:
        """How the artifact answers."""
        assert self.contract.generation is not None  # of a task with answers
        return self.contract.generation

    @property
    def encoder(self) -> EncoderSettings:
        """What the artifact reads."""
        assert self.generation.encoder is not None  # of an encoder-decoder
        return self.generation.encoder

    def load_source(self) -> Any:
        """The model of transformers: float32, eval mode, attention as transformers chooses it, and with its cache."""
        from hfaccel.source.torch_model import load_torch_model

        module: Any = load_torch_model(self.source, attention=None)
        module.hf_model.config.use_cache = True  # exporters switch it off
        return module.hf_model


@dataclass(frozen=True)
class AnswerPeers(Generic[_Open]):
    """Peers and absentees in the order asked for."""

    peers: tuple[_Open, ...]
    absent: tuple[Absent, ...]


def parse_answer_peers(text: str) -> tuple[AnswerPeerName, ...]:
    """Read peers of encoder-decoders, separated by commas; an empty text is no peer.

    Raises:
        UsageError: one is not known.
    """
    found: dict[AnswerPeerName, None] = {}
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        known = next((name for name in ANSWER_PEERS if name == part), None)
        if known is None:
            raise UsageError(
                f"no peer '{part}' to compare an encoder-decoder with",
                where="--against",
                hint=f"known peers: {', '.join(ANSWER_PEERS)}",
            )
        found[known] = None
    return tuple(found)


@contextmanager
def open_answerers(
    names: Sequence[AnswerPeerName],
    source_id: str,
    contract: Contract,
    *,
    threads: int,
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Iterator[AnswerPeers[OpenAnswerer]]:
    """Open peers that answer text with text; see :func:`_open_peers`."""
    builders: dict[AnswerPeerName, Callable[[AnswerSetup], AnswerEngine]] = {
        "torch": _torch_answers,
        "ctranslate2": _ctranslate2_answers,
    }
    with _open_peers(names, source_id, contract, builders, OpenAnswerer, threads, trust_remote_code, on_step) as opened:
        yield opened


@contextmanager
def open_listeners(
    names: Sequence[AnswerPeerName],
    source_id: str,
    contract: Contract,
    *,
    threads: int,
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Iterator[AnswerPeers[OpenListener]]:
    """Open peers that write down what is said; see :func:`_open_peers`."""
    builders: dict[AnswerPeerName, Callable[[AnswerSetup], Listen]] = {
        "torch": _torch_listener,
        "ctranslate2": _ctranslate2_listener,
    }
    with _open_peers(names, source_id, contract, builders, OpenListener, threads, trust_remote_code, on_step) as opened:
        yield opened


@contextmanager
def _open_peers(
    names: Sequence[AnswerPeerName],
    source_id: str,
    contract: Contract,
    builders: Mapping[AnswerPeerName, Callable[[AnswerSetup], _Engine]],
    opened: Callable[[str, _Engine], _Open],
    threads: int,
    trust_remote_code: bool,
    on_step: Callable[[str], None],
) -> Iterator[AnswerPeers[_Open]]:
    """Peers whose files live as long as the ``with`` block. Sets torch's number of threads for the whole process.

    Raises:
        SourceError: there is no such checkpoint any more, or it is not readable.
    """
    missing = {name: packages for name in names if (packages := missing_packages(name))}
    absent = {name: f"not installed (pip install {' '.join(packages)})" for name, packages in missing.items()}
    if len(absent) == len(names):
        yield AnswerPeers((), tuple(Absent(name, absent[name]) for name in names))
        return
    import torch

    from hfaccel.measure.peers.setup import quiet, quiet_logs
    from hfaccel.source.resolve import resolve_source

    torch.set_num_threads(threads)
    source = resolve_source(source_id, task=contract.task, trust_remote_code=trust_remote_code)
    with tempfile.TemporaryDirectory(prefix="hfaccel-peers-") as folder, quiet_logs():
        setup = AnswerSetup(source, contract, threads, Path(folder))
        peers = []
        for name in (name for name in names if name not in absent):
            on_step(f"opening {name}")
            try:
                with quiet():
                    peers.append(opened(_LABELS[name], builders[name](setup)))
            except Exception as error:  # other libraries fail in any way; the others are compared all the same
                absent[name] = one_line(error)
        yield AnswerPeers(tuple(peers), tuple(Absent(name, absent[name]) for name in names if name in absent))


_LABELS: dict[AnswerPeerName, str] = {"torch": "torch fp32", "ctranslate2": "ctranslate2 int8"}


# The library of an engine is imported only where it is asked for.
def _torch_answers(setup: AnswerSetup) -> AnswerEngine:
    from hfaccel.measure.peers.torch_answers import TorchAnswers

    return TorchAnswers(setup.load_source())


def _torch_listener(setup: AnswerSetup) -> Listen:
    from hfaccel.measure.peers.torch_answers import TorchListener

    return TorchListener(setup.load_source(), setup.source.folder)


def _ctranslate2_answers(setup: AnswerSetup) -> AnswerEngine:
    from hfaccel.measure.peers.ctranslate2_answers import Ctranslate2Answers

    return Ctranslate2Answers(setup)


def _ctranslate2_listener(setup: AnswerSetup) -> Listen:
    from hfaccel.measure.peers.ctranslate2_answers import Ctranslate2Listener

    return Ctranslate2Listener(setup)

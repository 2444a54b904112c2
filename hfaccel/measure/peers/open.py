"""Opens peers: each is built, asked a few texts and compared with the source, or says in one line why it cannot take part."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfaccel.errors import HfaccelError
from hfaccel.measure.contenders import GivenOrder
from hfaccel.measure.likeness import Likeness, likeness_to, raw_outputs
from hfaccel.measure.peers import PeerName, missing_packages
from hfaccel.runtime.model import Model
from hfaccel.runtime.tokenizer import Text

_LONGEST_REASON = 160


@dataclass(frozen=True)
class Peer:
    """An open peer.

    Attributes:
        label: its name and precision, as reports show them.
        model: texts in, answers out; batches are computed as they are given.
        likeness: how far its answers are the source's.
    """

    label: str
    model: Model
    likeness: Likeness


@dataclass(frozen=True)
class Absent:
    """A peer that was asked for and is not compared, and why, in one line."""

    name: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """As plain JSON types."""
        return {"engine": self.name, "reason": self.reason}


@dataclass(frozen=True)
class OpenPeers:
    """Peers and absentees in the order asked for; ``artifact_likeness`` is None where the source cannot be loaded."""

    peers: tuple[Peer, ...]
    absent: tuple[Absent, ...]
    artifact_likeness: Likeness | None


@contextmanager
def open_peers(
    names: Sequence[PeerName],
    source_id: str,
    artifact: Model,
    *,
    threads: int,
    check_texts: Sequence[Text],
    calibration: Sequence[Text],
    trust_remote_code: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> Iterator[OpenPeers]:
    """Build peers from a checkpoint; their files live as long as the ``with`` block.

    Sets torch's number of threads for the whole process.

    Args:
        names: at least one.
        source_id: checkpoint folder or hub id.
        artifact: the model that they are compared with; its tokenizer is shared.
        threads: threads that each may use.
        check_texts: texts on which answers are compared with the source's.
        calibration: texts for peers that measure activations.
        trust_remote_code: let Python code of the checkpoint run.
        on_step: told what is being built now.

    Raises:
        SourceError: there is no such checkpoint any more, or it is not readable.
    """
    absent = {name: f"not installed (pip install {' '.join(missing)})" for name in names if (missing := missing_packages(name))}
    if names and not missing_packages("torch"):
        import torch

        from hfaccel.measure.peers.setup import Setup
        from hfaccel.source.resolve import resolve_source
        from hfaccel.source.torch_model import TorchRunner, load_torch_model

        torch.set_num_threads(threads)
        on_step("loading the source")
        source = resolve_source(source_id, task=artifact.contract.task, trust_remote_code=trust_remote_code)
        module = load_torch_model(source, attention=None)
        reference = raw_outputs(GivenOrder(TorchRunner(module), artifact.tokenizer, artifact.contract), check_texts)
        with tempfile.TemporaryDirectory(prefix="hfaccel-peers-") as folder:
            setup = Setup(source, module, artifact, threads, Path(folder), tuple(calibration))
            found: list[Peer] = []
            for name in (name for name in names if name not in absent):
                on_step(f"building {name}")
                opened = _open(name, setup, reference, check_texts)
                if isinstance(opened, Peer):
                    found.append(opened)
                else:
                    absent[name] = opened
            own = likeness_to(reference, artifact, check_texts)
            yield OpenPeers(tuple(found), _in_order(absent, names), own)
    else:
        yield OpenPeers((), _in_order(absent, names), None)


def _in_order(absent: dict[PeerName, str], names: Sequence[PeerName]) -> tuple[Absent, ...]:
    return tuple(Absent(name, absent[name]) for name in names if name in absent)


def _open(name: PeerName, setup: Any, reference: Sequence[dict[str, Any]], texts: Sequence[Text]) -> Peer | str:
    """The peer, or why there is none."""
    try:
        label, runner = _builder(name)(setup)
        model = GivenOrder(runner, setup.artifact.tokenizer, setup.artifact.contract)
        return Peer(label, model, likeness_to(reference, model, texts))
    except Exception as error:  # other libraries fail in any way; the others are compared all the same
        return one_line(error)


def one_line(error: Exception) -> str:
    """Why a peer takes no part, in one line."""
    text = error.what if isinstance(error, HfaccelError) else f"failed: {type(error).__name__}: {error}"
    line = " ".join(text.split("\n")[0].split())
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 3] + "..."


def _builder(name: PeerName) -> Callable[[Any], tuple[str, Any]]:
    """The function that builds a peer; its module, and the engine with it, is imported only now."""
    if name in ("torch", "torch-bf16"):
        from hfaccel.measure.peers import torch_eager

        return torch_eager.float32 if name == "torch" else torch_eager.bfloat16
    if name == "torch-compile":
        from hfaccel.measure.peers import torch_compile

        return torch_compile.build
    if name == "onnxruntime-default":
        from hfaccel.measure.peers import onnxruntime_default

        return onnxruntime_default.build
    if name == "ctranslate2":
        from hfaccel.measure.peers import ctranslate2

        return ctranslate2.build
    from hfaccel.measure.peers import openvino

    return openvino.float_model if name == "openvino" else openvino.int8

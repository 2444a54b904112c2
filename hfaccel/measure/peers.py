"""What can be timed: a model of the run time, and its peers, the same model in other engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hfaccel.errors import MissingExtraError, UsageError
from hfaccel.measure.bench import Contender
from hfaccel.measure.workload import Point, make_feeds, make_texts
from hfaccel.runtime.model import Model
from hfaccel.runtime.tokenizer import Text, TextTokenizer

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Contract

PeerName = Literal["torch"]
PEERS: tuple[PeerName, ...] = get_args(PeerName)
_QUESTION = "what is the story about"
_PAIR_TASKS = ("question-answering", "text-ranking")


def parse_peers(text: str) -> tuple[PeerName, ...]:
    """Read names of peers, separated by commas; an empty text is no peer.

    Raises:
        UsageError: a name is not in :data:`PEERS`.
    """
    names: dict[PeerName, None] = {}
    for part in (part.strip().lower() for part in text.split(",")):
        found = next((name for name in PEERS if name == part), None)
        if found is not None:
            names[found] = None
        elif part:
            raise UsageError(f"no peer '{part}' to compare with", where="--against", hint=f"known peers: {', '.join(PEERS)}")
    return tuple(names)


def check_lengths(points: Sequence[Point], contract: Contract) -> None:
    """Refuse points that are longer than the model can read.

    Raises:
        UsageError: a sequence is longer than the contract's ``max_length``.
    """
    limit = contract.text.max_length
    for point in points:
        if point.sequence > limit:
            raise UsageError(
                f"{point} is longer than the {limit} tokens that the model reads",
                where="--workload",
                hint=f"use lengths up to {limit}",
            )


def without_cache(model: Model, folder: Path) -> Model:
    """The same model with a tokenizer that remembers no text, so that repeated runs pay for tokenizing each time.

    Args:
        model: an open model.
        folder: where its ``tokenizer.json`` lies.
    """
    return Model(model.runner, TextTokenizer(folder / "tokenizer.json", model.contract.text, cache_size=0), model.contract)


def contender(name: str, model: Model, *, seed: int = 0) -> Contender:
    """Make a model ready for timing; models with the same tokenizer and seed are given the same inputs.

    Args:
        name: how reports call it.
        model: a model whose tokenizer has no cache, see :func:`without_cache`.
        seed: of the inputs.
    """

    def graph_only(point: Point) -> Callable[[], None]:
        # Ids up to the highest that real texts use are valid whatever size the embedding table has.
        highest = max(int(item.ids.max()) for item in model.tokenizer.encode(example_inputs(model, point, seed=seed)))
        feeds = make_feeds(point, model.runner.input_names, vocabulary_size=highest + 1, seed=seed)

        def run() -> None:
            model.runner.run(feeds)

        return run

    def end_to_end(point: Point) -> Callable[[], None]:
        texts: list[Any] = example_inputs(model, point, seed=seed)

        def run() -> None:
            model(texts, max_batch=point.batch)

        return run

    return Contender(name, graph_only, end_to_end)


def example_inputs(model: Model, point: Point, *, seed: int) -> list[Text]:
    """Inputs of the model's task, each about ``point.sequence`` tokens long, special tokens and question included."""
    contract = model.contract

    def complete(text: str) -> Text:
        if contract.task in _PAIR_TASKS:
            return (_QUESTION, text)
        if contract.task == "fill-mask":
            return f"{contract.text.mask_token} {text}"
        return text

    def count_tokens(text: str) -> int:
        return int(model.tokenizer.encode([complete(text)])[0].ids.size)

    return [complete(text) for text in make_texts(point, count_tokens, seed=seed)]


def torch_peer(source_id: str, artifact: Model, *, threads: int, trust_remote_code: bool = False) -> Model:
    """The source checkpoint in torch: eager mode, float32, SDPA attention, with the artifact's tokenizer and task head.

    Sets torch's number of threads for the whole process.

    Args:
        source_id: checkpoint folder or hub id.
        artifact: the model that it is compared with; its tokenizer is shared.
        threads: threads that torch may use.
        trust_remote_code: let Python code of the checkpoint run.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        SourceError: there is no such checkpoint any more, or it is not readable.
    """
    for package in ("torch", "transformers"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtraError(package, extra="compile", needed_for="bench --against torch") from error
    import torch

    from hfaccel.source.resolve import resolve_source
    from hfaccel.source.torch_model import TorchRunner, load_torch_model

    torch.set_num_threads(threads)
    source = resolve_source(source_id, task=artifact.contract.task, trust_remote_code=trust_remote_code)
    return Model(TorchRunner(load_torch_model(source, attention=None)), artifact.tokenizer, artifact.contract)

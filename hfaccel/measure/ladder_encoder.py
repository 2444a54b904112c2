"""The steps from transformers with padding to the maximal length to a compiled encoder, each ready for the same stream of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfaccel.artifact.contract import SessionSettings, Task
from hfaccel.measure.cached_stages import graph_steps
from hfaccel.measure.contenders import GivenOrder, complete
from hfaccel.measure.ladder import HUGE_PAGES_NOTE, RUST_TOKENIZER, LeftOut, Rung, Share, Way, is_default
from hfaccel.measure.peers.texts import spread
from hfaccel.measure.python_tokenizer import PythonTokenizer
from hfaccel.runtime.engines import engine_available
from hfaccel.runtime.model import Model
from hfaccel.runtime.session import GraphSession, Runner
from hfaccel.runtime.tokenizer import Text, TextTokenizer

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.artifact.contract import Contract

_TOKENIZER = "tokenizer.json"
CACHED_TOKENS = "tokens of texts that come again from a cache"
_SAMPLE_TEXTS = 256
_PADDED_BATCHES = 1  # all have the same shape
_SLOW_BATCHES = 2  # of torch and the float graphs: enough for their factors, which compare the same batches
# What examples with padding="max_length" ask for where the model could read more. Questions are answered in windows; a mask has a
# logit for each entry of the vocabulary and token, so that more would not fit into memory where the vocabulary is large.
_MOST_PADDING = 512
_WINDOW_TOKENS = 384
_MOST_PADDING_OF: Mapping[Task, int] = {"question-answering": _WINDOW_TOKENS, "fill-mask": 128}


@dataclass(frozen=True)
class EncoderWay:
    """What the steps are made from.

    Attributes:
        folder: the artifact.
        model: the artifact, as :func:`hfaccel.load` opens it.
        manifest: of the artifact.
        source: the checkpoint in torch.
        stages: float graphs by stage, at least that of the export.
        texts: the stream, in the order they come.
        batch: texts of a batch.
        threads: that every step may use.
        huge_pages: whether the weights of ``model`` lie in such pages, where those of the other steps do not.
        python: the tokenizer in Python, or why there is none, in one line.
    """

    folder: Path
    model: Model
    manifest: Mapping[str, Any]
    source: Runner
    stages: Mapping[str, Artifact]
    texts: tuple[Text, ...]
    batch: int
    threads: int
    huge_pages: bool
    python: PythonTokenizer | str

    @property
    def batches(self) -> list[list[Any]]:
        """The stream in batches, in the given order."""
        return [list(self.texts[start : start + self.batch]) for start in range(0, len(self.texts), self.batch)]

    @property
    def repeated(self) -> int:
        """Texts that came before in the stream."""
        return len(self.texts) - len(set(self.texts))


class ForgettingTokenizer(TextTokenizer):
    """A tokenizer with a cache that can be emptied, so that a stream finds in it only what it brought itself."""

    def forget(self) -> None:
        """Empty the cache."""
        with self._lock:
            self._cache.clear()


def sample_texts(contract: Contract) -> tuple[Text, ...]:
    """A stream for those who bring none: sentences of the packaged multilingual sample, as the task reads them."""
    from hfaccel.evaluate.sample import multilingual_sample

    return spread([complete(str(example.text), contract) for example in multilingual_sample().examples], _SAMPLE_TEXTS)


def encoder_way(way: EncoderWay) -> Way:
    """The steps in order. Each answers the same texts; all but the last in batches of the given order."""
    rust = TextTokenizer(way.folder / _TOKENIZER, way.model.contract.text, cache_size=0)
    first = rust if isinstance(way.python, str) else way.python
    rungs = [_padded(way, first), _in_part(way, way.source, "padded to the longest text of each batch", first)]
    left_out: list[LeftOut] = []
    if isinstance(way.python, str):
        left_out.append(LeftOut(RUST_TOKENIZER, way.python))
    else:
        rungs.append(_in_part(way, way.source, RUST_TOKENIZER, rust))
    last = rust
    if way.repeated:
        last = ForgettingTokenizer(way.folder / _TOKENIZER, way.model.contract.text)
        note = f"{way.repeated} of {len(way.texts)} texts came before in the stream; the cache is empty when it begins"
        rungs.append(_in_part(way, way.source, CACHED_TOKENS, last, note))
    else:
        left_out.append(LeftOut(CACHED_TOKENS, "no text of the stream comes twice"))
    defaults = SessionSettings(intra_op_num_threads=way.threads)
    *floats, own = graph_steps(way.stages, way.manifest, way.folder)
    rungs += [_in_part(way, GraphSession(graph, defaults), what, last) for what, graph in floats]
    rungs.append(_whole(way, GraphSession(own[1], defaults), own[0], last))
    rungs += [_tuned(way, last, rungs[-1]), _sorted(way, last)]
    return Way(tuple(rungs), tuple(left_out))


def _padded(way: EncoderWay, tokenizer: TextTokenizer) -> Rung:
    """Where examples begin: all texts as long as the model reads, or as :data:`_MOST_PADDING` says."""
    contract = way.model.contract
    most = min(_MOST_PADDING_OF.get(contract.task, _MOST_PADDING), contract.text.max_length)
    pad_to = max(most, *_lengths(way, way.texts))
    language = "" if isinstance(way.python, str) else ", tokenizer in Python"
    notes = [] if pad_to >= contract.text.max_length else [f"the model reads {contract.text.max_length}"]
    if isinstance(tokenizer, PythonTokenizer):
        notes.append(tokenizer.origin)
    what = f"torch eager, each text padded to {pad_to} tokens{language}"
    return _in_part(way, way.source, what, tokenizer, *notes, pad_to=pad_to)


def _in_part(
    way: EncoderWay, runner: Runner, what: str, tokenizer: TextTokenizer, *notes: str, pad_to: int | None = None
) -> Rung:
    """A slow step: of a long stream some batches stand for all, by the tokens that are computed, padding included."""
    batches = way.batches
    timed = spread(batches, _SLOW_BATCHES if pad_to is None else _PADDED_BATCHES)
    times = _computed_tokens(way, batches, pad_to) / _computed_tokens(way, timed, pad_to)
    run = _in_order(way, runner, tokenizer, timed, pad_to)
    if len(timed) == len(batches):
        return Rung(what, (Share(what, run),), "; ".join(notes))
    note = f"extrapolated by tokens, padding included, from {len(timed)} of {len(batches)} batches"
    return Rung(f"{what}, extrapolated", (Share(what, run, times),), "; ".join((note, *notes)))


def _whole(way: EncoderWay, runner: Runner, what: str, tokenizer: TextTokenizer, note: str = "") -> Rung:
    """A step that runs all batches."""
    return Rung(what, (Share(what, _in_order(way, runner, tokenizer, way.batches)),), note)


def _in_order(
    way: EncoderWay, runner: Runner, tokenizer: TextTokenizer, batches: Sequence[list[Any]], pad_to: int | None = None
) -> Callable[[], None]:
    """A run of batches one by one, each as it is given; nothing is kept from the run before."""
    model = GivenOrder(runner, tokenizer, way.model.contract, pad_to=pad_to)

    def run() -> None:
        _forget(tokenizer)
        for batch in batches:
            model(batch, max_batch=way.batch)

    return run


def _tuned(way: EncoderWay, tokenizer: TextTokenizer, before: Rung) -> Rung:
    """The artifact's own session; timed anew only if it or its memory differs from the step before."""
    session = SessionSettings.from_json(way.manifest.get("session", {}))
    if not way.huge_pages and is_default(session, way.threads):
        note = "its session has the default settings, so this is the run of the step before"
        return Rung("tuned session", before.shares, note)
    what = f"tuned session, {session.engine}"
    note = HUGE_PAGES_NOTE if way.huge_pages else ""
    note = note if engine_available(session.engine) else f"{session.engine} is not installed: onnxruntime runs it"
    return _whole(way, way.model.runner, what, tokenizer, note)


def _sorted(way: EncoderWay, tokenizer: TextTokenizer) -> Rung:
    """The artifact as a user calls it, all texts at once: it sorts them by length, splits them, and keeps their order."""
    what = "texts sorted by length: the artifact as it is"
    model, texts = Model(way.model.runner, tokenizer, way.model.contract), list(way.texts)

    def run() -> None:
        _forget(tokenizer)
        model(texts, max_batch=way.batch)

    return Rung(what, (Share(what, run),))


def _forget(tokenizer: TextTokenizer) -> None:
    if isinstance(tokenizer, ForgettingTokenizer):
        tokenizer.forget()


def _lengths(way: EncoderWay, texts: Sequence[Any]) -> list[int]:
    """Tokens of each text; of a question with a long context those of a window."""
    contract = way.model.contract
    most = _WINDOW_TOKENS if contract.task == "question-answering" else contract.text.max_length
    return [min(item.ids.size, most) for item in way.model.tokenizer.encode(texts)]


def _computed_tokens(way: EncoderWay, batches: Sequence[list[Any]], pad_to: int | None) -> int:
    """Tokens that go through the model: of each batch its texts times the length that they are padded to."""
    return sum(len(batch) * (pad_to or max(_lengths(way, batch))) for batch in batches)

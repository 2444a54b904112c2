"""Opens a compiled folder; needs onnxruntime, tokenizers and numpy, and openvino where the folder was compiled for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hfaccel.artifact.contract import Contract, SessionSettings
from hfaccel.artifact.manifest import FILE_NAME, read_manifest
from hfaccel.errors import IntegrityError, SettingsError
from hfaccel.runtime.answering import answering_model
from hfaccel.runtime.cores import physical_cores
from hfaccel.runtime.engines import open_graph, with_installed_engine
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.model import GenerationModel
from hfaccel.runtime.generation.text_to_text import TextToTextModel
from hfaccel.runtime.memory import gains_from_huge_pages, give_back_freed_memory, use_huge_pages
from hfaccel.runtime.model import Model
from hfaccel.runtime.speech.model import SpeechModel
from hfaccel.runtime.tokenizer import TextTokenizer

ENCODER_NAME = "encoder.onnx"
"""Beside the decoder, whose name the manifest gives."""
_GRAPH_FILES = (".onnx", ".onnx.data")


AnyModel = Model | GenerationModel | TextToTextModel | SpeechModel


def load(folder: str | Path, *, threads: int | None = None, huge_pages: bool | None = None) -> AnyModel:
    """The compiled model of a folder that ``hfaccel compile`` made, in the engine that its manifest names.

    One that generates text has the method ``generate``, one that reads sound ``transcribe``; all others are called.

    Where that engine is not installed onnxruntime runs the same graph, and an ``EngineFallbackWarning`` says so.

    Args:
        folder: that ``hfaccel compile`` made.
        threads: for the engine; None takes as many as the compile found best, at most the cores that this process may use.
        huge_pages: move the weights to pages of 2 MiB where the system has them (Linux). None does so for onnxruntime and weights of 64 MiB or
            more: new tokens take 0.85 to 0.95 of the time, a BERT-base shape 0.96 to 0.98, and opening 0.1 s to 0.6 s more for 200 MB. Who opens
            a folder for one short answer says False.

    Raises:
        IntegrityError: the folder is no such folder, a newer version made it, or a file in it is missing or damaged.
        SettingsError: no thread at all is asked for.
    """
    place = Path(folder)
    manifest_path = place / FILE_NAME
    manifest = read_manifest(place)
    try:
        contract = Contract.from_json(manifest["contract"])
        settings = _with_threads(SessionSettings.from_json(manifest.get("session", {})), threads)
        graph = str(manifest["graph"])
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"the manifest does not describe a model that this version can run: {error}",
            where=str(manifest_path),
            hint="use the hfaccel version that made the folder, or compile the model again",
        ) from error
    if Path(graph).name != graph:
        raise IntegrityError(f"the graph {graph!r} is not a file of the folder", where=str(manifest_path))
    settings = with_installed_engine(settings)
    model = _open(place, graph, contract, settings)
    give_back_freed_memory()
    if opens_in_huge_pages(place, settings) if huge_pages is None else huge_pages:
        use_huge_pages()
    return model


def opens_in_huge_pages(folder: Path, settings: SessionSettings) -> bool:
    """Whether :func:`load` moves the weights of a folder where nobody says what to do."""
    size_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.name.endswith(_GRAPH_FILES))
    return gains_from_huge_pages(size_bytes, settings.engine)


def _open(place: Path, graph: str, contract: Contract, settings: SessionSettings) -> AnyModel:
    if contract.generation is not None and contract.generation.encoder is not None:
        parts = EncoderDecoder.open(place / ENCODER_NAME, place / graph, settings, contract.generation)
        return answering_model(parts, place, contract)
    if contract.generation is not None:
        return GenerationModel(Decoder(place / graph, settings, contract.generation), place, contract)
    tokenizer = TextTokenizer(place / "tokenizer.json", contract.text)
    return Model(open_graph(place / graph, settings), tokenizer, contract)


def _with_threads(settings: SessionSettings, wanted: int | None) -> SessionSettings:
    """The settings with the user's number of threads, or their own where this machine has the cores; 0 leaves it to the machine."""
    if wanted is None:
        wanted = min(settings.intra_op_num_threads, physical_cores())
    elif wanted < 1:
        raise SettingsError(f"{wanted} threads", where="threads", hint="1 or more; None for as many as are best")
    return replace(settings, intra_op_num_threads=wanted)

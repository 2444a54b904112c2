"""Opens an encoder-decoder for what it reads: text or sound."""

from __future__ import annotations

from pathlib import Path

from hfaccel.artifact.contract import Contract
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.text_to_text import TextToTextModel
from hfaccel.runtime.speech.model import SpeechModel


def answering_model(encoder_decoder: EncoderDecoder, folder: Path, contract: Contract) -> TextToTextModel | SpeechModel:
    """The model of a contract whose task has an encoder and a decoder.

    Args:
        encoder_decoder: made with ``contract.generation``.
        folder: holds the tokenizer.
        contract: of the compiled folder.
    """
    if contract.task == "automatic-speech-recognition":
        return SpeechModel(encoder_decoder, folder, contract)
    return TextToTextModel(encoder_decoder, folder, contract)

"""Encoder-decoders in CTranslate2 (int8), converted and called as its guide to transformers shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hfaccel.errors import ExportError
from hfaccel.measure.peers.ctranslate2_library import load_ctranslate2
from hfaccel.runtime.speech.prompt import start_tokens

if TYPE_CHECKING:
    from hfaccel.measure.peers.answers import AnswerSetup


class Ctranslate2Answers:
    """An encoder-decoder of text in CTranslate2; a :class:`~hfaccel.measure.answer_bench.AnswerEngine`.

    Args:
        setup: what it is made from.

    Raises:
        ExportError: CTranslate2 has no converter for the architecture.
    """

    def __init__(self, setup: AnswerSetup) -> None:
        from transformers import AutoTokenizer

        ctranslate2 = load_ctranslate2()
        folder = _converted(setup)
        self._translator = ctranslate2.Translator(
            str(folder), device="cpu", compute_type="int8", inter_threads=1, intra_threads=setup.threads
        )
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(setup.source.folder), local_files_only=True)
        first, defaults = setup.encoder.forced_first_token_id, setup.generation.defaults
        self._prefix = None if first is None else [self._tokenizer.convert_ids_to_tokens([first])]
        self._options: dict[str, Any] = {
            "beam_size": 1,
            "repetition_penalty": defaults.repetition_penalty,
            "no_repeat_ngram_size": defaults.no_repeat_ngram_size,
        }

    def answer(self, source: Sequence[int], new: int) -> Callable[[], list[int]]:
        """A run of ``translate_batch``, greedy, that may not end early."""
        tokens = [self._tokenizer.convert_ids_to_tokens(list(source))]
        # A prefix counts as written.
        lengths = {"min_decoding_length": new, "max_decoding_length": new}

        def run() -> list[int]:
            made = self._translator.translate_batch(tokens, self._prefix, **self._options, **lengths)
            ids: list[int] = self._tokenizer.convert_tokens_to_ids(made[0].hypotheses[0])
            return ids

        return run


class Ctranslate2Listener:
    """Whisper in CTranslate2, from samples to text; a :data:`~hfaccel.measure.speech_bench.Listen`.

    Args:
        setup: what it is made from.

    Raises:
        ExportError: CTranslate2 cannot convert the checkpoint.
    """

    def __init__(self, setup: AnswerSetup) -> None:
        from transformers import WhisperProcessor

        ctranslate2 = load_ctranslate2()
        assert setup.encoder.speech is not None  # of a speech model
        self._speech = setup.encoder.speech
        self._longest = setup.generation.context_length
        self._view = ctranslate2.StorageView.from_array
        self._model = ctranslate2.models.Whisper(
            str(_converted(setup)), device="cpu", compute_type="int8", inter_threads=1, intra_threads=setup.threads
        )
        self._processor: Any = WhisperProcessor.from_pretrained(str(setup.source.folder), local_files_only=True)

    def __call__(self, samples: np.ndarray) -> str:
        """Greedy; a multilingual model hears the language. Tokens are suppressed as the generation config of the source says."""
        rate = self._speech.sampling_rate_hz
        read = self._processor(samples, sampling_rate=rate, return_tensors="np").input_features
        heard, language = self._view(np.ascontiguousarray(read, dtype=np.float32)), None
        if self._speech.languages:
            heard = self._model.encode(heard)  # once for both
            language = self._model.detect_language(heard)[0][0][0]
        prompt = start_tokens(self._speech, language=language, task="transcribe", timestamps=False)
        made = self._model.generate(heard, [prompt], beam_size=1, max_length=self._longest)
        text: str = self._processor.decode(made[0].sequences_ids[0], skip_special_tokens=True)
        return text.strip()


def _converted(setup: AnswerSetup) -> Path:
    """The folder of the converted checkpoint."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]
        """Configs of BART made by transformers 5 lack what the converter asks for: its layers are normalized at their end."""

        def load_model(self, model_class: Any, model_name_or_path: str, **options: Any) -> Any:
            config = options["config"]
            if config.model_type == "bart" and not hasattr(config, "normalize_before"):
                config.normalize_before = False
            return super().load_model(model_class, model_name_or_path, **options)

    folder = setup.folder / "ctranslate2"
    source = setup.source
    try:
        Converter(str(source.folder), trust_remote_code=source.trust_remote_code).convert(str(folder), quantization="int8")
    except Exception as error:  # converters fail with whatever the missing piece raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(" (supported")[0]
        raise ExportError(f"not supported by ctranslate2: {reason}") from error
    return folder

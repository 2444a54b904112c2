"""A tiny random Whisper that listens to a second at once, as two graphs and in torch, with a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration
from transformers.utils import logging

from hfaccel.artifact.contract import Contract, SessionSettings, TensorSpec, TextSettings
from hfaccel.artifact.generation import EncoderSettings, GenerationDefaults, GenerationSettings, SpeechSettings
from hfaccel.construct import construct_encoder_decoder
from hfaccel.rewrites.split_encoder_decoder import split_encoder_decoder
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.speech.model import SpeechModel

RATE = 16000
TEXT_TOKENS = 300
END, START, ENGLISH, GERMAN, FRENCH, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_TIMES = range(TEXT_TOKENS, TEXT_TOKENS + 9)
FIRST_TIME = NO_TIMES + 1
TIMES = 51
CONTEXT = 48
SUPPRESSED = (3, 7, 11)
SUPPRESSED_FIRST = (220, END)
SPEECH = SpeechSettings(
    sampling_rate_hz=RATE,
    mel_bins=80,
    fft_samples=400,
    hop_samples=160,
    window_seconds=1,
    end_of_text_token_id=END,
    start_of_transcript_token_id=START,
    no_timestamps_token_id=NO_TIMES,
    previous_text_token_id=PREVIOUS,
    most_initial_timestamp=25,
    languages=(("en", ENGLISH), ("de", GERMAN), ("fr", FRENCH)),
    tasks=(("translate", TRANSLATE), ("transcribe", TRANSCRIBE)),
)
SETTINGS = GenerationSettings(
    layers=2,
    key_value_heads=2,
    head_size=16,
    context_length=CONTEXT,
    vocabulary_size=FIRST_TIME + TIMES,
    end_token_ids=(END,),
    pad_token_id=END,
    encoder=EncoderSettings(
        source_length=50,
        start_token_ids=(START,),
        suppressed_token_ids=SUPPRESSED,
        suppressed_first_token_ids=SUPPRESSED_FIRST,
        speech=SPEECH,
    ),
)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A tiny model is slower with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def source() -> WhisperForConditionalGeneration:
    """Weights large enough that the sound makes a difference to what is said of it."""
    config = WhisperConfig(
        vocab_size=SETTINGS.vocabulary_size,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=50,
        max_target_positions=CONTEXT,
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        tie_word_embeddings=False,  # else a random model says one token over and over
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        # Of a trained model no single time is likely where none was asked for.
        model.proj_out.weight[FIRST_TIME:] *= 0.9
        # Place and sound count for more than the token before, so that answers vary, and some end by themselves.
        model.model.decoder.embed_positions.weight *= 3
        model.proj_out.weight[END] *= 6
        for layer in model.model.decoder.layers:
            layer.encoder_attn.q_proj.weight *= 2
            layer.encoder_attn.out_proj.weight *= 2
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        max_length=CONTEXT,
        suppress_tokens=list(SUPPRESSED),
        begin_suppress_tokens=list(SUPPRESSED_FIRST),
    )
    speech = {
        "is_multilingual": True,
        "lang_to_id": {f"<|{code}|>": token for code, token in SPEECH.languages},
        "task_to_id": dict(SPEECH.tasks),
        "no_timestamps_token_id": NO_TIMES,
        "max_initial_timestamp_index": SPEECH.most_initial_timestamp,
        "prev_sot_token_id": PREVIOUS,
        "return_timestamps": False,
    }
    for name, value in speech.items():
        setattr(model.generation_config, name, value)
    return model


@dataclass(frozen=True)
class Reference:
    """What transformers makes of the same sounds."""

    model: WhisperForConditionalGeneration

    def features(self, sounds: list[np.ndarray], *, whole: bool = False) -> Any:
        extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=SPEECH.window_seconds)
        options = {"truncation": False, "padding": "longest"} if whole else {}
        return extractor(sounds, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True, **options)

    def generate(self, sounds: list[np.ndarray], *, whole: bool = False, **options: Any) -> Any:
        made = self.features(sounds, whole=whole)
        with torch.no_grad():
            return self.model.generate(
                made.input_features, attention_mask=made.attention_mask, **{"task": "transcribe", "num_beams": 1, **options}
            )

    def ids(self, sounds: list[np.ndarray], *, whole: bool = False, **options: Any) -> list[list[int]]:
        """New tokens of each sound, without the token that ends answers, which is the padding too."""
        generated = self.generate(sounds, whole=whole, **options)
        return [[token for token in row if token != END] for row in generated.tolist()]


@pytest.fixture(scope="session")
def reference(source: WhisperForConditionalGeneration) -> Reference:
    return Reference(source)


@pytest.fixture(scope="session")
def encoder_decoder(source: WhisperForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> EncoderDecoder:
    folder = tmp_path_factory.mktemp("whisper")
    encoder, decoder = split_encoder_decoder(construct_encoder_decoder(source))
    onnx_ir.save(encoder, str(folder / "encoder.onnx"))
    onnx_ir.save(decoder, str(folder / "decoder.onnx"))
    return EncoderDecoder.open(
        folder / "encoder.onnx", folder / "decoder.onnx", SessionSettings(intra_op_num_threads=1), SETTINGS
    )


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tokenizers of Whisper: what is no text comes last, and times are no special tokens to the library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["He listens to the sea while it rains, and the sea says nothing at all, nothing.", "Grüße aus Köln 日本語"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=TEXT_TOKENS, initial_alphabet=alphabet, show_progress=False)
    )
    assert tokenizer.get_vocab_size() == TEXT_TOKENS
    names = ["endoftext", "startoftranscript", "en", "de", "fr", "translate", "transcribe", "startofprev", "notimestamps"]
    tokenizer.add_special_tokens([f"<|{name}|>" for name in names])
    tokenizer.add_tokens([AddedToken(f"<|{step * 0.02:.2f}|>", special=False) for step in range(TIMES)])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def make_model(encoder_decoder: EncoderDecoder, tokenizer_folder: Path) -> Callable[..., SpeechModel]:
    """The tiny Whisper; ``defaults`` as a checkpoint would advise, and changes to what it says of speech."""

    def make(defaults: GenerationDefaults | None = None, **changes: Any) -> SpeechModel:
        assert SETTINGS.encoder is not None
        encoder = replace(SETTINGS.encoder, speech=replace(SPEECH, **changes))
        contract = Contract(
            task="automatic-speech-recognition",
            inputs=(TensorSpec("input_features", "float32", ("batch", 80, 100)),),
            outputs=(TensorSpec("logits", "float32", ("batch", 1, SETTINGS.vocabulary_size)),),
            text=TextSettings(max_length=CONTEXT, pad_token_id=END),
            generation=replace(SETTINGS, encoder=encoder, defaults=defaults or GenerationDefaults()),
        )
        return SpeechModel(encoder_decoder, tokenizer_folder, contract)

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., SpeechModel]) -> SpeechModel:
    return make_model()


def make_sound(seed: int, seconds: float) -> np.ndarray:
    """Tones that come and go over noise; no two places sound alike."""
    generator = np.random.default_rng(seed)
    times = np.arange(int(seconds * RATE)) / RATE
    pitches = generator.uniform(100, 4000, size=int(seconds * 5) + 1)[(times * 5).astype(int)]
    loudness = generator.uniform(0.01, 0.5, size=int(seconds * 7) + 1)[(times * 7).astype(int)]
    sound: np.ndarray = loudness * np.sin(2 * np.pi * pitches * times) + 0.02 * generator.standard_normal(times.size)
    return sound.astype(np.float32)


@pytest.fixture(scope="session")
def sound_of() -> Callable[[int, float], np.ndarray]:
    return make_sound

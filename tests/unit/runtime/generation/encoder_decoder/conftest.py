"""Tiny random encoder-decoders both ways, as a pair of graphs and in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    MarianConfig,
    MarianMTModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.generation import GenerationMixin

from hfaccel.artifact.contract import Contract, Engine, SessionSettings, TensorSpec, TextSettings
from hfaccel.artifact.generation import EncoderSettings, GenerationSettings
from hfaccel.construct import construct_encoder_decoder
from hfaccel.rewrites.split_encoder_decoder import split_encoder_decoder
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.text_to_text import TextToTextModel

VOCABULARY = 400
CONTEXT = 128
START = 3
SIZES = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": START,
    "tie_word_embeddings": False,  # else a token is mostly followed by itself
}


@dataclass(frozen=True)
class TinyEncoderDecoder:
    """An encoder-decoder as graphs and in torch, and some sources of its own: two of one length, others longer and shorter."""

    folder: Path
    source: PreTrainedModel
    settings: GenerationSettings
    sources: tuple[np.ndarray, ...]

    def open(self, encoder_engine: Engine = "onnxruntime") -> EncoderDecoder:
        session = SessionSettings(intra_op_num_threads=1, encoder_engine=encoder_engine)
        return EncoderDecoder.open(self.folder / "encoder.onnx", self.folder / "decoder.onnx", session, self.settings)

    def feeds(self, sources: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """A batch, text padded on the right."""
        if sources[0].dtype == np.float32:
            return {"input_features": np.stack(sources)}
        width = max(map(len, sources))
        ids = np.stack([np.pad(source, (0, width - len(source))) for source in sources])
        mask = np.stack([np.pad(np.ones_like(source), (0, width - len(source))) for source in sources])
        return {"input_ids": ids, "attention_mask": mask}

    def expected(self, sources: Sequence[np.ndarray], tokens: int, **options: Any) -> list[list[int]]:
        """What transformers generates for the batch, without the start; the end token is the last where it came."""
        feeds = {name: torch.tensor(array) for name, array in self.feeds(sources).items()}
        given = {"eos_token_id": list(self.settings.end_token_ids) or None, "do_sample": False, **options}
        with torch.no_grad():  # Whisper has a method of its own, for hours of sound; the one of all models is the reference
            made = GenerationMixin.generate(self.source, **feeds, max_new_tokens=tokens, **given)
        return [self._cut(row) for row in made[:, 1:].tolist()]

    def with_ends(self, *ids: int) -> TinyEncoderDecoder:
        return replace(self, settings=replace(self.settings, end_token_ids=ids))

    def _cut(self, row: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(row) if token in self.settings.end_token_ids]
        return row[: ends[0] + 1] if ends else row


def _build(source: PreTrainedModel, folder: Path, sources: Sequence[np.ndarray], scale: float) -> TinyEncoderDecoder:
    source.generation_config = GenerationConfig(decoder_start_token_id=START, pad_token_id=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in source.eval().parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, scale)
    encoder, decoder = split_encoder_decoder(construct_encoder_decoder(source))
    onnx_ir.save(encoder, folder / "encoder.onnx")
    onnx_ir.save(decoder, folder / "decoder.onnx")
    settings = GenerationSettings(
        layers=2,
        key_value_heads=4,
        head_size=16,
        context_length=CONTEXT,
        vocabulary_size=VOCABULARY,
        end_token_ids=(),
        pad_token_id=0,
        encoder=EncoderSettings(source_length=CONTEXT, start_token_ids=(START,)),
    )
    return TinyEncoderDecoder(folder, source, settings, tuple(sources))


def _texts() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(4, VOCABULARY, length) for length in (9, 9, 31, 2, 17)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads only get in each other's way with models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> TinyEncoderDecoder:
    """Scores depend on how far tokens are apart."""
    config = T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2
    )
    return _build(T5ForConditionalGeneration(config), tmp_path_factory.mktemp("t5"), _texts(), 0.15)


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> TinyEncoderDecoder:
    """Learned positions."""
    return _build(BartForConditionalGeneration(BartConfig(**SIZES)), tmp_path_factory.mktemp("bart"), _texts(), 0.15)


@pytest.fixture(scope="session")
def marian(tmp_path_factory: pytest.TempPathFactory) -> TinyEncoderDecoder:
    """Positions of sines, and a bias on the logits."""
    source = MarianMTModel(MarianConfig(**SIZES))
    source.final_logits_bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return _build(source, tmp_path_factory.mktemp("marian"), _texts(), 0.15)


@pytest.fixture(scope="session")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> TinyEncoderDecoder:
    """Reads sound, all of one length, without a mask."""
    sizes = {name: value for name, value in SIZES.items() if name != "max_position_embeddings"}
    config = WhisperConfig(**sizes, num_mel_bins=8, max_source_positions=20, max_target_positions=CONTEXT)
    random = np.random.default_rng(0)
    sounds = [random.normal(size=(8, 40)).astype(np.float32) for _ in range(4)]
    return _build(WhisperForConditionalGeneration(config), tmp_path_factory.mktemp("whisper"), sounds, 0.5)


MakeTextToText = Callable[..., TextToTextModel]


@pytest.fixture
def make_text_to_text(t5: TinyEncoderDecoder, tokenizer_folder: Path) -> MakeTextToText:
    """A model of the tiny T5; arguments replace fields of its generation settings, ``encoder`` those of its encoder settings."""

    def make(encoder: dict[str, Any] | None = None, **changes: Any) -> TextToTextModel:
        assert t5.settings.encoder is not None
        own = replace(t5.settings.encoder, **(encoder or {}))
        tiny = replace(t5, settings=replace(t5.settings, encoder=own, **changes))
        contract = Contract(
            task="text2text-generation",
            inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
            outputs=(TensorSpec("logits", "float32", ("batch", 1, VOCABULARY)),),
            text=TextSettings(max_length=CONTEXT, pad_token_id=0),
            generation=tiny.settings,
        )
        return TextToTextModel(tiny.open(), tokenizer_folder, contract)

    return make

"""What all tests share: no model hub, a tiny checkpoint, the command line inside this process, and real checkpoints on request."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Before any test imports a Hugging Face library, which reads it at import.
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent
DOWNLOAD_FAILED = 3

RealAsset = Callable[[str, str], Path]
WriteTokenizer = Callable[..., None]

FAST = ("--workload", "1x8", "--set", "measure.seconds_per_point=0.05")
"""Options that make a compile of a tiny checkpoint short."""


@dataclass(frozen=True)
class Finished:
    """A finished command: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


CommandLine = Callable[..., Finished]


@pytest.fixture(scope="session")
def write_tokenizer() -> WriteTokenizer:
    """Write a tokenizer of whole words into a folder: five special ones, then ``word0``, ``word1`` ..."""

    def write(folder: Path, *, words: int = 100, settings: Mapping[str, Any] = {}) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        vocabulary = [*special, *(f"word{number}" for number in range(words - len(special)))]
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokenizer.add_special_tokens(special)
        tokenizer.save(str(folder / "tokenizer.json"))
        named = {"pad_token": "[PAD]", "mask_token": "[MASK]", "model_max_length": 64, **settings}
        text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named})
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    return write


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: WriteTokenizer) -> Path:
    """A random BERT that tells NO from YES: 2 layers, hidden size 64, 100 words."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source") / "tiny"
    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        id2label={0: "NO", 1: "YES"},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: WriteTokenizer) -> Path:
    """A random Llama with a chat template: 2 layers, hidden size 64, 100 words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("source") / "chat"
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = LlamaConfig(vocab_size=100, **sizes, max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=3)
    LlamaForCausalLM(config).save_pretrained(folder)
    template = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    write_tokenizer(folder, settings={"model_max_length": 128, "chat_template": template})
    return folder


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory, enlarge: Callable[[Any], None]) -> Path:
    """A random Whisper that listens to a second at once and knows bytes: token 256 ends a transcript, 257 begins it."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("source") / "whisper"
    folder.mkdir()
    end, start, no_times = 256, 257, 258
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    tokenizer.add_tokens([AddedToken(f"<|{step * 0.02:.2f}|>", special=False) for step in range(51)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "model_max_length": 48}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    config = transformers.WhisperConfig(
        vocab_size=no_times + 52, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50, max_target_positions=48,
        tie_word_embeddings=False, suppress_tokens=None, begin_suppress_tokens=None, **ends,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    enlarge(model)
    times = {"no_timestamps_token_id": no_times, "return_timestamps": False, "is_multilingual": False}
    model.generation_config = transformers.GenerationConfig(max_length=48, **ends, **times)
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(chunk_length=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def enlarge() -> Callable[[Any], None]:
    """Gives an encoder-decoder random weights larger than those that training starts from; its source counts for much."""
    import torch

    def change(model: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif parameter.requires_grad:  # tables of sines are not
                    parameter.normal_(0, 0.6 if "embed_positions" in name else 0.2)
                if "encoder_attn.q_proj.weight" in name or "encoder_attn.out_proj.weight" in name:
                    parameter.mul_(3)

    return change


@pytest.fixture(scope="session")
def tiny_recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CSV: audio, text; six tones of less than a second, with words that nobody said."""
    import numpy as np
    import soundfile

    folder = tmp_path_factory.mktemp("recordings")
    random = np.random.default_rng(0)
    lines = ["audio,text"]
    for number in range(6):
        times = np.arange(int(16000 * random.uniform(0.4, 0.9))) / 16000
        sound = 0.3 * np.sin(2 * np.pi * random.uniform(200, 2000) * times) + 0.02 * random.standard_normal(times.size)
        soundfile.write(folder / f"{number}.wav", sound, 16000)
        lines.append(f"{number}.wav,a sound of some {number} words")
    (folder / "recordings.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "recordings.csv"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CSV: text, label; 60 rows."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    rows = [f"word{n % 95} word{(n * 7) % 95} word{(n * 13) % 95},{'YES' if n % 2 else 'NO'}" for n in range(60)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache folder that the compiles of this session share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_compiled(
    tiny_checkpoint: Path, tiny_data: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The tiny checkpoint, compiled by a process of its own with an empty cache: its folder and what ``--json`` printed."""
    output = tmp_path_factory.mktemp("output") / "tiny"
    command = [sys.executable, "-m", "hfaccel", "compile", str(tiny_checkpoint), "-o", str(output), "--data", str(tiny_data)]
    own_cache = tmp_path_factory.mktemp("empty-cache")  # others of this worker may have compiled into theirs before
    environment = {**os.environ, "HFACCEL_CACHE": str(own_cache)}
    finished = subprocess.run([*command, "--json", *FAST], capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    shutil.copytree(own_cache, tiny_cache, dirs_exist_ok=True)
    return output, json.loads(finished.stdout)


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_cache: Path) -> CommandLine:
    """``hfaccel`` inside this process, from the arguments to the exit code, with the cache of the tiny compiles."""
    from hfaccel.cli.app import main

    monkeypatch.setenv("HFACCEL_CACHE", str(tiny_cache))

    def run(*arguments: str | Path) -> Finished:
        monkeypatch.setattr(sys, "argv", ["hfaccel", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Finished(int(stopped.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def real_asset() -> RealAsset:
    """Make a real asset by name and give one of its paths; skips when a download fails and fails on anything else.

    ``HFACCEL_REAL_DIR`` says where they are kept; the default is the folder of ``make demo``, so that nothing is fetched twice.
    """
    root = Path(os.environ.get("HFACCEL_REAL_DIR", REPOSITORY / "demo")).resolve()

    def get(name: str, path: str) -> Path:
        program = REPOSITORY / "tests" / "real" / "checkpoints.py"
        finished = subprocess.run([sys.executable, str(program), str(root), name], capture_output=True, text=True, check=False)
        if finished.returncode == DOWNLOAD_FAILED:
            pytest.skip(f"{name} could not be downloaded: {finished.stderr.strip()}")
        if finished.returncode != 0:
            pytest.fail(f"{name} could not be made:\n{finished.stderr}")
        return root / path

    return get


@pytest.fixture(scope="session")
def minilm_checkpoint(real_asset: RealAsset) -> Path:
    """Sentence embedding, 6 layers, hidden size 384."""
    return real_asset("minilm-l6-v2", "checkpoints/minilm-l6-v2")


@pytest.fixture(scope="session")
def rampart_checkpoint(real_asset: RealAsset) -> Path:
    """Token classification, 35 BIO labels."""
    return real_asset("rampart-pii-ner", "checkpoints/rampart-pii-ner")


@pytest.fixture(scope="session")
def sentiment_checkpoint(real_asset: RealAsset) -> Path:
    """Text classification, NEGATIVE and POSITIVE."""
    return real_asset("minilm-sentiment-probe", "checkpoints/minilm-sentiment-probe")


@pytest.fixture(scope="session")
def lee_pairs(real_asset: RealAsset) -> Path:
    """CSV: text1, text2, score."""
    return real_asset("lee", "data/lee-pairs.csv")


@pytest.fixture(scope="session")
def lee_background(real_asset: RealAsset) -> Path:
    """News, a text a line."""
    return real_asset("lee", "data/lee-background.txt")


@pytest.fixture(scope="session")
def movie_reviews_train(real_asset: RealAsset) -> Path:
    """CSV: text, label; 6000 rows."""
    return real_asset("movie-reviews", "data/movie-reviews-train.csv")


@pytest.fixture(scope="session")
def movie_reviews_test(real_asset: RealAsset) -> Path:
    """CSV: text, label; the 1500 held-out rows."""
    return real_asset("movie-reviews", "data/movie-reviews-test.csv")


@pytest.fixture(scope="session")
def pii_sentences(real_asset: RealAsset) -> Path:
    """JSON lines: words, tags."""
    return real_asset("pii-sentences", "data/pii-sentences.jsonl")


@pytest.fixture(scope="session")
def smollm2_checkpoint(real_asset: RealAsset) -> Path:
    """Chat model, Llama of 30 layers, hidden size 576."""
    return real_asset("smollm2-135m-instruct", "checkpoints/smollm2-135m-instruct")


@pytest.fixture(scope="session")
def whisper_checkpoint(real_asset: RealAsset) -> Path:
    """Speech recognition, English, 4 + 4 layers, hidden size 384."""
    return real_asset("whisper-tiny.en", "checkpoints/whisper-tiny.en")


@pytest.fixture(scope="session")
def librivox(real_asset: RealAsset) -> Path:
    """CSV: audio, text; 5 sentences."""
    return real_asset("librivox", "data/librivox.csv")


@pytest.fixture(scope="session")
def speech(real_asset: RealAsset) -> Path:
    """CSV: audio, text; 19 sentences and lines of verse."""
    return real_asset("speech", "data/speech.csv")

"""``hfaccel bench`` on a tiny random T5 and a tiny random Whisper; says nothing about how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from hfaccel.artifact.contract import Contract, TensorSpec, TextSettings
from hfaccel.artifact.generation import EncoderSettings, GenerationSettings, SpeechSettings
from hfaccel.cli.bench import bench

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
onnx_ir = pytest.importorskip("onnx_ir")
soundfile = pytest.importorskip("soundfile")

TEXT_TOKENS, CONTEXT, RATE = 256, 40, 16000
PADDING, END, UNKNOWN = 256, 257, 258
ENDOFTEXT, START, NO_TIMES = 256, 257, 258


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The comparison sets torch's number of threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def save_tokenizer(folder, special, config):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def save_pair(model, folder):
    """The pair of graphs of a model of transformers."""
    from hfaccel.construct import construct_encoder_decoder
    from hfaccel.rewrites.split_encoder_decoder import split_encoder_decoder

    encoder, decoder = split_encoder_decoder(construct_encoder_decoder(model))
    onnx_ir.save(encoder, str(folder / "encoder.onnx"))
    onnx_ir.save(decoder, str(folder / "decoder.onnx"))


def scatter(model, scale):
    """Weights large enough that what is read makes a difference."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.eval().parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, scale)
    return model


def save_manifest(folder, source, contract):
    manifest = {
        "format_revision": 1,
        "source": {"id": "tiny", "folder": str(source)},
        "contract": contract.to_json(),
        "session": {"intra_op_num_threads": 1},
        "graph": "decoder.onnx",
        "precision": "fp32",
        "stages": [],
        "files": [{"path": path.name, "size_bytes": path.stat().st_size, "sha256": ""} for path in folder.iterdir()],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def settings(vocabulary, encoder, end):
    return GenerationSettings(
        layers=2,
        key_value_heads=2,
        head_size=16,
        context_length=CONTEXT,
        vocabulary_size=vocabulary,
        end_token_ids=(end,),
        pad_token_id=256,
        encoder=encoder,
    )


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench-t5")
    source, folder = root / "source", root / "out"
    source.mkdir()
    folder.mkdir()
    config = transformers.T5Config(
        vocab_size=259,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=PADDING,
        eos_token_id=END,
        decoder_start_token_id=PADDING,
        tie_word_embeddings=False,
    )
    model = scatter(transformers.T5ForConditionalGeneration(config), 0.15)
    with torch.no_grad():
        model.lm_head.weight[END] *= 20  # wants to end all the time
    model.save_pretrained(source)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    save_tokenizer(source, list(names.values()), {"tokenizer_class": "PreTrainedTokenizerFast", **names})
    save_pair(model, folder)
    shutil.copy(source / "tokenizer.json", folder)
    contract = Contract(
        task="text2text-generation",
        inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        outputs=(TensorSpec("logits", "float32", ("batch", 1, 259)),),
        text=TextSettings(max_length=64, pad_token_id=PADDING),
        generation=settings(259, EncoderSettings(source_length=64, start_token_ids=(PADDING,)), END),
    )
    save_manifest(folder, source, contract)
    return folder


SPEECH = SpeechSettings(
    sampling_rate_hz=RATE,
    mel_bins=80,
    fft_samples=400,
    hop_samples=160,
    window_seconds=1,
    end_of_text_token_id=ENDOFTEXT,
    start_of_transcript_token_id=START,
    no_timestamps_token_id=NO_TIMES,
)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench-whisper")
    source, folder = root / "source", root / "out"
    source.mkdir()
    folder.mkdir()
    config = transformers.WhisperConfig(
        vocab_size=310,
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
        bos_token_id=ENDOFTEXT,
        eos_token_id=ENDOFTEXT,
        pad_token_id=ENDOFTEXT,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        tie_word_embeddings=False,
    )
    model = scatter(transformers.WhisperForConditionalGeneration(config), 0.3)
    # Times and what lies between are not asked for.
    suppressed = [*range(START, 310)]
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=START,
        bos_token_id=ENDOFTEXT,
        eos_token_id=ENDOFTEXT,
        pad_token_id=ENDOFTEXT,
        max_length=CONTEXT,
        suppress_tokens=suppressed,
        begin_suppress_tokens=[ENDOFTEXT],
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMES,
        return_timestamps=False,
    )
    model.save_pretrained(source)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    names = dict.fromkeys(("pad_token", "eos_token", "bos_token", "unk_token"), special[0])
    save_tokenizer(source, special, {"tokenizer_class": "WhisperTokenizer", **names})
    transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1).save_pretrained(source)
    save_pair(model, folder)
    shutil.copy(source / "tokenizer.json", folder)
    encoder = EncoderSettings(
        source_length=50,
        start_token_ids=(START,),
        suppressed_token_ids=tuple(suppressed),
        suppressed_first_token_ids=(ENDOFTEXT,),
        speech=SPEECH,
    )
    contract = Contract(
        task="automatic-speech-recognition",
        inputs=(TensorSpec("input_features", "float32", ("batch", 80, 100)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 1, 310)),),
        text=TextSettings(max_length=CONTEXT, pad_token_id=ENDOFTEXT),
        generation=settings(310, encoder, ENDOFTEXT),
    )
    save_manifest(folder, source, contract)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Two sounds that fit into a window, and one that does not."""
    folder = tmp_path_factory.mktemp("sounds")
    random = np.random.default_rng(0)
    for name, seconds in (("one", 0.8), ("two", 0.5), ("long", 1.2)):
        soundfile.write(folder / f"{name}.wav", 0.1 * random.standard_normal(int(seconds * RATE)), RATE)
    rows = ["audio,text", *(f"{name}.wav,the sea says nothing" for name in ("one", "two", "long"))]
    (folder / "speech.csv").write_text("\n".join(rows), encoding="utf-8")
    (folder / "long.csv").write_text("audio,text\nlong.wav,the sea", encoding="utf-8")
    return folder


def run(*arguments):
    app = typer.Typer()
    app.command()(bench)
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, [str(argument) for argument in arguments])


def test_texts_are_compared_from_the_first_token_on(t5):
    done = run(t5, "--workload", "12+6,4+1", "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["not_compared"] == []
    assert [(row["workload"], row["part"], row["engine"], row["tokens"]) for row in result["rows"]] == [
        (request, part, engine, tokens)
        for request, parts in (("12+6", (("source", 12), ("answer", 5), ("whole", 6))), ("4+1", (("source", 4), ("whole", 1))))
        for part, tokens in parts
        for engine in ("artifact", "torch fp32")
    ]
    assert [row["same_tokens"] for row in result["rows"] if row["engine"] == "torch fp32"] == [6, 6, 6, 1, 1]
    assert all(len(row["samples_ms"]) >= 7 for row in result["rows"])


def test_ctranslate2_reads_the_same_text(t5):
    pytest.importorskip("ctranslate2")
    done = run(t5, "--against", "ctranslate2", "--workload", "12+6", "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["not_compared"] == []
    assert [row["engine"] for row in result["rows"]] == ["artifact", "ctranslate2 int8"] * 3


def test_texts_are_a_table_and_a_picture(t5, tmp_path):
    pytest.importorskip("matplotlib")
    done = run(t5, "--against", "", "--workload", "12+6", "--seconds", "0.1", "--plot", tmp_path / "bars.svg")
    assert done.exit_code == 0, done.output
    assert "same tokens" in done.stdout
    assert "<svg" in (tmp_path / "bars.svg").read_text(encoding="utf-8")


def test_sounds_are_transcribed_by_all(whisper, sounds):
    against = "torch,ctranslate2" if importlib.util.find_spec("ctranslate2") else "torch"
    done = run(whisper, "--data", sounds / "speech.csv", "--against", against, "--seconds", "0.1", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["not_compared"] == []
    assert result["sounds"] == {"timed": 2, "of": 3, "longer_left_out": 1, "seconds": pytest.approx(1.3)}
    labels = ["artifact", "torch fp32", "ctranslate2 int8"][: 1 + len(against.split(","))]
    assert [row["engine"] for row in result["rows"]] == labels
    assert result["rows"][1]["same_transcripts"] == 2
    assert all(row["word_error_rate"] > 0 for row in result["rows"])
    assert [row["part"] for row in result["artifact_parts"]] == ["features", "encoder", "decoder"]
    texts = [clip["text"]["artifact"] for clip in result["clips"]]
    assert all(texts)
    assert texts[0] != texts[1]


def test_the_table_of_speech_names_a_peer_that_is_not_there(whisper, sounds, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("hfaccel.measure.peers.find_spec", lambda name: None if name == "ctranslate2" else find(name))
    done = run(whisper, "--data", sounds / "speech.csv", "--against", "ctranslate2", "--seconds", "0.1")
    assert done.exit_code == 0, done.output
    assert "ctranslate2: not installed (pip install ctranslate2)" in done.stdout
    assert "real-time factor" in done.stdout
    assert "1 sounds are longer than the encoder reads at once" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--data: a speech model is timed on sounds, and there are none (give --data FILE"),
        (("--workload", "8+8"), "--workload: the option has no meaning for a speech model"),
        (("--plot", "a.png"), "--plot: the option has no meaning for a speech model"),
        (("--stream", "texts.txt"), "--stream: the option has no meaning for an encoder-decoder"),
        (("--ladder",), "--ladder: the option has no meaning for an encoder-decoder"),
        (("--against", "openvino"), "known peers: torch, ctranslate2"),
    ],
)
def test_options_that_mean_nothing_to_speech_say_so(whisper, options, message):
    assert message in str(run(whisper, *options).exception)


def test_sounds_that_are_all_too_long_are_refused(whisper, sounds):
    done = run(whisper, "--data", sounds / "long.csv", "--against", "")
    assert "no sound is shorter than the 1 s that the encoder reads at once" in str(done.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "speech.csv"), "--data: the option is for speech models"),
        (("--graph-only",), "--graph-only: the option has no meaning for an encoder-decoder"),
        (("--workload", "1x16"), "write prompt+new tokens"),
        (("--workload", "65+4"), "64 tokens of the source, 39 new ones"),
        (("--against", "onnxruntime-genai"), "known peers: torch, ctranslate2"),
    ],
)
def test_options_that_mean_nothing_to_texts_say_so(t5, options, message):
    assert message in str(run(t5, *options).exception)


def test_a_manifest_without_a_source_asks_for_it(t5, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(t5, folder)
    manifest = json.loads((t5 / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "source": {}}), encoding="utf-8")
    assert "give --model CHECKPOINT" in str(run(folder, "--workload", "8+4").exception)

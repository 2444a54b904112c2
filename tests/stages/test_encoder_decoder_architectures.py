"""Every encoder-decoder of the recipes: tiny random models, compiled, answer as transformers does, alone and in a batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
import typer
from typer.testing import CliRunner

import hfaccel
from hfaccel.api import SilentProgress
from hfaccel.artifact.contract import Contract, SessionSettings
from hfaccel.artifact.manifest import verify_files
from hfaccel.cli.run import run
from hfaccel.errors import ExportError, UsageError
from hfaccel.pipeline import CompileResult
from hfaccel.recipe.load import list_recipes, load_recipe
from hfaccel.rewrites.graphs import load_graph, operator_counts
from hfaccel.runtime.engines import EngineFallbackWarning
from hfaccel.runtime.generation.encoder_decoder import EncoderDecoder
from hfaccel.runtime.generation.text_to_text import TextToTextModel
from hfaccel.runtime.speech.model import SpeechModel

OFF_TARGET = "cpu-arm-dotprod"
"""Another target than any host of these tests: nothing is timed, so no candidate is dropped for its speed."""
WORDS = 110
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 20, "num_beams": 1, "no_repeat_ngram_size": 1}
"""Random models say one word over and over; held to new ones, each step shows what comes second, third and so on."""
LENGTHS = (3, 19, 8)
T5_SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
FEW_DISTANCES = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 10}
BART_SIZES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "eos_token_id": 3,
    "forced_eos_token_id": None, "forced_bos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
# model_type -> settings; ids 0 to 4 are special, 3 ends an answer.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "t5": {**T5_SIZES, **FEW_DISTANCES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": T5_SIZES,
    "bart": BART_SIZES,
    "mbart": BART_SIZES,
    "marian": {**BART_SIZES, "scale_embedding": True},
    "pegasus": BART_SIZES,
    "blenderbot": BART_SIZES,
    "m2m_100": {**BART_SIZES, "scale_embedding": True},
}


Make = Callable[[str, Path], None]


@pytest.fixture
def make_checkpoint(write_tokenizer: Callable[..., None], enlarge: Callable[[Any], None]) -> Make:
    def make(model_type: str, folder: Path) -> None:
        folder.mkdir()
        torch.manual_seed(0)
        ids = {"vocab_size": WORDS, "pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 3}
        config = transformers.AutoConfig.for_model(model_type, **{**ids, **ARCHITECTURES[model_type]})
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
        enlarge(model)
        model.save_pretrained(folder)
        write_tokenizer(folder, words=WORDS, settings={"model_max_length": 48})

    return make


def sources() -> list[str]:
    random = np.random.default_rng(1)
    return [" ".join(f"word{number}" for number in random.integers(0, WORDS - 5, length)) for length in LENGTHS]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources and their answers."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    texts = [" ".join(f"word{number}" for number in random.integers(0, WORDS - 5, 12)) for _ in range(16)]
    path.write_text("\n".join(["source,target", *(f"{text},{text[:40].rsplit(' ', 1)[0]}" for text in texts)]) + "\n")
    return path


def compile_one(checkpoint: Path, output: Path, data: Path | None, *overrides: str) -> CompileResult:
    progress = SilentProgress()
    result = hfaccel.compile(
        checkpoint, output=output, data=data, target=OFF_TARGET, overrides=overrides, use_cache=False, progress=progress
    )
    assert not [line for line in progress.warnings if line.startswith(("no recipe", "exporter", "fusion"))]
    return result


def answers_of_transformers(checkpoint: Path) -> list[str]:
    """Greedy, each source alone."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    answers = []
    for source in sources():
        inputs = {name: tokenizer(source, return_tensors="pt")[name] for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            given = model.generate(**inputs, **GREEDY, do_sample=False)
        answers.append(tokenizer.decode(given[0], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_answers_are_those_of_transformers_alone_and_in_a_ragged_batch(
    model_type: str, tmp_path: Path, make_checkpoint: Make, pairs: Path
) -> None:
    make_checkpoint(model_type, tmp_path / "model")
    result = compile_one(tmp_path / "model", tmp_path / "out", pairs, "quantize.enabled=false")
    expected = answers_of_transformers(tmp_path / "model")
    assert all(len(answer.split()) > 15 for answer in expected)
    assert len(set(expected)) == len(expected), "sources make no difference: nothing is compared"
    model = hfaccel.load(result.folder)
    assert isinstance(model, TextToTextModel)
    assert [model.generate(source, **GREEDY) for source in sources()] == expected
    assert model.generate(sources(), **GREEDY) == expected
    stages = {record["stage"]: record for record in result.manifest["stages"]}
    assert stages["fuse"]["metrics"]["contract"]
    assert stages["fuse"]["metrics"]["contract_missed"] == []
    assert stages["export"]["metrics"]["parity"]["max_abs"] < 1e-5


def test_an_answer_that_begins_without_a_place_is_refused(tmp_path: Path, make_checkpoint: Make) -> None:
    """transformers counts M2M-100's positions from the first token that is no padding."""
    make_checkpoint("m2m_100", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "decoder_start_token_id": config["pad_token_id"]}))
    with pytest.raises(ExportError, match="begins with the padding token"):
        compile_one(tmp_path / "model", tmp_path / "out", None)


def test_every_recipe_has_a_row() -> None:
    stated = {item for summary in list_recipes() if summary.extends == "encoder-decoder" for item in summary.model_types}
    assert stated == {*ARCHITECTURES, "whisper"}


def test_the_default_ladder_ships_what_the_gate_admits(tmp_path: Path, make_checkpoint: Make, pairs: Path) -> None:
    make_checkpoint("bart", tmp_path / "model")
    result = compile_one(tmp_path / "model", tmp_path / "out", pairs, "accuracy.max_loss=0.2")
    judged = {item["name"]: item for item in result.manifest["candidates"]}
    assert judged.pop("int8-openvino-encoder")["reason"] == "engine-not-wanted", "nothing is timed, and nobody has named it"
    assert set(judged) == {"float", "int8-per-part", "int8-blocks", "dynamic-per-channel"}
    assert all(item["verdict"]["answers"]["metric"] == "rouge_l" for item in judged.values())
    assert result.manifest["precision"] == "int8"
    assert judged["int8-per-part"]["quantized"] == judged["int8-blocks"]["quantized"] > 0
    files = {item["path"] for item in result.manifest["files"]}
    assert {"encoder.onnx", "decoder.onnx", "model.onnx.data"} <= files
    assert "model.onnx" not in files, "the weights are there once"
    assert verify_files(result.folder) == []


OPENVINO_ONLY = ("quantize.precision=int8", "accuracy.max_loss=0.9", "accuracy.min_cosine=0.5", "accuracy.batch_invariance=0.5")


def only_openvino(family: str = "encoder-decoder") -> str:
    """The recipe's own rung, alone."""
    rung = next(rung for rung in load_recipe(family).recipe.quantize.ladder if rung.encoder_engine == "openvino")
    return f"quantize.ladder=[{rung.model_dump_json()}]"


def compile_for_openvino(checkpoint: Path, output: Path, data: Path, *overrides: str) -> CompileResult:
    pytest.importorskip("openvino", reason="the package openvino is not installed")
    given = (only_openvino(), *OPENVINO_ONLY, *overrides)
    return hfaccel.compile(
        checkpoint, output=output, data=data, target=OFF_TARGET, engines="openvino", overrides=given, use_cache=False
    )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_encoder_alone_runs_in_openvino(
    model_type: str, tmp_path: Path, make_checkpoint: Make, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(model_type, tmp_path / "model")
    result = compile_for_openvino(tmp_path / "model", tmp_path / "out", pairs)
    assert result.manifest["chosen"] == "int8-openvino-encoder"
    session = result.manifest["session"]
    assert (session["engine"], session["encoder_engine"]) == ("onnxruntime", "openvino")
    stages = {record["stage"]: record for record in result.manifest["stages"]}
    assert stages["quantize"]["metrics"]["calibration_examples"] == 16
    model = hfaccel.load(result.folder)
    assert isinstance(model, TextToTextModel)
    answers = model.generate(sources(), **GREEDY)
    assert all(len(answer.split()) > 15 for answer in answers)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.warns(EngineFallbackWarning, match="compiled for openvino"):
        other = hfaccel.load(result.folder)
    assert isinstance(other, TextToTextModel)
    assert all(len(answer.split()) > 15 for answer in other.generate(sources(), **GREEDY))


RATE = 16000
END, START, NO_TIMES = 256, 257, 258
"""Of the tiny Whisper."""


def test_a_speech_model_writes_what_transformers_writes(tmp_path: Path, tiny_whisper: Path, tiny_recordings: Path) -> None:
    result = compile_one(tiny_whisper, tmp_path / "out", tiny_recordings, "accuracy.max_loss=0.5")
    assert result.manifest["source"]["task"] == "automatic-speech-recognition"
    assert {item["name"] for item in result.manifest["candidates"]} == {
        "float", "int8-per-part", "int8-openvino-encoder", "int8-blocks", "dynamic-per-channel",
    }  # fmt: skip
    floating = compile_one(tiny_whisper, tmp_path / "float", tiny_recordings, "quantize.enabled=false")
    model = hfaccel.load(floating.folder)
    assert isinstance(model, SpeechModel)
    source = transformers.WhisperForConditionalGeneration.from_pretrained(tiny_whisper).eval()
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tiny_whisper)
    files = sorted(tiny_recordings.parent.glob("*.wav"))
    for file in files:
        sound = soundfile.read(file, dtype="float32")[0]
        features = extractor(sound, sampling_rate=RATE, return_tensors="pt").input_features
        with torch.inference_mode():
            expected = [
                token for token in source.generate(features, do_sample=False)[0].tolist() if token not in (END, START, NO_TIMES)
            ]
        assert len(set(expected)) > 1
        assert model.transcribe_ids([file])[0] == expected
    assert [transcript.text for transcript in model.transcribe(files)] == [model.transcribe(file).text for file in files]
    # On the command line an answer is drawn again until it is good, or taken for silence.
    drawing = ["--temperatures", "0.5,1", "--seed", "3", "--compression-ratio-threshold", "0.1"]
    drawn = model.transcribe(files[0], temperatures=(0.5, 1.0), seed=3, compression_ratio_threshold=0.1).text
    assert drawn != model.transcribe(files[0]).text
    assert told(floating.folder, files[0], *drawing) == drawn
    assert told(floating.folder, files[0], "--no-speech-threshold", "-1", "--logprob-threshold", "0") == ""
    with pytest.raises(UsageError, match="no list of numbers"):
        told(floating.folder, files[0], "--temperatures", "0;1")


def test_the_encoder_of_a_speech_model_is_calibrated_on_sounds(tmp_path: Path, tiny_whisper: Path, tiny_recordings: Path) -> None:
    result = compile_for_openvino(tiny_whisper, tmp_path / "out", tiny_recordings)
    assert result.manifest["chosen"] == "int8-openvino-encoder"
    encoder = operator_counts(load_graph(result.folder / "encoder.onnx"))
    assert encoder["QuantizeLinear"] > 0
    assert "onnxruntime, its encoder by openvino" in (result.folder / "report.html").read_text(encoding="utf-8")
    assert "pip install 'hfaccel[openvino]'" in (result.folder / "README.md").read_text(encoding="utf-8")
    model = hfaccel.load(result.folder)
    assert isinstance(model, SpeechModel)
    assert all(transcript.text for transcript in model.transcribe(sorted(tiny_recordings.parent.glob("*.wav"))))
    # Of random weights the answers may differ from those in a batch: a value that lies between two levels goes to either.
    session = SessionSettings.from_json(result.manifest["session"])
    settings = Contract.from_json(result.manifest["contract"]).generation
    assert settings is not None
    opened = EncoderDecoder.open(result.folder / "encoder.onnx", result.folder / "decoder.onnx", session, settings)
    features = np.random.default_rng(0).normal(size=(3, 80, 100)).astype(np.float32)
    together = opened.encode({"input_features": features}).arrays()
    for row in range(3):
        for name, array in opened.encode({"input_features": features[row : row + 1]}).arrays().items():
            assert np.linalg.norm(together[name][row] - array[0]) < 0.05 * np.linalg.norm(array), name


def test_what_needs_more_than_an_encoder_is_refused_by_name(tmp_path: Path, make_checkpoint: Make, pairs: Path) -> None:
    make_checkpoint("bart", tmp_path / "model")
    ladder = (
        "quantize.ladder=[{name: all-static, scheme: static, graph: fused}, {name: gptq, scheme: weight-only, graph: fused, method: gptq}, "
        "{name: all-openvino, scheme: none, graph: fused, engine: openvino}]"
    )
    result = hfaccel.compile(
        tmp_path / "model",
        output=tmp_path / "out",
        data=pairs,
        target=OFF_TARGET,
        engines="onnxruntime,openvino",
        overrides=(ladder,),
    )
    told = {item["name"]: (item["reason"], item["detail"]) for item in result.manifest["candidates"]}
    assert all(told[name][0] == "not-supported-by-model" for name in ("all-static", "gptq", "all-openvino"))
    assert "blockwise_decoder" in told["all-static"][1]
    assert "encoder_engine" in told["all-openvino"][1]


def told(folder: Path, file: Path, *options: str) -> str:
    """What ``hfaccel run`` prints."""
    app = typer.Typer()
    app.command()(run)
    result = CliRunner().invoke(app, [str(folder), str(file), *options, "--json"], catch_exceptions=False)
    text: str = json.loads(result.stdout)[0]["text"]
    return text


def test_a_speech_model_is_not_judged_without_recordings(tmp_path: Path, tiny_whisper: Path) -> None:
    with pytest.raises(UsageError, match="recordings"):
        compile_one(tiny_whisper, tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_cannot_be_traced_and_says_so(tmp_path: Path, make_checkpoint: Make, pairs: Path) -> None:
    make_checkpoint("bart", tmp_path / "model")
    with pytest.raises(ExportError, match="constructed for encoder-decoders"):
        compile_one(tmp_path / "model", tmp_path / "out", pairs, "export.exporters=[torch]")

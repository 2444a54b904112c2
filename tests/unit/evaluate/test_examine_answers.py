"""The examiner of encoder-decoders: tiny random models in torch as the source, and their graphs as candidates."""

from __future__ import annotations

import copy
import wave
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hfaccel.artifact.contract import Contract, TextSettings
from hfaccel.artifact.generation import EncoderSettings, GenerationSettings, SpeechSettings
from hfaccel.construct import construct_encoder_decoder
from hfaccel.errors import DataError, SettingsError
from hfaccel.evaluate.dataset import Dataset, Example
from hfaccel.evaluate.teacher_forcing import AnswerReader, own_answers
from hfaccel.recipe.load import load_recipe
from hfaccel.runtime.session import GraphSession, Runner
from hfaccel.source.torch_model import TorchRunner
from hfaccel.source.wrapper import TaskModel
from hfaccel.stages.examine_answers import AnswersExaminer

PAD, START, END = 0, 2, 3
SPECIAL = (0, 1, 2, 4)
WORDS = 100
SIZES = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
    "decoder_start_token_id": START,
    "tie_word_embeddings": False,
}
SETTINGS = GenerationSettings(
    layers=2,
    key_value_heads=2,
    head_size=16,
    context_length=48,
    vocabulary_size=WORDS,
    end_token_ids=(END,),
    pad_token_id=PAD,
    encoder=EncoderSettings(source_length=48, start_token_ids=(START,), suppressed_token_ids=SPECIAL),
)
CONTRACT = Contract("text2text-generation", (), (), TextSettings(max_length=48, pad_token_id=PAD), generation=SETTINGS)
SPEECH = SpeechSettings(
    sampling_rate_hz=16_000,
    mel_bins=80,
    fft_samples=400,
    hop_samples=160,
    window_seconds=1,
    end_of_text_token_id=END,
    start_of_transcript_token_id=START,
    no_timestamps_token_id=4,
)
LISTENING = replace(SETTINGS, encoder=EncoderSettings(source_length=50, start_token_ids=(START,), speech=SPEECH))


def loud(model: PreTrainedModel) -> PreTrainedModel:
    """With weights so large that the model is sure of what it says."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def bart() -> PreTrainedModel:
    model = BartForConditionalGeneration(BartConfig(**SIZES, max_position_embeddings=48, forced_eos_token_id=None))
    ids = {"eos_token_id": END, "pad_token_id": PAD, "decoder_start_token_id": START}
    model.generation_config = GenerationConfig(suppress_tokens=list(SPECIAL), **ids)
    model.final_logits_bias[0, END] = 2  # answers of many lengths
    return loud(model)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, write_tokenizer: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, words=WORDS)
    return folder


def torch_runner(model: PreTrainedModel, task: Any, *names: str) -> Runner:
    return TorchRunner(TaskModel(model, task=task, input_names=(*names, "decoder_input_ids"), output_names=("logits",)))


def graph(model: PreTrainedModel, folder: Path, *, noise: float = 0.0) -> GraphSession:
    """The model as a graph, its weights disturbed by a share of their own size."""
    changed = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            if noise and parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * parameter.std() * noise)
    path = folder / "model.onnx"
    onnx_ir.save(construct_encoder_decoder(changed), path)
    return GraphSession(path)


def context(**changes: Any) -> Any:
    recipe = load_recipe("encoder").recipe
    limits = recipe.accuracy.model_copy(update=changes)
    return SimpleNamespace(recipe=recipe.model_copy(update={"accuracy": limits}), metric=None)


def sources(count: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(f"word{word}" for word in generator.integers(0, 95, generator.integers(3, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def source(bart: PreTrainedModel) -> Runner:
    return torch_runner(bart, "text2text-generation", "input_ids", "attention_mask")


@pytest.fixture(scope="module")
def unlabelled() -> Dataset:
    return Dataset("d", tuple(Example(text) for text in sources(40)), labelled=False, sha256="")


@pytest.fixture(scope="module")
def labelled(source: Runner, unlabelled: Dataset, tokenizer: Path) -> Dataset:
    """The references are what the source says, with a word changed in every fourth and put where it says nothing."""
    reader = AnswerReader(tokenizer, CONTRACT)
    answers = own_answers(source, reader, unlabelled.examples, reader.starts(source, unlabelled.examples))
    texts = [[f"word{token - 5}" for token in ids if token >= 5] for ids in answers]
    texts = [["word9", *words[1:]] if number % 4 == 0 or not words else words for number, words in enumerate(texts)]
    examples = [replace(example, answers=(" ".join(words),)) for example, words in zip(unlabelled.examples, texts, strict=True)]
    return Dataset("d", tuple(examples), labelled=True, sha256="")


def test_the_sources_own_answers_are_those_of_transformers(
    bart: PreTrainedModel, source: Runner, unlabelled: Dataset, tokenizer: Path
) -> None:
    reader = AnswerReader(tokenizer, CONTRACT)
    examples = unlabelled.examples[:10]
    answers = own_answers(source, reader, examples, reader.starts(source, examples))
    for example, answer in zip(examples, answers, strict=True):
        feeds = {name: torch.tensor(array) for name, array in reader.source_feeds([example]).items()}
        expected = bart.generate(**feeds, do_sample=False, num_beams=1, max_length=48)[0, 1:].tolist()
        assert list(answer) == expected
    assert len({len(answer) for answer in answers}) > 3


@pytest.mark.parametrize("data", ["labelled", "unlabelled"])
def test_the_same_weights_as_a_graph_pass_and_disturbed_ones_are_refused(
    data: str, bart: PreTrainedModel, source: Runner, tokenizer: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    examiner = AnswersExaminer(source, request.getfixturevalue(data), tokenizer, CONTRACT, context())
    same = examiner.examine(graph(bart, tmp_path))
    assert same.verdict.passed
    assert same.reason is None
    assert same.batch_cosine > 0.9999
    assert abs(same.verdict.losses[0].loss) < 1e-4
    assert same.verdict.losses[0].metric == "perplexity"
    assert same.verdict.agreement_mean == 1
    assert same.verdict.examples == 40
    assert same.to_json()["answers"] is None
    noisy = examiner.examine(graph(bart, tmp_path, noise=0.1))
    assert noisy.reason == "loss-over-budget"
    assert noisy.verdict.kl_mean is not None
    assert noisy.verdict.kl_mean > 0.01
    assert "perplexity" in noisy.detail
    assert "budget 1.00%" in noisy.detail


def test_the_reference_is_read_with_the_tokens_that_begin_and_end_it(source: Runner, tokenizer: Path) -> None:
    reader = AnswerReader(tokenizer, CONTRACT)
    example = Example("word1 word2", answers=("word3 word4",))
    forced = reader.force(7, example, reader.starts(source, [example])[0], reader.answer_ids(example.answers[0]))
    assert forced.window.ids == (START, START, 8, 9, END)  # the tokenizer, too, puts [CLS] first
    assert (forced.window.first, forced.window.cluster) == (1, 7)
    begun = replace(CONTRACT, generation=replace(SETTINGS, encoder=replace(SETTINGS.encoder, forced_first_token_id=9)))  # type: ignore[type-var]
    assert AnswerReader(tokenizer, begun).answer_ids("word3") == (9, 8, END)  # in place of [CLS]
    long = AnswerReader(tokenizer, CONTRACT).force(0, example, (START,), (9,) * 100)
    assert len(long.window.ids) == SETTINGS.context_length


def test_own_answers_are_compared_by_the_metric_of_the_task(
    bart: PreTrainedModel, source: Runner, labelled: Dataset, tokenizer: Path, tmp_path: Path
) -> None:
    said = {example.text: example.answers[0] for example in labelled.examples}
    candidate = graph(bart, tmp_path)
    examiner = AnswersExaminer(
        source, labelled, tokenizer, CONTRACT, context(), source_answers=lambda examples: [said[item.text] for item in examples]
    )
    same = examiner.examine(candidate, answers=lambda examples: [said[item.text] for item in examples])
    assert same.reason is None
    assert same.answers is not None
    assert (same.answers.metric, same.answers.source, same.answers.loss) == ("rouge_l", 1, 0)
    assert same.answers.upper_bound > 0.01  # equal answers of 40 examples prove no more
    shown = same.to_json()
    assert shown["answers"]["examples"] == 40
    assert shown["losses"][0]["metric"] == "perplexity"
    worse = examiner.examine(candidate, answers=lambda examples: ["word1"] * len(examples))
    assert worse.verdict.passed  # it predicts as well; what it writes is another matter
    assert worse.reason == "loss-over-budget"
    assert "own answers: rouge_l 1.0000 ->" in worse.detail
    assert "proven above" in worse.detail
    silent = examiner.examine(candidate)
    assert silent.answers is None


def test_nan_is_told_and_nothing_is_written_with_it(source: Runner, labelled: Dataset, tokenizer: Path) -> None:
    class Broken:
        input_names = source.input_names

        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"logits": np.full_like(source.run(feeds)["logits"], np.nan)}

    examiner = AnswersExaminer(source, labelled, tokenizer, CONTRACT, context(), source_answers=lambda some: ["x"] * len(some))
    finding = examiner.examine(Broken(), answers=lambda examples: pytest.fail("asked for answers"))
    assert finding.reason == "not-finite"


def test_a_metric_of_another_task_is_refused_at_once(source: Runner, labelled: Dataset, tokenizer: Path) -> None:
    wrong = context()
    wrong.metric = "accuracy"
    with pytest.raises(SettingsError, match="use rouge_l"):
        AnswersExaminer(source, labelled, tokenizer, CONTRACT, wrong)


def write_sound(path: Path, seconds: float, seed: int) -> str:
    samples = np.random.default_rng(seed).normal(0, 3000, int(16_000 * seconds)).astype("<i2")
    with wave.open(str(path), "wb") as sound:
        sound.setframerate(16_000)
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.writeframes(samples.tobytes())
    return str(path)


@pytest.fixture(scope="module")
def whisper() -> PreTrainedModel:
    return loud(
        WhisperForConditionalGeneration(
            WhisperConfig(
                **SIZES,
                num_mel_bins=80,
                max_source_positions=50,
                max_target_positions=48,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        )
    )


def test_speech_is_judged_on_transcripts_and_sound_that_is_too_long_is_left_out(
    whisper: PreTrainedModel, tokenizer: Path, tmp_path: Path
) -> None:
    contract = replace(CONTRACT, task="automatic-speech-recognition", generation=LISTENING)
    source = torch_runner(whisper, "automatic-speech-recognition", "input_features")
    texts = sources(12)
    examples = [
        Example(write_sound(tmp_path / f"{number}.wav", 3 if number == 5 else 0.2 + number / 20, number), answers=(text,))
        for number, text in enumerate(texts)
    ]
    examiner = AnswersExaminer(source, Dataset("d", tuple(examples), True, ""), tokenizer, contract, context())
    same = examiner.examine(graph(whisper, tmp_path))
    assert same.reason is None
    assert same.verdict.examples == 11
    reader = AnswerReader(tokenizer, contract)
    assert reader.starts(source, examples[:1]) == [(START, SPEECH.no_timestamps_token_id)]
    assert reader.answer_ids("word3") == (8, END)
    assert reader.source_feeds(examples[:2])["input_features"].shape == (2, 80, 100)
    noisy = examiner.examine(graph(whisper, tmp_path, noise=0.3))
    assert noisy.reason == "loss-over-budget"
    with pytest.raises(DataError, match="at most 1 seconds"):
        AnswersExaminer(source, Dataset("d", (examples[5],), True, ""), tokenizer, contract, context())

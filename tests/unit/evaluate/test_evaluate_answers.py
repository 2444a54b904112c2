"""Metrics of written answers: against values known by hand and against the libraries, and the bound of a loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from hfaccel.errors import SettingsError
from hfaccel.evaluate.answers import normalize_transcript
from hfaccel.evaluate.gate import Loss, paired_loss
from hfaccel.evaluate.metrics import METRICS, MetricName, default_metric, resolve_metric

ANSWERS = ["the cat sat on the mat", "a dog is barking in the street", "", "Grüße aus Köln", "it rains cats and dogs today"]
EXPECTED = [
    "the cat is on the mat",
    "a dog barks in the street now",
    "hello there",
    "Viele Grüße aus Köln!",
    "it rains cats and dogs today",
]


def value(metric: MetricName, answers: list[str], *references: str | tuple[str, ...]) -> float:
    accepted = [(item,) if isinstance(item, str) else item for item in references]
    return METRICS[metric].compute(answers, accepted)


def words(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(f"w{number}" for number in generator.integers(0, 50, 12)) for _ in range(count)]


def spoilt(texts: list[str], every: int) -> list[str]:
    """One word of each ``every``-th text is another."""
    return [text.replace(text.split()[3], "wrong", 1) if index % every == 0 else text for index, text in enumerate(texts)]


def loss(metric: MetricName, source: list[str], candidate: list[str], references: list[str], **more: Any) -> Loss:
    options: dict[str, Any] = {"confidence": 0.95, "resamples": 2000, "seed": 0, **more}
    return paired_loss(METRICS[metric], source, candidate, [(text,) for text in references], **options)


@pytest.mark.parametrize(
    ("written", "expected", "rate"),
    [
        ("the cat sat", "the cat sat", 0.0),
        ("The cat, sat!", "the cat sat", 0.0),
        ("the cat", "the cat sat", 1 / 3),
        ("the big cat sat", "the cat sat", 1 / 3),
        ("the dog sat", "the cat sat", 1 / 3),
        ("a b c d", "x", 4.0),
        ("", "the cat", 1.0),
        ("cold-hearted", "cold hearted", 0.0),
        ("I don\u2019t", "i don't", 0.0),
        ("Mr. Dashwood", "mister dashwood", 1 / 2),
    ],
)
def test_word_error_rates_by_hand(written: str, expected: str, rate: float) -> None:
    assert value("wer", [written], expected) == pytest.approx(rate)


def test_word_errors_of_all_texts_are_divided_by_the_words_of_all() -> None:
    assert value("wer", ["a", "b c d e f g h x"], "x", "b c d e f g h i") == pytest.approx(2 / 9)
    assert value("wer", ["noise", "a b c"], "...", "a b c") == pytest.approx(1 / 3)
    assert value("wer", ["two"], ("one", "two")) == 0


def test_transcripts_are_normalized_in_any_script() -> None:
    assert normalize_transcript("\u201cÉTÉ!\u201d  ﬁn \u2014 5 €") == "été fin 5"
    assert normalize_transcript("これは、テストです。") == "これは テストです"


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    for answers, expected in ((ANSWERS, EXPECTED), (words(30, 0), words(30, 1)), (["a b"], ["a b c"]), (["x y z v"], ["a b"])):
        assert value("bleu", answers, *expected) == pytest.approx(sacrebleu.corpus_bleu(answers, [expected]).score / 100)
        assert value("chrf", answers, *expected) == pytest.approx(sacrebleu.corpus_chrf(answers, [expected]).score / 100)
    two = [("the cat is on the mat", "the cat sat there"), ("in the street a dog is barking", "a dog barks")]
    columns = [[pair[0] for pair in two], [pair[1] for pair in two]]
    assert value("bleu", ANSWERS[:2], *two) == pytest.approx(sacrebleu.corpus_bleu(ANSWERS[:2], columns).score / 100)
    assert value("chrf", ANSWERS[:2], *two) == pytest.approx(sacrebleu.corpus_chrf(ANSWERS[:2], columns).score / 100)


def test_drawing_examples_is_scoring_the_drawn_texts() -> None:
    index = np.array([0, 0, 1, 3, 3, 3, 4])
    drawn, expected = [ANSWERS[number] for number in index], [EXPECTED[number] for number in index]
    for metric in ("wer", "bleu", "chrf", "rouge_l", "exact_match"):
        accepted = [(text,) for text in EXPECTED]
        by_weight = METRICS[metric].compute(ANSWERS, accepted, index)  # type: ignore[index]
        assert by_weight == pytest.approx(value(metric, drawn, *expected)), metric  # type: ignore[arg-type]


def test_rouge_is_that_of_the_library_in_english_and_reads_other_scripts() -> None:
    scorer = RougeScorer(["rougeL"])
    english = [scorer.score(right, answer)["rougeL"].fmeasure for answer, right in zip(ANSWERS[:2], EXPECTED[:2], strict=True)]
    assert value("rouge_l", ANSWERS[:2], *EXPECTED[:2]) == pytest.approx(np.mean(english))
    assert value("rouge_l", ["мама мыла раму"], "мама мыла окно") == pytest.approx(2 / 3)
    assert value("exact_match", ["The Cat.", "dog"], "cat", ("wolf", "fox")) == 0.5


def test_each_task_takes_its_metrics() -> None:
    assert default_metric("automatic-speech-recognition", None) == "wer"
    assert default_metric("text2text-generation", None) == "rouge_l"
    for name in ("bleu", "chrf", "rouge_l", "wer", "exact_match"):
        assert resolve_metric(name, "text2text-generation", None).name == name  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="use wer"):
        resolve_metric("bleu", "automatic-speech-recognition", None)


@pytest.mark.parametrize("metric", ["wer", "bleu", "chrf", "rouge_l", "exact_match"])
def test_the_same_answers_lose_nothing(metric: MetricName) -> None:
    references = words(60, 0)
    answers = spoilt(references, 5)
    found = loss(metric, answers, list(answers), references)
    assert (found.loss, found.lower_bound, found.upper_bound) == (0, 0, 0)
    # From models that are known to differ, it only shows that no difference was seen.
    seen = loss(metric, answers, list(answers), references, same_outputs=False)
    assert seen.loss == 0
    assert 0.03 < seen.upper_bound < 0.10


@pytest.mark.parametrize("metric", ["wer", "bleu", "chrf", "rouge_l"])
def test_worse_answers_are_proven_to_be_worse_and_better_ones_better(metric: MetricName) -> None:
    references = words(200, 0)
    good, bad = spoilt(references, 20), spoilt(references, 2)
    worse, better = loss(metric, good, bad, references), loss(metric, bad, good, references)
    assert 0.01 < worse.lower_bound < worse.loss < worse.upper_bound
    assert better.lower_bound < better.loss < better.upper_bound < -0.01


def test_the_loss_of_an_error_rate_is_what_it_grows_by() -> None:
    references = words(100, 0)
    found = loss("wer", references, spoilt(references, 4), references)
    assert (found.source, found.candidate) == (0, pytest.approx(25 / 1200))
    assert found.loss == pytest.approx(25 / 1200)
    assert found.upper_bound < 0.04


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Corpora of 60 texts out of a world in which the candidate errs on one word more in 40: 95 % of the bounds lie above it."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        errors = generator.binomial(12, 1 / 40, 60)
        references = [" ".join(f"w{word}" for word in range(12))] * 60
        candidate = [" ".join([*(["wrong"] * count), *(f"w{word}" for word in range(count, 12))]) for count in errors]
        found = loss("wer", references, candidate, references, resamples=400)
        held += found.upper_bound >= 1 / 40
    assert held >= 182

"""Answers must be those of the transformers pipelines: same shapes, same labels, same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import pipeline

from hfaccel.errors import DataError, SettingsError, UsageError

TEXTS = [
    "Microsoft opened an office in New York.",
    "rains",
    "Anna moved there from Paris last summer, and loved it anyway!",
    "The dog jumps; quickly zebra.",
]


def same(ours: Any, theirs: Any) -> None:
    """Equal structure; floats to 1e-4 relative (batching reorders float sums)."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs) or set(ours) == set(theirs)
        for name in theirs:
            same(ours[name], theirs[name])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    elif isinstance(theirs, (float, np.floating)):
        assert isinstance(ours, float)
        assert ours == pytest.approx(float(theirs), rel=1e-4, abs=1e-5)
    else:
        assert ours == theirs


def reference(tiny: Any, task: str) -> Any:
    return pipeline(task, model=tiny.source, tokenizer=tiny.tokenizer)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        (None, ("bad", "fine", "good")),
        ("single_label_classification", ("bad", "good")),
        ("multi_label_classification", ("funny", "long", "loud")),
        ("regression", ("stars",)),
        ("single_label_classification", ("only",)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"top_k": None}, {"top_k": 1}, {"top_k": 2}])
def test_text_classification(make_tiny: Any, problem_type: Any, labels: Any, options: dict[str, Any]) -> None:
    tiny = make_tiny("text-classification", problem_type=problem_type, labels=labels)
    theirs = reference(tiny, "text-classification")
    pair = {"text": TEXTS[0], "text_pair": TEXTS[1]}
    for given in (TEXTS, TEXTS[0], TEXTS[:1], pair, [pair]):
        same(tiny.model(given, **options), theirs(given, **options))
    same(tiny.model((TEXTS[0], TEXTS[1]), **options), theirs(pair, **options))


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification(make_tiny: Any, strategy: str) -> None:
    tiny = make_tiny("token-classification")
    theirs = reference(tiny, "token-classification")
    same(tiny.model(TEXTS, aggregation_strategy=strategy), theirs(TEXTS, aggregation_strategy=strategy))
    same(tiny.model(TEXTS[0], aggregation_strategy=strategy), theirs(TEXTS[0], aggregation_strategy=strategy))
    everything = tiny.model(TEXTS, aggregation_strategy=strategy, ignore_labels=())
    same(everything, theirs(TEXTS, aggregation_strategy=strategy, ignore_labels=[]))
    # The unknown letters of "zebra" are shown as they are written.
    assert any(entity["word"] for entity in everything[3])


@pytest.mark.parametrize(
    "text", ["Anna moved to [MASK].", "[MASK] jumps over the [MASK] dog", "the [MASK]"], ids=["one", "two", "end"]
)
def test_fill_mask(make_tiny: Any, text: str) -> None:
    tiny = make_tiny("fill-mask")
    theirs = reference(tiny, "fill-mask")
    same(tiny.model(text), theirs(text))
    same(tiny.model([text], top_k=2), theirs([text], top_k=2))
    same(tiny.model([text, "a [MASK]"], top_k=3), theirs([text, "a [MASK]"], top_k=3))


def test_fill_mask_without_mask_says_how_to_write_one(make_tiny: Any) -> None:
    with pytest.raises(DataError) as caught:
        make_tiny("fill-mask").model("no blank here")
    assert str(caught.value) == (
        "text 'no blank here': the text has no mask token ([MASK]) "
        "(write [MASK] where a word is to be filled in, within 64 tokens)"
    )


def test_feature_extraction(make_tiny: Any) -> None:
    tiny = make_tiny("feature-extraction")
    theirs = reference(tiny, "feature-extraction")
    for given in (TEXTS, TEXTS[0]):
        same(tiny.model(given), theirs(given))


def test_sentence_similarity_pools_each_text_alone(make_tiny: Any) -> None:
    tiny = make_tiny("sentence-similarity")
    theirs = reference(tiny, "feature-extraction")
    expected = np.array([np.mean(theirs(text)[0], axis=0) for text in TEXTS])
    vectors = tiny.model.embed(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(tiny.model(TEXTS), vectors)
    assert tiny.model(TEXTS[0]).shape == (32,)
    assert tiny.model.embed([]).shape == (0, 32)


def test_text_ranking_sorts_by_sigmoid_of_the_logit(make_tiny: Any) -> None:
    tiny = make_tiny("text-ranking")
    ranked = tiny.model.rank("Who opened the office?", TEXTS)
    inputs = tiny.tokenizer(["Who opened the office?"] * 4, TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        scores = torch.sigmoid(tiny.source(**inputs).logits[:, 0]).tolist()
    assert [item["index"] for item in ranked] == sorted(range(4), key=lambda index: -scores[index])
    assert [item["score"] for item in ranked] == pytest.approx(sorted(scores, reverse=True), rel=1e-4)
    assert tiny.model(("Who opened the office?", TEXTS[2]))["score"] == pytest.approx(scores[2], rel=1e-4)


def test_ranking_by_the_raw_logit(make_tiny: Any) -> None:
    tiny = make_tiny("text-ranking")
    squashed = tiny.model((TEXTS[0], TEXTS[1]))["score"]
    tiny.model.contract = replace(tiny.model.contract, activation="identity")
    raw = tiny.model((TEXTS[0], TEXTS[1]))["score"]
    assert 1 / (1 + np.exp(-raw)) == pytest.approx(squashed, rel=1e-4)
    assert isinstance(raw, float)


def test_one_label_through_a_sigmoid_or_raw(make_tiny: Any) -> None:
    tiny = make_tiny("text-classification", problem_type="regression", labels=("stars",))
    raw = tiny.model(TEXTS[0])[0]["score"]
    tiny.model.contract = replace(tiny.model.contract, activation="sigmoid")
    assert tiny.model(TEXTS[0])[0]["score"] == pytest.approx(1 / (1 + np.exp(-raw)), rel=1e-4)


def test_ranking_with_several_labels_is_refused(make_tiny: Any) -> None:
    with pytest.raises(SettingsError, match="ranking needs one value for a pair, this model gives 2"):
        make_tiny("text-ranking", labels=("a", "b")).model.rank("q", ["d"])


CONTEXT = " ".join(
    [
        "Microsoft opened an office in New York last summer, and Anna moved there from Paris.",
        "The quick brown fox jumps over the lazy dog while it rains.",
        "A film that is too long, too loud and not worth the money; I loved it anyway!",
    ]
    * 2
)


def brute_force_answer(tiny: Any, question: str, context: str, max_answer_len: int) -> dict[str, Any]:
    """Every span of every window by two loops; transformers' own tokenizer makes the windows."""
    windows = tiny.tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=64,
        stride=32,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    best = {"score": -1.0, "start": 0, "end": 0}
    for number in range(len(windows["input_ids"])):
        names = ("input_ids", "attention_mask", "token_type_ids")
        with torch.no_grad():
            logits = tiny.source(**{name: torch.tensor([windows[name][number]]) for name in names})
        sequences = windows.sequence_ids(number)
        allowed = torch.tensor([index == 0 or sequence == 1 for index, sequence in enumerate(sequences)])
        start = logits.start_logits[0].masked_fill(~allowed, -1e9).softmax(0)
        end = logits.end_logits[0].masked_fill(~allowed, -1e9).softmax(0)
        encoding = windows.encodings[number]
        for first in range(len(sequences)):
            for last in range(first, min(first + max_answer_len, len(sequences))):
                score = float(start[first] * end[last])
                if sequences[first] == sequences[last] == 1 and score > best["score"]:
                    left = encoding.word_to_chars(encoding.token_to_word(first), 1)[0]
                    right = encoding.word_to_chars(encoding.token_to_word(last), 1)[1]
                    best = {"score": score, "start": left, "end": right}
    return {**best, "answer": context[best["start"] : best["end"]]}


@pytest.mark.parametrize("max_answer_len", [1, 4, 15])
@pytest.mark.parametrize("context", [CONTEXT, "Anna moved from Paris."], ids=["windows", "short"])
def test_question_answering(make_tiny: Any, context: str, max_answer_len: int) -> None:
    tiny = make_tiny("question-answering")
    question = "Where does Anna live?"
    answer = tiny.model({"question": question, "context": context}, max_answer_len=max_answer_len)
    same(answer, brute_force_answer(tiny, question, context, max_answer_len))
    assert tiny.model((question, context), max_answer_len=max_answer_len) == answer
    short = "It rains."
    both = tiny.model([(question, context), (question, short)], max_answer_len=max_answer_len)
    same(both, [answer, brute_force_answer(tiny, question, short, max_answer_len)])


def test_question_answering_options(make_tiny: Any) -> None:
    tiny = make_tiny("question-answering")
    answers = tiny.model(("What jumps?", CONTEXT), top_k=4)
    assert len(answers) == 4
    assert [answer["score"] for answer in answers] == sorted((a["score"] for a in answers), reverse=True)
    assert len({(answer["start"], answer["end"]) for answer in answers}) == 4
    answers = tiny.model(("What jumps?", CONTEXT), top_k=100_000, handle_impossible_answer=True)
    assert sum(answer["answer"] == "" for answer in answers) == 1
    assert tiny.model(("What jumps?", ""))["answer"] == ""


def test_question_answering_left_padding_reads_the_context_first(make_tiny: Any) -> None:
    tiny = make_tiny("question-answering", padding_side="left")
    windows = tiny.model.tokenizer.encode_windows("What jumps?", CONTEXT, 16)
    answer = tiny.model(("What jumps?", CONTEXT))
    assert windows[0].sequence_ids[1] == 0
    assert windows[0].offsets[1] == (0, len("Microsoft")) or windows[0].offsets[1][0] == 0
    assert answer["answer"] == CONTEXT[answer["start"] : answer["end"]] != ""


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_neighbours_in_a_batch_change_nothing(make_tiny: Any, padding_side: str) -> None:
    # BERT adds absolute positions from the left, so only the cutting can be checked for left padding.
    tiny = make_tiny("token-classification", padding_side=padding_side)
    encoded = tiny.model.tokenizer.encode(TEXTS)
    together = tiny.model.outputs(encoded)
    assert [raw["logits"].shape for raw in together] == [(item.ids.size, 5) for item in encoded]
    if padding_side == "right":
        for raw, item in zip(together, encoded, strict=True):
            np.testing.assert_allclose(raw["logits"], tiny.model.outputs([item])[0]["logits"], rtol=1e-4, atol=1e-5)


def test_left_padding_is_cut_from_the_left(make_tiny: Any) -> None:
    class Echo:
        input_names = ("input_ids",)

        def run(self, feeds: Any) -> dict[str, np.ndarray]:
            return {"logits": feeds["input_ids"].astype(np.float32)}

    tiny = make_tiny("token-classification", padding_side="left")
    tiny.model.runner = Echo()
    encoded = [tiny.model.tokenizer.encode([text])[0] for text in ("rains rains dog dog dog dog dog dog dog dog it", "rains")]
    encoded += tiny.model.tokenizer.encode(["dog dog rains dog dog dog dog dog dog dog it it"])
    for raw, item in zip(tiny.model.outputs(encoded), encoded, strict=True):
        assert raw["logits"].tolist() == item.ids.tolist()


def test_long_texts_are_truncated(make_tiny: Any) -> None:
    tiny = make_tiny("text-classification")
    tiny.model("dog " * 500)
    assert tiny.runner.batch_shapes == [(1, 64)]


def test_an_option_of_another_task_is_refused(make_tiny: Any) -> None:
    with pytest.raises(UsageError) as caught:
        make_tiny("text-classification").model("a", aggregation_strategy="simple")
    assert str(caught.value) == (
        "aggregation_strategy: the option 'aggregation_strategy' has no meaning for text-classification "
        "(it belongs to token-classification)"
    )


def test_vectors_and_ranks_of_other_tasks_are_refused(make_tiny: Any) -> None:
    model = make_tiny("text-classification").model
    with pytest.raises(UsageError, match="compiled for text-classification and gives no sentence vectors"):
        model.embed(["a"])
    with pytest.raises(UsageError, match="compiled for text-classification and ranks no documents"):
        model.rank("a", ["b"])


@pytest.mark.parametrize("wrong", [3, {"txt": "a"}, ("a", "b", "c")])
def test_inputs_that_are_no_text_are_refused(make_tiny: Any, wrong: Any) -> None:
    with pytest.raises(DataError, match="input 0: an input must be a text or a pair of texts, not"):
        make_tiny("text-classification").model([wrong])


def test_a_text_without_question_is_refused(make_tiny: Any) -> None:
    with pytest.raises(DataError, match="question-answering reads a question and a context"):
        make_tiny("question-answering").model("just a text")


def test_no_inputs_give_no_answers(make_tiny: Any) -> None:
    assert make_tiny("text-classification").model([]) == []
    assert make_tiny("question-answering").model([]) == []

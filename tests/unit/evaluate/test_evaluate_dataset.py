from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hfaccel.artifact.contract import Task
from hfaccel.errors import DataError
from hfaccel.evaluate.columns import RowParser
from hfaccel.evaluate.dataset import Dataset, Example, load_dataset
from hfaccel.evaluate.predictions import references_of
from hfaccel.evaluate.sample import calibration_texts, multilingual_sample

LABELS = ("negative", "positive")


def load(path: Path, task: str = "text-classification", **more: object) -> Dataset:
    values: dict[str, object] = {"labels": LABELS, "max_examples": 1000, "seed": 0, **more}
    return load_dataset(str(path), task=task, **values)  # type: ignore[arg-type]


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    rows = [{"sentence": "Bad, very bad", "label": "negative"}, {"sentence": "Good", "label": 1}]
    (tmp_path / "a.csv").write_text('sentence,label\n"Bad, very bad",negative\nGood,1\n', encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text("sentence\tlabel\nBad, very bad\tNegative\nGood\tLABEL_1\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    table = pyarrow.table({"sentence": ["Bad, very bad", "Good"], "label": [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for suffix in ("csv", "tsv", "jsonl", "json", "parquet"):
        data = load(tmp_path / f"a.{suffix}")
        assert data.examples == (Example("Bad, very bad", 0), Example("Good", 1)), suffix
        assert data.labelled
    (tmp_path / "a.txt").write_text("One\n\nTwo\n")
    plain = load(tmp_path / "a.txt")
    assert (plain.texts(), plain.labelled) == (("One", "Two"), False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.csv", None, "FILE: no such file (check the path)"),
        ("a.csv", b"", "FILE: the file is empty (give a file with at least one example)"),
        ("a.csv", b"text,label\n", "FILE: the file holds no examples (give a file with at least one example)"),
        ("a.csv", b"text,label\nx\xff,1\n", "FILE:2: the file is not UTF-8: byte 0xff (save it with UTF-8 encoding)"),
        (
            "a.csv", b"text,label\na,1\nb,c,1\n",
            "FILE:3: the row has 3 fields, the header has 2 (put fields that hold the separator or line breaks in double quotes)",
        ),
        (
            "a.csv", b"text,label\na,positve\n",
            "FILE:2: unknown label 'positve'; the data has: positve; the model knows: negative, positive (did you mean 'positive'?)",
        ),
        ("a.csv", b"text,lable\na,1\n",
         "FILE: no column 'label', but 'lable' looks like it (rename the column, or map it with label=lable)"),
        ("a.csv", b"text,label\na,\n", "FILE:2: column 'label' holds no label (label every row, or leave the column out)"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', 'FILE:2: expected an object, found list (write {"text": ..., "label": ...})'),
        ("a.xml", b"<a/>",
         "FILE: the ending '.xml' is not a known data format (use .csv, .tsv, .jsonl, .json, .parquet, .txt)"),
    ],
)  # fmt: skip
def test_data_errors_say_what_where_and_what_next(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value) == message.replace("FILE", str(path))


def test_wrong_columns_name_those_found_and_the_closest(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("txt,label\na,1\n")
    with pytest.raises(DataError) as caught:
        load(tmp_path / "a.csv")
    assert "no text column for text-classification; found: txt, label; expected one of: text, sentence" in str(caught.value)
    assert "did you mean 'txt' for 'text'?" in str(caught.value)
    assert load(tmp_path / "a.csv", columns={"text": "txt"}).examples == (Example("a", 1),)


def test_pairs_multi_label_tags_entities_and_answers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def only(row: dict[str, object], task: str, labels: tuple[str, ...] = ()) -> Example:
        path.write_text(json.dumps(row))
        return load(path, task, labels=labels).examples[0]

    assert only({"premise": "a", "hypothesis": "b", "label": 1}, "text-classification", ("x", "y")) == Example(("a", "b"), 1)
    assert only({"text": "a", "labels": [1, 0, 1]}, "text-classification", ("x", "y", "z")).label == (0, 2)
    assert only({"text": "a", "labels": ["z"]}, "text-classification", ("x", "y", "z")).label == (2,)
    assert only({"sentence1": "a", "sentence2": "b", "score": "2.5"}, "sentence-similarity").label == 2.5
    assert only({"query": "a", "document": "b", "score": 1}, "text-ranking").text == ("a", "b")
    tagged = only({"tokens": ["Ann", "ran"], "ner_tags": [1, 0]}, "token-classification", ("O", "B-PER"))
    assert (tagged.text, tagged.label, tagged.word_spans) == ("Ann ran", ("B-PER", "O"), ((0, 3), (4, 7)))
    row = {"text": "Ann Lee ran.", "entities": [{"start": 0, "end": 7, "label": "PER"}]}
    assert only(row, "token-classification", ("O", "B-PER", "I-PER")).label == ("B-PER", "I-PER", "O", "O")
    asked = only(
        {"question": "who?", "context": "Ann ran", "answers": {"text": ["Ann"], "answer_start": [0]}}, "question-answering"
    )
    assert (asked.model_input, asked.answers) == (("who?", "Ann ran"), ("Ann",))


def test_calibration_is_held_out_only_of_large_data_without_shared_texts() -> None:
    large = Dataset("d", tuple(Example(f"t{i}", i % 2) for i in range(400)), labelled=True, sha256="")
    texts, rest = large.split_calibration(128)
    assert (len(texts), len(rest.examples)) == (100, 300)
    assert not set(texts) & set(rest.texts())
    assert large.split_calibration(128) == (texts, rest)
    small = Dataset("d", large.examples[:399], labelled=True, sha256="")
    assert small.split_calibration(10)[1] is small
    pairs = Dataset("d", tuple(Example(("same", f"t{i}"), 1.0) for i in range(500)), True, "", separate_pairs=True)
    texts, rest = pairs.split_calibration(64)
    assert (len(texts), rest) == (64, pairs)


def test_large_data_is_sampled_by_seed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(50)))
    first, second, other = (load(tmp_path / "a.txt", max_examples=10, seed=seed) for seed in (0, 0, 1))
    assert len(first.examples) == 10
    assert first == second != other


def test_sample_is_unlabelled_and_large_enough_to_show_99_percent_agreement() -> None:
    sample = multilingual_sample()
    assert sample.multilingual_sample
    assert not sample.labelled
    assert len(sample.texts()) == len(sample.examples) >= 299


@pytest.mark.parametrize("task", ["question-answering", "text-ranking"])
def test_models_that_read_two_texts_are_compared_and_calibrated_on_pairs(task: Task) -> None:
    sample = multilingual_sample(task)
    assert all(isinstance(example.model_input, tuple) for example in sample.examples)
    assert len({example.model_input for example in sample.examples}) == len(sample.examples) >= 299
    assert all(len(pair) == 2 and pair[0] != pair[1] for pair in calibration_texts(task))


@pytest.mark.parametrize("task", [None, "text-generation"])
def test_nothing_that_is_calibrated_on_is_compared_on(task: Task | None) -> None:
    texts = calibration_texts()
    assert len(set(texts)) == len(texts) >= 64
    assert "\n" in "".join(map(str, texts))
    compared = [str(text) for text in multilingual_sample(task).texts()]
    assert not any(text in other or other in str(text) for text in texts for other in compared if len(other) > 20)


def test_language_models_are_compared_on_passages_of_which_most_are_english() -> None:
    sample = multilingual_sample("text-generation")
    lengths = [len(str(example.text)) for example in sample.examples]
    assert len(lengths) >= 50
    assert sorted(lengths)[len(lengths) // 2] > 250
    assert sum(example.slice == "en" for example in sample.examples) > len(lengths) / 2
    assert any("\n" in str(example.text) for example in sample.examples)


def test_labels_without_names_take_ids_and_refuse_names_of_unknown_order(tmp_path: Path) -> None:
    generic = ("LABEL_0", "LABEL_1")
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,1\nb,LABEL_0\n")
    assert [example.label for example in load(path, labels=generic).examples] == [1, 0]
    path.write_text("text,label\na,neg\nb,pos\n")
    with pytest.raises(DataError) as caught:
        load(path, labels=generic)
    assert str(caught.value) == (
        f"{path}:2: unknown label 'neg'; the data has: neg, pos; the model knows: LABEL_0, LABEL_1 "
        "(the model's labels have no names: write ids (0, 1, ...) in the order that it was trained with)"
    )


def test_classes_of_a_data_set_fit_labels_without_names_by_their_order() -> None:
    def parser(labels: tuple[str, ...]) -> RowParser:
        return RowParser("text-classification", {"text": "text", "label": "label"}, labels, ("neg", "pos"), ("neg", "pos"))

    row = {"text": "a", "label": "pos"}
    assert parser(("LABEL_0", "LABEL_1")).example(row, "here").label == 1
    for labels in (("LABEL_0", "LABEL_1", "LABEL_2"), ("NEGATIVE", "POSITIVE")):
        with pytest.raises(DataError, match=f"the data has: neg, pos; the model knows: {labels[0]}, {labels[1]}"):
            parser(labels).example(row, "here")
    assert parser(("NEGATIVE", "POSITIVE")).example({"text": "a", "label": "positive"}, "here").label == 1


def test_a_language_column_or_a_named_one_slices_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label,lang,source\na,1,de,web\nb,0,,web\n")
    data = load(path)
    assert (data.slice_column, [example.slice for example in data.examples]) == ("lang", ["de", None])
    data = load(path, columns={"slice": "source"})
    assert (data.slice_column, [example.slice for example in data.examples]) == ("source", ["web", "web"])
    assert {example.slice for example in multilingual_sample().examples} >= {"en", "de", "th"}


def test_one_yes_or_no_label(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,1\nb,0\n", encoding="utf-8")
    data = load_dataset(str(path), task="text-classification", labels=("toxic",), max_examples=9, seed=0)
    references = references_of("text-classification", "multi_label_classification", ("toxic",), data)
    assert references.tolist() == [[True], [False]]


def test_sources_and_reference_answers_are_found_by_the_usual_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def only(row: dict[str, object], **more: object) -> Example:
        path.write_text(json.dumps(row))
        return load(path, "text2text-generation", labels=(), **more).examples[0]

    for source, target in (("source", "target"), ("document", "summary"), ("article", "highlights"), ("text", "translation")):
        assert only({source: "long", target: "short"}) == Example("long", answers=("short",))
    assert only({"input": "q", "answer": ["one", "two"]}).answers == ("one", "two")
    assert only({"en": "cat", "fr": "chat"}, columns={"source": "en", "target": "fr"}) == Example("cat", answers=("chat",))
    assert only({"text": "cat", "en": "x"}, columns={"text": "text", "reference": "en"}).answers == ("x",)
    assert only({"source": "cat"}) == Example("cat")
    path.write_text('{"source": "cat", "target": "chat"}\n{"source": "dog", "target": " "}')
    with pytest.raises(DataError, match=r"a\.jsonl:2: column 'target' holds no reference answer"):
        load(path, "text2text-generation")
    data = load(write(tmp_path / "b.txt", "One.\nTwo.\n"), "text2text-generation")
    assert (data.labelled, data.texts()) == (False, ("One.", "Two."))
    assert all(isinstance(example.text, str) for example in multilingual_sample().examples)


def test_sounds_are_found_beside_the_data_file_and_count_as_its_content(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("a", "b"):
        (tmp_path / "clips" / f"{name}.wav").write_bytes(b"RIFF" + name.encode())
    table = write(tmp_path / "speech.csv", 'audio,text\nclips/a.wav,"Hello, you."\nclips/b.wav,Good bye\n')
    data = load(table, "automatic-speech-recognition", labels=())
    assert [example.text for example in data.examples] == [str(tmp_path / "clips" / f"{name}.wav") for name in ("a", "b")]
    assert references_of("automatic-speech-recognition", None, (), data) == [("Hello, you.",), ("Good bye",)]
    assert data.labelled
    (tmp_path / "clips" / "a.wav").write_bytes(b"RIFFother")
    assert load(table, "automatic-speech-recognition", labels=()).sha256 != data.sha256
    absolute = write(tmp_path / "b.jsonl", json.dumps({"clip": str(tmp_path / "clips/b.wav"), "said": "x"}))
    mapped = load(absolute, "automatic-speech-recognition", columns={"audio": "clip", "transcript": "said"})
    assert mapped.examples == (Example(str(tmp_path / "clips/b.wav"), answers=("x",)),)
    unlabelled = load(write(tmp_path / "c.csv", "path\nclips/a.wav\n"), "automatic-speech-recognition")
    assert not unlabelled.labelled


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("audio,text\nclips/a.wav,x\nclips/gone.wav,y\n",
         "FILE:3: the sound file 'clips/gone.wav' is missing; paths are relative to FOLDER (correct or remove the row)"),
        ("audio,text\n/no/such.wav,x\n", "FILE:2: the sound file '/no/such.wav' is missing (correct or remove the row)"),
        ("audio,text\nclips,x\n",
         "FILE:2: the sound file 'clips' is a folder; paths are relative to FOLDER (correct or remove the row)"),
        ("audio,text\nclips/empty.wav,x\n", "FILE:2: the sound file 'clips/empty.wav' is empty (replace it, or remove the row)"),
        ("audio,text\n,x\n", "FILE:2: column 'audio' names no sound file (fill the row with a path, or remove it)"),
        ("audio,text\nclips/a.wav,\n",
         "FILE:2: column 'text' holds no reference answer (fill or remove the row, or leave the column out)"),
        ("sounds,text\nclips/a.wav,x\n",
         "FILE: no audio column for automatic-speech-recognition; found: sounds, text; expected one of: audio, file, path, sound "
         "(did you mean 'sounds' for 'sound'? Rename it, or map the column)"),
        ("audio,txt\nclips/a.wav,x\n",
         "FILE: no column 'text', but 'txt' looks like it (rename the column, or map it with answers=txt)"),
    ],
)  # fmt: skip
def test_broken_speech_data_says_what_where_and_what_next(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.wav").write_bytes(b"RIFF")
    (tmp_path / "clips" / "empty.wav").write_bytes(b"")
    path = write(tmp_path / "speech.csv", content)
    with pytest.raises(DataError) as caught:
        load(path, "automatic-speech-recognition")
    assert str(caught.value) == message.replace("FILE", str(path)).replace("FOLDER", str(tmp_path))


def test_folders_of_sound_and_lone_sound_files_need_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"write a CSV beside the sound files, with the columns audio"):
        load(tmp_path, "automatic-speech-recognition")
    with pytest.raises(DataError, match=r"a sound file, not a data file"):
        load(tmp_path / "a.wav", "automatic-speech-recognition")


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_repeated_texts_are_calibrated_on_or_judged_on_but_not_both(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"text {number % 20}\n" for number in range(30)), encoding="utf-8")
    data = load_dataset(str(path), task="text-generation", columns={}, labels=(), max_examples=100, seed=0)
    calibration, rest = data.without_repeats().split_calibration(5, hold_out_from=16)
    assert len(calibration) == 5
    assert len(rest.examples) == 15
    assert not {str(text) for text in calibration} & {str(text) for text in rest.texts()}


@pytest.mark.parametrize(("prompt", "answer"), [("prompt", "answer"), ("question", "answers"), ("instruction", "output")])
def test_prompts_with_expected_answers(tmp_path: Path, prompt: str, answer: str) -> None:
    path = write(
        tmp_path / "a.jsonl",
        f'{{"{prompt}": "Who?", "{answer}": ["Anna", "Anna Lee"]}}\n{{"{prompt}": "Why?", "{answer}": "So."}}\n',
    )
    data = load(path, "text-generation", labels=())
    assert data.labelled
    assert [(item.text, item.answers) for item in data.examples] == [("Who?", ("Anna", "Anna Lee")), ("Why?", ("So.",))]
    mapped = load(
        write(tmp_path / "b.csv", "q,a\nWho?,Anna\n"), "text-generation", labels=(), columns={"prompt": "q", "answer": "a"}
    )
    assert mapped.examples[0].answers == ("Anna",)


def test_running_text_has_no_answers(tmp_path: Path) -> None:
    assert not load(write(tmp_path / "a.txt", "One text.\nAnother.\n"), "text-generation", labels=()).labelled
    with pytest.raises(DataError, match="no reference answer"):
        load(write(tmp_path / "b.csv", "prompt,answer\nWho?,\n"), "text-generation", labels=())

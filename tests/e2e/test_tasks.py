"""Every task of an encoder, from a checkpoint with labelled data to the answers of the compiled folder: those of transformers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hfaccel

TEXTS = [
    "Microsoft opened an office in New York.",
    "rains",
    "Anna moved there from Paris last summer, and loved it anyway! The quick brown fox jumps over the lazy dog while it rains.",
    "The dog jumps; quickly zebra.",
]
QUESTIONS = ["Who opened the office?", "Where does Anna live?", "What jumps over the dog?"]
PAIRS = [(QUESTIONS[index % 3], text) for index, text in enumerate(TEXTS)]
CORPUS = [*TEXTS, *QUESTIONS, "A film that is too long, too loud and not worth the money; I loved it anyway!"]
MAX_LENGTH = 48
# What these tests do not look at is made short: the candidates have tests of their own.
FAST = ("quantize.enabled=false", "parity.shapes=[3x9]", "accuracy.resamples=200")
NAMES = {"PAD": "[PAD]", "UNK": "[UNK]", "CLS": "[CLS]", "SEP": "[SEP]", "MASK": "[MASK]"}
SENTENCE_MODES = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class Case:
    """A checkpoint to make, the data it is judged with, and what the gate must say about that data."""

    class_name: str
    task: str
    data: str
    rows: list[dict[str, Any]]
    metric: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    extra_files: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """The checkpoint, the compiled model and its manifest."""

    source: Path
    model: Any
    manifest: dict[str, Any]


def names(*labels: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}


def texts_with(values: list[Any], name: str = "label") -> list[dict[str, Any]]:
    return [{"text": text, name: value} for text, value in zip(CORPUS, values, strict=True)]


def scored_pairs(first: str, second: str, name: str) -> list[dict[str, Any]]:
    return [{first: QUESTIONS[index % 3], second: text, name: round(0.1 + index / 10, 1)} for index, text in enumerate(CORPUS)]


def sentence_case(mode: str) -> Case:
    kinds = ("Transformer", "Pooling", "Normalize") if mode in ("mean", "last") else ("Transformer", "Pooling")
    files = {
        "modules.json": [
            {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
            for n, kind in enumerate(kinds)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": 32, SENTENCE_MODES[mode]: True},
        "sentence_bert_config.json": {"max_seq_length": 32, "do_lower_case": False},
    }
    rows = scored_pairs("sentence1", "sentence2", "score")
    layers = {"num_hidden_layers": 2} if mode == "mean" else {}
    return Case("BertModel", "sentence-similarity", "pairs.csv", rows, "spearman", layers, files)


SQUAD = [
    {"question": QUESTIONS[1], "context": TEXTS[2], "answers": {"text": ["Paris"], "answer_start": [22]}},
    {"question": QUESTIONS[0], "context": TEXTS[0], "answers": {"text": ["Microsoft"], "answer_start": [0]}},
    {"question": QUESTIONS[2], "context": " ".join(TEXTS * 2), "answers": {"text": ["fox", "brown fox"], "answer_start": [1, 2]}},
    {"question": QUESTIONS[2], "context": TEXTS[1], "answers": {"text": [], "answer_start": []}},
]
TAGGED = [{"tokens": text.split(), "ner_tags": ["B-PER"] + ["O"] * (len(text.split()) - 1)} for text in TEXTS]
CLASSIFIER, CLASSIFICATION = "BertForSequenceClassification", "text-classification"
CASES: dict[str, Case] = {
    "single-label": Case(
        CLASSIFIER,
        CLASSIFICATION,
        "a.csv",
        texts_with(["bad", "fine", "good", "bad"] * 2),
        "accuracy",
        {"num_hidden_layers": 2, **names("bad", "fine", "good")},
    ),
    "multi-label": Case(
        CLASSIFIER,
        CLASSIFICATION,
        "a.jsonl",
        texts_with([["funny"], [], ["long", "loud"], ["loud"]] * 2, "labels"),
        "f1_micro",
        {"problem_type": "multi_label_classification", **names("funny", "long", "loud")},
    ),
    "regression": Case(
        CLASSIFIER,
        CLASSIFICATION,
        "pairs.csv",
        scored_pairs("sentence1", "sentence2", "label"),
        "spearman",
        {"problem_type": "regression", **names("stars")},
    ),
    "one-label": Case(
        CLASSIFIER,
        CLASSIFICATION,
        "a.csv",
        texts_with([0.5, 0.1, 0.9, 0.4] * 2),
        "spearman",
        names("toxic"),
    ),
    "token-classification": Case(
        "BertForTokenClassification",
        "token-classification",
        "a.jsonl",
        TAGGED,
        "entity_f1",
        {"num_hidden_layers": 2, **names("O", "B-PER", "I-PER", "B-LOC", "I-LOC")},
    ),
    "question-answering": Case("BertForQuestionAnswering", "question-answering", "squad.jsonl", SQUAD, "qa_f1"),
    "fill-mask": Case("BertForMaskedLM", "fill-mask", "a.csv", [{"text": text + " [MASK]"} for text in TEXTS], None),
    "fill-mask-bytes": Case("RobertaForMaskedLM", "fill-mask", "a.csv", [{"text": text} for text in TEXTS], None),
    "feature-extraction": Case("BertModel", "feature-extraction", "a.csv", [{"text": text} for text in TEXTS], None),
    "text-ranking": Case(
        CLASSIFIER,
        "text-ranking",
        "pairs.csv",
        scored_pairs("query", "document", "score"),
        "spearman",
        names("LABEL_0"),
        {
            "config_sentence_transformers.json": {"activation_fn": "torch.nn.modules.linear.Identity"},
            "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.Transformer"}],
        },
    ),
    **{f"sentence-{mode}": sentence_case(mode) for mode in SENTENCE_MODES},
}


def write_word_pieces(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(NAMES.values()), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ids = [("[CLS]", tokenizer.token_to_id("[CLS]")), ("[SEP]", tokenizer.token_to_id("[SEP]"))]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ids)
    return save(tokenizer, folder, NAMES, ["input_ids", "token_type_ids", "attention_mask"])


def write_byte_pieces(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = {"CLS": "<s>", "PAD": "<pad>", "SEP": "</s>", "UNK": "<unk>", "MASK": "<mask>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return save(tokenizer, folder, special, ["input_ids", "attention_mask"])


def save(tokenizer: Any, folder: Path, special: dict[str, str], inputs: list[str]) -> int:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {f"{name.lower()}_token": token for name, token in special.items()}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": MAX_LENGTH, "model_input_names": inputs}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return int(tokenizer.get_vocab_size())


def write_checkpoint(case: Case, folder: Path) -> None:
    import torch
    import transformers

    folder.mkdir()
    model_class = getattr(transformers, case.class_name)
    write = write_byte_pieces if case.class_name.startswith("Roberta") else write_word_pieces
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    settings = {**sizes, "vocab_size": write(folder), "max_position_embeddings": 64, "initializer_range": 0.4, **case.settings}
    model_class(model_class.config_class(**settings)).save_pretrained(folder)
    for name, content in case.extra_files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def write_data(case: Case, path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in case.rows), encoding="utf-8")
        return
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(case.rows[0]))
    writer.writeheader()
    writer.writerows(case.rows)
    path.write_text(stream.getvalue(), encoding="utf-8")


Compile = Callable[[str], Compiled]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """A case by name, compiled on first use."""
    made: dict[str, Compiled] = {}
    folder = tmp_path_factory.mktemp("tasks")

    def compile_case(name: str) -> Compiled:
        if name not in made:
            case = CASES[name]
            source, data = folder / name, folder / f"{name}-{case.data}"
            write_checkpoint(case, source)
            write_data(case, data)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HFACCEL_CACHE", str(folder / "cache"))
                result = hfaccel.compile(str(source), output=folder / f"{name}-out", data=str(data), overrides=FAST)
            made[name] = Compiled(source, hfaccel.load(result.folder), dict(result.manifest))
        return made[name]

    return compile_case


@pytest.mark.parametrize("name", CASES)
def test_task_is_inferred_and_its_data_reaches_the_gate(compiled: Compile, name: str) -> None:
    case, manifest = CASES[name], compiled(name).manifest
    assert manifest["contract"]["task"] == case.task
    accuracy = next(record for record in manifest["stages"] if record["stage"] == "accuracy")["metrics"]
    assert (accuracy["label_free_sample"], accuracy["data"]["examples"]) == (False, len(case.rows))
    verdict = accuracy["verdict"]
    assert [loss["metric"] for loss in verdict["losses"]] == ([case.metric] if case.metric else [])
    for loss in verdict["losses"]:
        assert loss["source"] == pytest.approx(loss["candidate"], abs=1e-6)
        assert np.isfinite(loss["source"])


def same(ours: Any, theirs: Any) -> None:
    """Equal structure; floats to 1e-4 (an exported graph reorders sums)."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs)
        for name in theirs:
            same(ours[name], theirs[name])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    elif isinstance(theirs, (float, np.floating)):
        assert ours == pytest.approx(float(theirs), rel=1e-3, abs=1e-4)
    else:
        assert ours == theirs


def pipeline_of(folder: Path, task: str, **options: Any) -> Any:
    from transformers import pipeline

    return pipeline(task, model=str(folder), **options)


@pytest.mark.parametrize("name", ["single-label", "multi-label", "regression", "one-label"])
def test_text_classification(compiled: Compile, name: str) -> None:
    case = compiled(name)
    theirs = pipeline_of(case.source, "text-classification")
    pairs = [{"text": one, "text_pair": other} for one, other in PAIRS]
    same(case.model(TEXTS), theirs(TEXTS))
    same(case.model(TEXTS, top_k=None), theirs(TEXTS, top_k=None))
    same(case.model(pairs, top_k=None), theirs(pairs, top_k=None, truncation=True))
    same(case.model(PAIRS), theirs(pairs, truncation=True))
    same(case.model("rains " * 100), theirs("rains " * 100, truncation=True))


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification(compiled: Compile, strategy: str) -> None:
    case = compiled("token-classification")
    theirs = pipeline_of(case.source, "token-classification", aggregation_strategy=strategy)
    answers = case.model(TEXTS, aggregation_strategy=strategy)
    same(answers, theirs(TEXTS))
    assert any(answers)
    same(case.model(TEXTS, aggregation_strategy=strategy, ignore_labels=()), theirs(TEXTS, ignore_labels=[]))


@pytest.mark.parametrize(("name", "mask"), [("fill-mask", "[MASK]"), ("fill-mask-bytes", "<mask>")])
def test_fill_mask(compiled: Compile, name: str, mask: str) -> None:
    case = compiled(name)
    theirs = pipeline_of(case.source, "fill-mask")
    texts = [f"Anna moved to {mask}.", f"{mask} jumps over the {mask} dog while it rains", f"the {mask}"]
    same(case.model(texts), theirs(texts))
    same(case.model(texts[0], top_k=3), theirs(texts[0], top_k=3))


def test_feature_extraction(compiled: Compile) -> None:
    case = compiled("feature-extraction")
    same(case.model(TEXTS), pipeline_of(case.source, "feature-extraction")(TEXTS))


def torch_outputs(folder: Path, auto_class: str, *texts: str, max_length: int = MAX_LENGTH) -> tuple[Any, Any]:
    """Encoding and outputs of one text or pair, alone and without padding."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, auto_class).from_pretrained(folder).eval()
    encoding = tokenizer(*texts, return_tensors="pt", truncation=True, max_length=max_length)
    with torch.no_grad():
        return encoding, model(**encoding)


@pytest.mark.parametrize("mode", SENTENCE_MODES)
def test_sentence_vectors(compiled: Compile, mode: str) -> None:
    case = compiled(f"sentence-{mode}")
    expected = []
    for text in TEXTS:
        tokens = torch_outputs(case.source, "AutoModel", text, max_length=32)[1].last_hidden_state[0].double().numpy()
        weights = np.arange(1, len(tokens) + 1)[:, None]
        vector = {
            "mean": tokens.mean(axis=0),
            "cls": tokens[0],
            "max": tokens.max(axis=0),
            "mean_sqrt_len": tokens.sum(axis=0) / np.sqrt(len(tokens)),
            "weightedmean": (tokens * weights).sum(axis=0) / weights.sum(),
            "last": tokens[-1],
        }[mode]
        expected.append(vector / np.linalg.norm(vector) if mode in ("mean", "last") else vector)
    np.testing.assert_allclose(case.model.embed(TEXTS), np.array(expected), atol=1e-4)
    assert case.model.contract.text.max_length == 32


def test_cross_encoder_scores_as_its_checkpoint_says(compiled: Compile) -> None:
    case = compiled("text-ranking")
    scores = [
        float(torch_outputs(case.source, "AutoModelForSequenceClassification", QUESTIONS[0], text)[1].logits[0, 0])
        for text in TEXTS
    ]
    ranked = case.model.rank(QUESTIONS[0], TEXTS)
    assert [item["index"] for item in ranked] == sorted(range(4), key=lambda index: -scores[index])
    same([item["score"] for item in ranked], sorted(scores, reverse=True))
    same(case.model([(QUESTIONS[0], text) for text in TEXTS]), [{"score": score} for score in scores])


def best_span(folder: Path, question: str, context: str) -> dict[str, Any]:
    """The best answer by trying every span of up to 15 tokens; the context must fit one window."""
    encoding, outputs = torch_outputs(folder, "AutoModelForQuestionAnswering", question, context)
    sequences = encoding.sequence_ids(0)
    allowed = np.array([index == 0 or sequence == 1 for index, sequence in enumerate(sequences)])
    start, end = (
        np.exp(logits[0].double().numpy()) * allowed / (np.exp(logits[0].double().numpy()) * allowed).sum()
        for logits in (outputs.start_logits, outputs.end_logits)
    )
    spans = [
        (start[first] * end[last], first, last)
        for first in range(len(sequences))
        for last in range(first, min(first + 15, len(sequences)))
        if sequences[first] == sequences[last] == 1
    ]
    score, first, last = max(spans)
    left = encoding.word_to_chars(0, encoding.token_to_word(0, first), 1).start
    right = encoding.word_to_chars(0, encoding.token_to_word(0, last), 1).end
    return {"score": float(score), "start": left, "end": right, "answer": context[left:right]}


def test_question_answering(compiled: Compile) -> None:
    case = compiled("question-answering")
    pairs = [("Who opened?", TEXTS[0]), ("Where?", TEXTS[1]), ("What jumps?", "The quick brown fox jumps over the lazy dog.")]
    raw = case.model.outputs(case.model.tokenizer.encode(pairs))
    for (question, context), outputs in zip(pairs, raw, strict=True):
        theirs = torch_outputs(case.source, "AutoModelForQuestionAnswering", question, context)[1]
        np.testing.assert_allclose(outputs["start_logits"], theirs.start_logits[0].numpy(), atol=1e-4)
        np.testing.assert_allclose(outputs["end_logits"], theirs.end_logits[0].numpy(), atol=1e-4)
    same(case.model(pairs), [best_span(case.source, question, context) for question, context in pairs])

"""The examiner with models of one numpy table: each word adds to the logits, so that answers can be changed at will."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hfaccel.artifact.contract import Contract, TensorSpec, TextSettings
from hfaccel.evaluate.dataset import Dataset, Example
from hfaccel.recipe.load import load_recipe
from hfaccel.runtime.tokenizer import TextTokenizer
from hfaccel.stages.examine import Examiner

WORDS = 100
CONTRACT = Contract(
    "text-classification",
    tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask")),
    (TensorSpec("logits", "float32", ("batch", 2)),),
    TextSettings(max_length=64, pad_token_id=0),
    ("NO", "YES"),
    "single_label_classification",
)


class Table:
    """Logits are the sum of the table's rows of all tokens. Counts what it was asked."""

    input_names = ("input_ids", "attention_mask")

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self.rows = 0

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.rows += len(feeds["input_ids"])
        added = self.table[feeds["input_ids"]] * feeds["attention_mask"][..., None]
        return {"logits": added.sum(axis=1)}


TABLE = np.random.default_rng(0).normal(size=(WORDS, 2))
MakeExaminer = Callable[[Dataset], tuple[Examiner, Table]]


def data(count: int) -> Dataset:
    generator = np.random.default_rng(1)
    texts = dict.fromkeys(
        " ".join(f"word{word}" for word in generator.integers(0, 95, generator.integers(4, 12))) for _ in range(count)
    )
    tables = TABLE.copy()
    examples = []
    for text in texts:
        ids = [2, *(int(word[4:]) + 5 for word in text.split()), 3]
        right = int(tables[ids].sum(axis=0).argmax())
        examples.append(Example(text, right if generator.random() < 0.9 else 1 - right))
    return Dataset("d", tuple(examples), True, "")


@pytest.fixture
def make(tmp_path: Path, write_tokenizer: Callable[..., None]) -> MakeExaminer:
    write_tokenizer(tmp_path, words=WORDS)
    tokenizer = TextTokenizer(tmp_path, CONTRACT.text)

    def made(dataset: Dataset) -> tuple[Examiner, Table]:
        source = Table(TABLE)
        context: Any = SimpleNamespace(recipe=load_recipe("encoder").recipe, metric=None)
        return Examiner(source, dataset, tokenizer, CONTRACT, context), source

    return made


def changed(scale: float) -> Table:
    return Table(TABLE + scale * np.random.default_rng(2).normal(size=TABLE.shape))


def test_clear_cases_cost_a_part_of_the_data_and_the_source_runs_once(make: MakeExaminer) -> None:
    dataset = data(4000)
    examiner, source = make(dataset)
    assert source.rows == 4000
    same, bad = changed(0), changed(0.5)
    finding = examiner.examine(same)
    assert (finding.reason, finding.verdict.examples, finding.verdict.looks) == (None, 500, 1)
    assert same.rows < 550
    finding = examiner.examine(bad)
    assert (finding.reason, finding.verdict.examples, finding.verdict.looks) == ("loss-over-budget", 500, 1)
    assert finding.to_json()["looks"] == 1
    assert source.rows == 4000
    assert examiner.dataset is dataset


def test_a_border_line_case_is_looked_at_in_full_and_then_judged_as_in_one_look(make: MakeExaminer) -> None:
    examiner, _ = make(data(2000))
    border = changed(0.07)
    finding = examiner.examine(border)
    assert finding.verdict.examples == 2000
    assert finding.verdict.looks == 4
    assert border.rows < 2050  # no example twice
    loss = finding.verdict.losses[0]
    answers = [int((TABLE[ids].sum(axis=0)).argmax()) for ids in _ids(examiner.dataset)]
    right = np.mean([answer == example.label for answer, example in zip(answers, examiner.dataset.examples, strict=True)])
    assert loss.source == pytest.approx(right)
    assert finding == examiner.examine(changed(0.07))


def _ids(dataset: Dataset) -> list[list[int]]:
    return [[2, *(int(word[4:]) + 5 for word in str(example.text).split()), 3] for example in dataset.examples]


def test_small_data_is_looked_at_once_in_its_order(make: MakeExaminer) -> None:
    examiner, _ = make(data(350))
    finding = examiner.examine(changed(0.001))
    assert (finding.verdict.examples, finding.verdict.looks) == (350, 1)


def test_outputs_that_are_not_finite_end_it_at_once(make: MakeExaminer) -> None:
    examiner, _ = make(data(4000))
    broken = changed(0)
    broken.table[50] = np.nan
    finding = examiner.examine(broken)
    assert (finding.reason, finding.detail) == ("not-finite", "NaN or infinity in the outputs")
    assert finding.verdict.examples == 500


def test_unlabelled_data_is_looked_at_in_parts_too(make: MakeExaminer) -> None:
    labelled = data(4000)
    examples = tuple(replace(example, label=None) for example in labelled.examples)
    examiner, _ = make(replace(labelled, examples=examples, labelled=False))
    good = examiner.examine(changed(1e-6))
    assert (good.reason, good.verdict.examples) == (None, 1000)
    bad = examiner.examine(changed(0.5))
    assert (bad.reason, bad.verdict.examples) == ("loss-over-budget", 500)

"""Models with outliers planted as the literature finds them: what ships loses no more than its budget, on texts compile never saw."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hfaccel

PROGRAM = Path(__file__).resolve().parent.parent / "real" / "planted.py"
OFF_TARGET = "cpu-arm-dotprod"
"""Another target than any host of these tests: nothing is timed, so no candidate is dropped for its speed."""
SEEDS = {"text-classification": (0, 3), "feature-extraction": (0,)}
SIZES = {"hidden": 64, "layers": 2, "heads": 4, "intermediate": 256, "words": 500, "channels": 2, "longest": 16}
BUDGET, MIN_COSINE = 0.02, 0.995
EXAMPLES = {"text-classification": 500, "feature-extraction": 200}
HELD_OUT = {"text-classification": 2000, "feature-extraction": 200}
DYNAMIC = "{name: dynamic-per-channel, scheme: dynamic, graph: optimized}"
STATIC = "{name: static, scheme: static, graph: optimized, smooth: 0.75, outlier_neurons: 16}"
# The rung that comes close is enough for a search; vectors need none, so the plain rung may be there to be refused.
LADDERS = {"text-classification": f"[{STATIC}]", "feature-extraction": f"[{DYNAMIC}, {STATIC}]"}
# Weights for any processor, so that what is lost does not depend on whether the products of this processor saturate.
SHORT = ("fuse.enabled=false", "parity.shapes=[1x7, 3x9]", "export.exporters=[torch]", "quantize.sums_in_16_bits=true")
ACCURACY_REASONS = {"loss-over-budget", "slice-loss-over-budget", "cosine-under-minimum", "agreement-under-minimum"}

CASES = [(family, head) for family in ("deberta-v2", "xlm-r") for head in EXAMPLES]


@dataclass(frozen=True)
class Shipped:
    """What a compile shipped, and how it answers on texts that the compile never saw.

    Attributes:
        seed: of the model, its data and the held-out texts.
        manifest: of the artifact.
        source: the checkpoint's raw answers by torch: logits [texts, labels] or mean token vectors [texts, hidden].
        answers: those of the artifact, the same way.
        labels: numbers of the labels [texts]; of the source's own predictions a tenth is replaced.
    """

    seed: int
    manifest: dict[str, Any]
    source: np.ndarray
    answers: np.ndarray
    labels: np.ndarray


@pytest.fixture(scope="module")
def planted() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("planted", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["planted"]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def shipped(request: pytest.FixtureRequest, planted: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Shipped]:
    """Of one family and head, one per seed."""
    family, head = request.param
    root = tmp_path_factory.mktemp(f"{family}-{head}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HFACCEL_CACHE", str(root / "cache"))
        return [compile_and_ask(planted, family, head, seed, root / str(seed)) for seed in SEEDS[head]]


def compile_and_ask(planted: Any, family: str, head: str, seed: int, folder: Path) -> Shipped:
    shape = planted.Shape(**SIZES)
    planted.write_planted(family, folder, shape, head=head, seed=seed, examples=EXAMPLES[head])
    result = hfaccel.compile(
        folder,
        output=folder / "out",
        data=folder / "data.csv",
        calibration=folder / "calibration.txt",
        max_loss=BUDGET,
        target=OFF_TARGET,
        overrides=(f"quantize.ladder={LADDERS[head]}", f"accuracy.min_cosine={MIN_COSINE}", *SHORT),
    )
    texts = planted.make_texts(HELD_OUT[head], shape, seed=1_000 + seed)
    source = torch_answers(folder, head, texts)
    model = hfaccel.load(result.folder)
    raw = model.outputs(model.tokenizer.encode(texts))
    answers = [item["logits"] if head == "text-classification" else item["last_hidden_state"].mean(axis=0) for item in raw]
    names = planted.labels_of(source, seed=1_000 + seed) if head == "text-classification" else []
    labels = np.array([planted.LABELS.index(name) for name in names])
    return Shipped(seed, dict(result.manifest), source, np.array(answers), labels)


def torch_answers(folder: Path, head: str, texts: list[str], *, batch: int = 100) -> np.ndarray:
    """The checkpoint's answers as a user of transformers gets them."""
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    classifies = head == "text-classification"
    model = (AutoModelForSequenceClassification if classifies else AutoModel).from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(texts), batch):
        numbers = order[start : start + batch]
        encoding = tokenizer([texts[index] for index in numbers], padding=True, return_tensors="pt")
        with torch.inference_mode():
            outputs = model(**encoding)
        for row, index in enumerate(numbers):
            length = int(encoding["attention_mask"][row].sum())
            answer = outputs.logits[row] if classifies else outputs.last_hidden_state[row, :length].mean(dim=0)
            found[index] = answer.numpy()
    return np.array([found[index] for index in range(len(texts))])


def test_outliers_are_hard_enough_to_refuse_a_candidate(shipped: list[Shipped]) -> None:
    for item in shipped:
        reasons = {candidate["name"]: candidate["reason"] for candidate in item.manifest["candidates"]}
        assert ACCURACY_REASONS & set(reasons.values()), f"seed {item.seed}: {reasons}"


def test_what_ships_is_quantized(shipped: list[Shipped]) -> None:
    # A search may find no set that holds, and then the float graph ships, rightly; of every seed it would prove nothing.
    assert "int8" in [item.manifest["precision"] for item in shipped]


def test_the_source_has_something_to_lose(shipped: list[Shipped]) -> None:
    for item in shipped:
        if item.labels.size:
            shares = np.bincount(item.source.argmax(axis=1), minlength=3) / len(item.source)
            assert shares.min() > 0.2, f"seed {item.seed}: {shares}"
            assert np.mean(item.source.argmax(axis=1) == item.labels) > 0.85
        else:
            centred = item.source - item.source.mean(axis=0)
            assert np.square(centred).sum() > 0.05 * np.square(item.source).sum(), f"seed {item.seed}: all vectors are alike"


def test_held_out_texts_show_no_loss_over_the_budget(shipped: list[Shipped]) -> None:
    for item in shipped:
        if item.labels.size:
            loss, error = relative_loss(item)
            # The gate is allowed to be wrong in 5 of 100; what a border-line case loses on other texts scatters around the budget.
            assert loss - 2 * error <= BUDGET, f"seed {item.seed}: {item.manifest['chosen']} loses {loss:.2%} +- {error:.2%}"
        else:
            lengths = np.linalg.norm(item.source, axis=1) * np.linalg.norm(item.answers, axis=1)
            cosine = float(np.mean((item.source * item.answers).sum(axis=1) / lengths))
            assert cosine >= MIN_COSINE, f"seed {item.seed}: {item.manifest['chosen']} has a mean cosine of {cosine:.4f}"


def relative_loss(item: Shipped) -> tuple[float, float]:
    """Loss of accuracy as a share of the source's, and its standard error."""
    before, after = item.source.argmax(axis=1) == item.labels, item.answers.argmax(axis=1) == item.labels
    lost = before.astype(float) - after
    return float(lost.mean() / before.mean()), float(lost.std(ddof=1) / len(lost) ** 0.5 / before.mean())

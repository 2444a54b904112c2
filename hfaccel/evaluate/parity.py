"""The parity gate: recorded outputs of the source model against a graph, over several lengths, paddings and batch sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hfaccel.artifact.contract import Contract, TextSettings
from hfaccel.runtime.session import Runner

Arrays = Mapping[str, np.ndarray]
ANSWER_MASK = "decoder_attention_mask"


@dataclass(frozen=True)
class ParityCase:
    """One recorded call: ``inputs`` [batch, sequence] and the source's ``outputs``."""

    name: str
    inputs: Arrays
    outputs: Arrays


@dataclass(frozen=True)
class ParityResult:
    """Worst differences over all cases; ``max_abs`` is relative to the largest recorded magnitude of the output (at least 1)."""

    max_abs: float
    min_cosine: float
    worst_case: str
    cases: int


def make_inputs(shapes: Sequence[str], text: TextSettings, *, vocabulary_size: int, seed: int) -> dict[str, Arrays]:
    """Random token ids for each ``BxS``; every second row is padded to a different length, on the tokenizer's side.

    Lengths beyond ``text.max_length`` are cut to it. Ids are never the padding id, from which some models count positions.
    """
    generator = np.random.default_rng(seed)
    cases: dict[str, Arrays] = {}
    for shape in shapes:
        batch, length = (int(part) for part in shape.split("x"))
        length = min(length, text.max_length)
        ids = generator.integers(0, max(2, vocabulary_size), (batch, length))
        ids[ids == text.pad_token_id] = (text.pad_token_id + 1) % max(2, vocabulary_size)
        mask = np.ones((batch, length), dtype=np.int64)
        for row in range(1, batch, 2):
            real = int(generator.integers(1, length + 1))
            padding = slice(real, None) if text.padding_side == "right" else slice(0, length - real)
            mask[row, padding] = 0
            ids[row, padding] = text.pad_token_id
        types = np.zeros_like(mask)
        cases[f"{batch}x{length}"] = {"input_ids": ids.astype(np.int64), "attention_mask": mask, "token_type_ids": types}
    return cases


def make_answer_inputs(shapes: Sequence[str], contract: Contract, *, vocabulary_size: int, seed: int) -> dict[str, Arrays]:
    """Random sources and answers for an encoder-decoder.

    Each ``BxS`` gives B sources, S tokens of text as :func:`make_inputs` makes them or features of noise, and S tokens of answers.
    """
    generation = contract.generation
    assert generation is not None
    assert generation.encoder is not None  # asked of encoder-decoders only
    generator = np.random.default_rng(seed)
    cases: dict[str, Arrays] = {}
    for name, source in make_inputs(shapes, contract.text, vocabulary_size=vocabulary_size, seed=seed).items():
        batch, length = source["input_ids"].shape
        length = min(length, generation.context_length)
        features = {spec.name: spec.shape for spec in contract.inputs if spec.name == "input_features"}
        given = {key: array for key, array in source.items() if key != "token_type_ids"}
        if features:
            _, bins, frames = features["input_features"]
            given = {"input_features": generator.standard_normal((batch, int(bins), int(frames)), dtype=np.float32)}
        ids = generator.integers(0, max(2, vocabulary_size), (batch, length))
        ids[ids == contract.text.pad_token_id] = (contract.text.pad_token_id + 1) % max(2, vocabulary_size)
        cases[name] = {**given, "decoder_input_ids": ids, ANSWER_MASK: np.ones((batch, length), dtype=np.int64)}
    return cases


def record(runner: Runner, inputs: Mapping[str, Arrays]) -> list[ParityCase]:
    """Run the source on all inputs."""
    return [ParityCase(name, arrays, runner.run(arrays)) for name, arrays in inputs.items()]


def save_cases(cases: Sequence[ParityCase], path: Path) -> None:
    """Write cases as one ``.npz``; keys are ``case/in/name`` and ``case/out/name``."""
    arrays = {f"{case.name}/in/{name}": array for case in cases for name, array in case.inputs.items()}
    arrays |= {f"{case.name}/out/{name}": array for case in cases for name, array in case.outputs.items()}
    with path.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # the stub takes the keyword allow_pickle for one of ours


def load_cases(path: Path) -> list[ParityCase]:
    """The inverse of :func:`save_cases`."""
    grouped: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            case, kind, name = key.split("/")
            grouped.setdefault(case, {"in": {}, "out": {}})[kind][name] = arrays[key]
    return [ParityCase(name, parts["in"], parts["out"]) for name, parts in grouped.items()]


def compare(runner: Runner, cases: Sequence[ParityCase]) -> ParityResult:
    """Run a graph on the recorded inputs. Positions that the mask hides do not count."""
    max_abs, min_cosine, worst = 0.0, 1.0, cases[0].name
    for case in cases:
        outputs = runner.run(case.inputs)
        mask = case.inputs.get(ANSWER_MASK, case.inputs.get("attention_mask", np.zeros(0))).astype(bool)
        for name, expected in case.outputs.items():
            actual = outputs.get(name)
            if actual is None or actual.shape != expected.shape or not np.isfinite(actual).all():
                return ParityResult(float("inf"), -1.0, f"{case.name}, output {name}", len(cases))
            per_token = expected.ndim >= 2 and expected.shape[:2] == mask.shape and name != "sentence_embedding"
            difference, cosine = _difference(expected, actual, mask if per_token else None)
            if difference > max_abs:
                max_abs, worst = difference, f"{case.name}, output {name}"
            min_cosine = min(min_cosine, cosine)
    return ParityResult(max_abs, min_cosine, worst, len(cases))


def _difference(expected: np.ndarray, actual: np.ndarray, mask: np.ndarray | None) -> tuple[float, float]:
    if mask is not None:
        keep = mask.reshape(mask.shape + (1,) * (expected.ndim - 2))
        finite = np.isfinite(expected) & np.isfinite(actual)
        expected, actual = np.where(keep & finite, expected, 0.0), np.where(keep & finite, actual, 0.0)
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    rows_a, rows_b = (array.reshape(len(array), -1).astype(np.float64) for array in (expected, actual))
    norms = np.linalg.norm(rows_a, axis=1) * np.linalg.norm(rows_b, axis=1)
    cosines = np.where(norms > 0, (rows_a * rows_b).sum(axis=1) / np.where(norms > 0, norms, 1.0), 1.0)
    return float(np.abs(expected - actual).max(initial=0.0)) / scale, float(cosines.min(initial=1.0))

"""Which precision an engine computes the float rest in, where the ladder leaves it to a measurement."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from hfaccel.recipe.schema import Rung
from hfaccel.stages.candidates import PointTiming
from hfaccel.stages.float_precision import with_faster_precision


def timing(speedup: float) -> PointTiming:
    return PointTiming("1x16", 2.0, 2.0 / speedup, 2.0 / speedup, speedup, speedup - 0.02, speedup + 0.02, stable=True)


@pytest.mark.parametrize(
    ("asked", "on_target", "speedup", "taken"),
    [
        ("auto", True, 1.4, "bf16"),
        ("auto", True, 0.6, "f32"),
        ("auto", True, 1.01, "f32"),  # as fast: the more accurate one
        ("auto", False, 0.6, "bf16"),  # nothing is timed
        ("bf16", True, 0.6, "bf16"),  # demanded
    ],
)
def test_bfloat16_is_taken_where_it_is_faster(
    asked: Literal["auto", "bf16"], on_target: bool, speedup: float, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced: list[tuple[str, str]] = []

    def race(entrant: Any, other: Any, _ctx: Any) -> tuple[PointTiming, ...]:
        raced.append((entrant.session.inference_precision, other.inference_precision))
        return (timing(speedup),)

    monkeypatch.setattr("hfaccel.stages.float_precision.settings_race", race)
    ladder = Rung(name="one", scheme="static", graph="fused", engine="openvino", inference_precision=asked)
    ctx: Any = SimpleNamespace(on_target=on_target, recipe=SimpleNamespace(quantize=SimpleNamespace(ladder=(ladder,))))
    rung = with_faster_precision(ladder.for_target(bf16=True), Path("model.onnx"), 1, ctx)
    assert rung.session().inference_precision == taken
    assert raced == ([("f32", "bf16")] if asked == "auto" and on_target else [])


def test_a_target_without_bfloat16_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfaccel.stages.float_precision.settings_race", pytest.fail)
    ladder = Rung(name="one", scheme="static", graph="fused", engine="openvino", inference_precision="auto")
    ctx: Any = SimpleNamespace(on_target=True, recipe=SimpleNamespace(quantize=SimpleNamespace(ladder=(ladder,))))
    assert with_faster_precision(ladder.for_target(bf16=False), Path("model.onnx"), 1, ctx).inference_precision == "f32"

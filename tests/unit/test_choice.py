"""Which candidate ships: hand-made verdicts and timings, so that each rule is seen alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hfaccel.artifact.contract import Precision, SessionSettings
from hfaccel.stages.candidates import Candidate, PointTiming
from hfaccel.stages.choice import choose, outdone, pareto_set, rank


def candidate(
    name: str,
    *,
    speedup: float = 1.0,
    bound: float = 0.0,
    precision: Precision = "int8",
    size_bytes: int = 50,
    **fields: Any,
) -> Candidate:
    verdict = {"losses": [{"upper_bound": bound}], "cosine_lower_bound": 1.0}
    return Candidate(name, "g", precision, SessionSettings(), speedup=speedup, verdict=verdict, size_bytes=size_bytes, **fields)


FLOAT = candidate("float", precision="fp32", size_bytes=100)


def chosen_name(*candidates: Candidate, objective: Any = "latency") -> str | None:
    best = choose(candidates, objective)
    return best.name if best else None


def test_the_fastest_that_holds_ships() -> None:
    assert chosen_name(FLOAT, candidate("slow", speedup=1.5), candidate("fast", speedup=2.0, bound=0.009)) == "fast"


def test_a_refused_candidate_never_ships_however_fast() -> None:
    assert chosen_name(FLOAT, candidate("broken", speedup=9, reason="loss-over-budget"), candidate("ok", speedup=1.2)) == "ok"


def test_among_equals_the_more_accurate_ships() -> None:
    assert chosen_name(FLOAT, candidate("a", speedup=2.00, bound=0.009), candidate("b", speedup=1.95, bound=0.002)) == "b"


def test_off_the_target_nothing_is_timed_and_a_quantized_candidate_still_ships() -> None:
    assert chosen_name(FLOAT, candidate("int8")) == "int8"


TIMED = (PointTiming("8x128", 10, 5, 6, 2, 2, 2, True),)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_faster_float_graph_of_another_engine_ships(precision: Precision) -> None:
    other = candidate("openvino", precision=precision, speedup=2.0, size_bytes=100, timings=TIMED)
    assert chosen_name(FLOAT, other) == "openvino"
    assert chosen_name(FLOAT, other, candidate("int8", speedup=1.5, timings=TIMED)) == "openvino"
    assert chosen_name(FLOAT, other, candidate("int8", speedup=2.5, timings=TIMED)) == "int8"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_float_graph_of_another_engine_needs_timings_to_ship(precision: Precision) -> None:
    other = candidate("openvino", precision=precision, size_bytes=100)
    assert chosen_name(FLOAT, other) == "float"
    assert chosen_name(FLOAT, other, candidate("int8")) == "int8"


def test_what_lost_to_a_float_graph_of_another_engine_says_so() -> None:
    candidates = [FLOAT, candidate("openvino", precision="fp32", speedup=2.0, timings=TIMED), candidate("int8", speedup=1.5)]
    best = choose(candidates, "latency")
    assert best is not None
    told = {item.name: item.detail for item in rank(candidates, best, "latency")}
    assert told["openvino"] == "chosen"
    assert told["int8"] == told["float"] == "holds all gates; openvino is better by the objective (latency)"


def test_float_ships_when_nothing_else_is_left() -> None:
    assert chosen_name(FLOAT, candidate("x", reason="slower-than-parent")) == "float"


def test_nothing_ships_when_float_is_broken_too() -> None:
    assert chosen_name(candidate("float", precision="fp32", reason="not-finite")) is None


@pytest.mark.parametrize(("objective", "winner"), [("size", "small"), ("throughput", "large-batches"), ("latency", "fast")])
def test_the_objective_decides(objective: str, winner: str) -> None:
    def timing(speedup: float) -> tuple[PointTiming, ...]:
        return (PointTiming("8x128", 10, 10 / speedup, 12 / speedup, speedup, speedup, speedup, True),)

    candidates = [
        candidate("small", speedup=1.5, size_bytes=20, timings=timing(1.2)),
        candidate("large-batches", speedup=2.0, timings=timing(4)),
        candidate("fast", speedup=3.0, timings=timing(2)),
    ]
    assert chosen_name(FLOAT, *candidates, objective=objective) == winner


def test_the_list_says_why_each_other_lost() -> None:
    candidates = [
        FLOAT,
        candidate("a", speedup=2.00, bound=0.009),
        candidate("b", speedup=1.95, bound=0.002),
        candidate("c", speedup=3, reason="batch-variant", detail="told before"),
        candidate("d", speedup=1.2),
    ]
    best = choose(candidates, "latency")
    assert best is not None
    told = {item.name: (item.reason, item.detail) for item in rank(candidates, best, "latency")}
    assert list(told) == ["b", "c", "a", "d", "float"]
    assert told["b"] == (None, "chosen")
    assert told["c"] == ("batch-variant", "told before")
    assert told["a"][1] == "holds all gates; b is as good within 5 % by the objective (latency), and more accurate"
    assert told["d"][1] == told["float"][1] == "holds all gates; b is better by the objective (latency)"


def test_the_pareto_set_is_what_no_other_beats_in_everything() -> None:
    fast = candidate("fast", speedup=3.0, bound=0.009, size_bytes=50)
    candidates = [
        FLOAT,
        fast,
        candidate("safer", speedup=2.0, bound=0.001, size_bytes=50),
        candidate("smaller", speedup=1.5, bound=0.009, size_bytes=20),
        candidate("beaten", speedup=2.9, bound=0.009, size_bytes=50),
        candidate("refused", speedup=9.0, bound=0.0, size_bytes=1, reason="loss-over-budget"),
    ]
    assert pareto_set(candidates) == {"float", "fast", "safer", "smaller"}
    assert {item.name for item in rank(candidates, fast, "latency") if item.pareto} == {"float", "fast", "safer", "smaller"}


def test_equals_are_both_in_the_pareto_set() -> None:
    assert pareto_set([candidate("a", speedup=2.0), candidate("b", speedup=2.0)]) == {"a", "b"}


def timed(name: str, *speedups: float, float_ms: float = 10, **fields: Any) -> Candidate:
    """With speed-ups at each point of a race in which the float graph took so long."""
    timings = tuple(PointTiming(f"p{i}", float_ms, 5, 6, value, value, value, True) for i, value in enumerate(speedups))
    return candidate(name, timings=timings, speedup=math.prod(speedups) ** (1 / len(speedups)), **fields)


FAST = timed("fast", 2.0, 1.5)


def test_who_is_clearly_slower_than_one_that_holds_is_not_judged() -> None:
    slow = timed("slow", 1.2, 1.55, size_bytes=40)  # a fifth smaller, which nobody asked for
    assert outdone(slow, [FLOAT, FAST], "latency") == (
        "1.36x float in the quick race; fast was 1.73x in the same race and holds the accuracy gate"
    )
    assert outdone(slow, [FLOAT], "latency") is None
    assert outdone(slow, [FLOAT, timed("fast", 2.0, 1.5, reason="loss-over-budget")], "latency") is None


@pytest.mark.parametrize(
    "rival",
    [
        pytest.param(timed("near", 1.9, 1.4), id="nearly as fast"),
        pytest.param(timed("other", 1.0, 1.8), id="faster at one point"),
        pytest.param(timed("small", 1.2, 1.5, size_bytes=37), id="much smaller"),
        pytest.param(timed("elsewhere", 1.2, 1.5, float_ms=11), id="of another race"),
        pytest.param(candidate("untimed"), id="not timed"),
    ],
)
def test_who_may_still_be_wanted_is_judged(rival: Candidate) -> None:
    assert outdone(rival, [FLOAT, FAST], "latency") is None


def test_for_size_everyone_is_judged() -> None:
    assert outdone(timed("slow", 1.2, 1.5), [FLOAT, FAST], "size") is None

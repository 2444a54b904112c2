"""The number of threads is halved as long as the measurement says that fewer are faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfaccel.artifact.contract import SessionSettings
from hfaccel.stages import race
from hfaccel.stages.candidates import PointTiming
from hfaccel.stages.race import Entrant, glance, is_slower
from hfaccel.stages.threads import halve_threads


def timing(point: str, speedup: float, *, spread: float) -> PointTiming:
    return PointTiming(point, 10.0, 10.0 / speedup, 11.0, speedup, speedup * (1 - spread), speedup * (1 + spread), True)


class Machine:
    """Times that depend on the number of threads only: ``work_ms`` that they share, ``handing_ms`` for each of them."""

    def __init__(self, work_ms: float, handing_ms: float, *, spread: float = 0.01) -> None:
        self.work_ms, self.handing_ms, self.spread = work_ms, handing_ms, spread
        self.asked: list[tuple[int, int, bool]] = []

    def ms(self, threads: int, size: float) -> float:
        return self.work_ms * size / threads + self.handing_ms * threads

    def race(self, before: int, after: int, thoroughly: bool) -> list[PointTiming]:
        self.asked.append((before, after, thoroughly))
        ratios = {point: self.ms(before, size) / self.ms(after, size) for point, size in (("1x16", 1.0), ("8x128", 64.0))}
        return [timing(point, ratio, spread=self.spread) for point, ratio in ratios.items()]


def test_where_all_cores_are_best_a_moment_is_enough_to_see_it() -> None:
    machine = Machine(work_ms=100.0, handing_ms=0.001)
    best, trials = halve_threads(16, machine.race, last_point=False)
    assert best == 16
    assert machine.asked == [(16, 8, False)]
    assert [(trial.count, trial.against) for trial in trials] == [(8, 16)]


def test_a_small_model_on_a_large_machine_gets_few_threads() -> None:
    machine = Machine(work_ms=1.0, handing_ms=0.2)
    best, trials = halve_threads(64, machine.race, last_point=False)
    assert 2 <= best <= 16
    assert [trial.count for trial in trials[:2]] == [32, 16]
    assert all(trial.speedup > 1.03 for trial in trials[:-1])
    assert trials[-1].lower_bound < 1.03  # the one that ended it, unless one thread is left


def test_throughput_looks_at_the_last_point() -> None:
    few, many = (halve_threads(64, Machine(1.0, 0.2).race, last_point=last)[0] for last in (False, True))
    assert many > few


@pytest.mark.parametrize("spread", [0.2, 0.5])
def test_noise_decides_nothing(spread: float) -> None:
    machine = Machine(work_ms=0.0, handing_ms=1.0, spread=spread)
    machine.race = lambda before, after, thoroughly: [timing("1x16", 1.05, spread=spread)]  # type: ignore[method-assign]
    best, trials = halve_threads(8, machine.race, last_point=False)
    assert best == 8
    assert len(trials) == 1


def test_one_thread_is_the_least() -> None:
    assert halve_threads(4, Machine(0.0, 1.0).race, last_point=False)[0] == 1
    assert halve_threads(1, Machine(0.0, 1.0).race, last_point=False) == (1, [])


@pytest.mark.parametrize(("known_ms", "slower"), [((4.0, 80.0), True), ((9.5, 95.0), False), ((20.0, 95.0), False)])
def test_a_glance_shows_what_is_much_slower_and_no_more(
    known_ms: tuple[float, float], slower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of 10 and of 100 ms, of which some are disturbed."""
    taken = {"short": iter((10.0, 13.0)), "long": iter((140.0, 100.0))}
    runs = {name: {"after": lambda name=name: name} for name in taken}
    monkeypatch.setattr(race, "_calls", lambda _entrants, _ctx: iter(runs.items()))
    monkeypatch.setattr(race, "milliseconds_of", lambda run: next(taken[run()]))
    known = [PointTiming(name, ms, ms, ms, 1.0, 1.0, 1.0, True) for name, ms in zip(taken, known_ms, strict=True)]
    ctx: Any = None
    found = glance(Entrant(Path("model.onnx"), SessionSettings(), 1), known, ctx)
    assert [item.candidate_ms for item in found] == [10.0, 100.0]
    assert is_slower(found) == slower

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.measure.timing import Timing, compare, interleaved

durations = st.floats(0.01, 1000.0)


class FakeClock:
    """A clock that only the runners move."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.calls: list[str] = []
        self.slept_s: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.slept_s.append(seconds)

    def runner(self, name: str, *milliseconds: float):
        """A runner that takes the given times in turn."""

        def run() -> None:
            self.now_s += milliseconds[self.calls.count(name) % len(milliseconds)] / 1000.0
            self.calls.append(name)

        return run


def test_a_slower_runner_is_found_slower():
    clock = FakeClock()
    timings = interleaved(
        {"fast": clock.runner("fast", 10, 11, 9), "slow": clock.runner("slow", 20, 22, 18)}, seconds=2, clock=clock
    )
    verdict = compare(timings["fast"], timings["slow"])
    assert verdict.ratio == pytest.approx(0.5)
    assert verdict.upper_bound < 1
    assert verdict.stable
    other_way = compare(timings["slow"], timings["fast"])
    assert other_way.ratio == pytest.approx(2.0)
    assert other_way.lower_bound > 1.5


def test_rounds_are_interleaved_and_their_order_rotates():
    clock = FakeClock()
    runners = {name: clock.runner(name, 1) for name in "ABC"}
    timings = interleaved(runners, seconds=0, min_rounds=4, warmup_rounds=1, clock=clock)
    assert "".join(clock.calls) == "ABC" + "ABC" + "BCA" + "CAB" + "ABC"
    assert list(timings) == ["A", "B", "C"]
    assert {len(timing.samples_ms) for timing in timings.values()} == {4}


def test_it_stops_when_the_time_is_used_up():
    clock = FakeClock()
    timings = interleaved({"one": clock.runner("one", 100)}, seconds=2.0, clock=clock)
    assert len(timings["one"].samples_ms) in (20, 21)


def test_it_makes_the_fewest_rounds_even_when_slow_and_the_most_when_fast():
    clock = FakeClock()
    assert len(interleaved({"slow": clock.runner("slow", 9000)}, seconds=1, min_rounds=7, clock=clock)["slow"].samples_ms) == 7
    assert len(interleaved({"fast": clock.runner("fast", 0.001)}, seconds=1, max_rounds=50, clock=clock)["fast"].samples_ms) == 50


def test_the_warm_up_is_not_a_sample():
    clock = FakeClock()
    slow_start = clock.runner("one", 500, 500, *[10] * 30)
    timings = interleaved({"one": slow_start}, seconds=0.1, warmup_rounds=2, clock=clock)
    assert max(timings["one"].samples_ms) == pytest.approx(10)


def test_the_pause_lies_between_the_runners_and_in_no_sample():
    clock = FakeClock()
    runners = {"A": clock.runner("A", 10), "B": clock.runner("B", 10)}
    timings = interleaved(runners, seconds=0, min_rounds=3, max_rounds=3, pause_s=0.5, clock=clock, sleep=clock.sleep)
    assert clock.slept_s == [0.5] * 6
    assert timings["A"].samples_ms == pytest.approx((10, 10, 10))


def test_a_short_run_warms_up_in_each_turn_and_a_long_one_does_not():
    clock = FakeClock()
    runners = {"short": clock.runner("short", 4), "long": clock.runner("long", 50)}
    timings = interleaved(runners, seconds=0, min_rounds=3, max_rounds=3, warmup_rounds=1, settle_s=0.01, clock=clock)
    assert (clock.calls.count("short"), clock.calls.count("long")) == (1 + 3 * (3 + 1), 1 + 3)
    assert {len(timing.samples_ms) for timing in timings.values()} == {3}


def test_what_warms_up_is_not_in_the_samples():
    clock = FakeClock()
    cold_at_first = clock.runner("one", 5, *[9, 5, 5, 5, 5] * 4)  # the warm-up round, then turns whose first run is cold
    timings = interleaved(
        {"one": cold_at_first}, seconds=0, min_rounds=4, max_rounds=4, warmup_rounds=1, settle_s=0.018, clock=clock
    )
    assert timings["one"].samples_ms == pytest.approx((5, 5, 5, 5))


def test_nothing_to_time_and_senseless_rounds_are_refused():
    with pytest.raises(ValueError, match="nothing to time"):
        interleaved({}, seconds=1)
    with pytest.raises(ValueError, match="min_rounds 9 must lie between 1 and max_rounds 3"):
        interleaved({"A": lambda: None}, seconds=1, min_rounds=9, max_rounds=3)
    with pytest.raises(ValueError, match="at least one sample"):
        Timing(())


def test_percentiles_are_in_order():
    timing = Timing((500.0,) * 40 + (*map(float, range(1, 61)),))  # the first two fifths are for settling in
    assert (timing.p50, timing.p95, timing.p99) == pytest.approx((30.5, 57.05, 59.41))


@pytest.mark.parametrize(
    ("samples", "stable"),
    [
        ([10.0] * 30, True),
        ([50.0] * 6 + [10.0] * 24, True),
        ([10.0] * 24 + [15.0] * 6, False),
        ([10.0 + index for index in range(30)], False),
        ([10.0] * 27 + [90.0] + [10.0] * 2, True),
        ([10.0] * 5, False),
        ([10.0] * 7, True),
    ],
    ids=["flat", "slow start", "late jump", "drift", "one outlier", "too few", "fewest"],
)
def test_stable_means_that_the_last_windows_agree(samples, stable):
    assert Timing(tuple(samples)).stable is stable


def test_an_unstable_side_makes_the_comparison_unstable():
    steady, jumping = Timing((10.0,) * 30), Timing((10.0,) * 24 + (20.0,) * 6)
    assert not compare(steady, jumping).stable
    assert not compare(jumping, steady).stable
    assert compare(steady, steady).stable


def test_what_slows_both_alike_leaves_the_ratio_stable():
    quick, slow = Timing((10.0,) * 24 + (20.0,) * 6), Timing((30.0,) * 24 + (60.0,) * 6)
    assert not quick.stable
    assert compare(slow, quick).stable
    assert compare(slow, quick).ratio == pytest.approx(3.0)


def test_with_patience_it_goes_on_until_the_times_are_stable():
    busy_then_calm = [10, 30, 10, 50, 10, 90, 20, 70] * 2 + [10] * 500
    clock = FakeClock()
    impatient = interleaved({"one": clock.runner("one", *busy_then_calm)}, seconds=0.3, clock=clock)
    assert not impatient["one"].stable
    clock = FakeClock()
    patient = interleaved({"one": clock.runner("one", *busy_then_calm)}, seconds=0.3, patience=5, clock=clock)
    assert patient["one"].stable
    assert clock.now_s < 0.3 * 5


def test_patience_ends():
    clock = FakeClock()
    never_calm = interleaved({"one": clock.runner("one", *(10 * 1.2**n for n in range(60)))}, seconds=1, patience=3, clock=clock)
    assert not never_calm["one"].stable


@settings(max_examples=40)
@given(st.lists(st.tuples(durations, durations), min_size=1, max_size=40), st.integers(0, 3))
def test_bounds_are_ordered_and_deterministic(pairs, seed):
    parent, candidate = (Timing(tuple(side)) for side in zip(*pairs, strict=True))
    verdict = compare(parent, candidate, seed=seed)
    assert 0 < verdict.lower_bound <= verdict.upper_bound
    assert verdict == compare(parent, candidate, seed=seed)


@settings(max_examples=40)
@given(st.lists(durations, min_size=1, max_size=40), st.floats(0.1, 10.0))
def test_a_constant_factor_is_found_exactly_whatever_disturbs_both(samples, factor):
    verdict = compare(Timing(tuple(value * factor for value in samples)), Timing(tuple(samples)))
    assert (verdict.ratio, verdict.lower_bound, verdict.upper_bound) == pytest.approx((factor,) * 3, rel=1e-6)


def test_noise_without_difference_is_no_speed_up():
    random = np.random.default_rng(7)
    verdict = compare(Timing(tuple(random.normal(10, 1, 200))), Timing(tuple(random.normal(10, 1, 200))))
    assert verdict.lower_bound < 1 < verdict.upper_bound


def test_timings_of_different_runs_cannot_be_paired():
    with pytest.raises(ValueError, match="timings of 7 and 8 rounds cannot be paired"):
        compare(Timing((1.0,) * 7), Timing((1.0,) * 8))

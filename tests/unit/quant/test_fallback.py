"""The search for a float set, on gates whose answer is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hfaccel.quant.fallback import Fallback, find_float_set

NAMES = tuple(f"matmul_{number}" for number in range(36))


def never() -> bool:
    return False


def search(
    fragile: set[str], ranking: tuple[str, ...] = NAMES, limit: int = 1000
) -> tuple[Fallback | None, list[frozenset[str]]]:
    """Search with a gate that holds when all fragile MatMuls are in float, and the sets that were tried."""
    tried: list[frozenset[str]] = []

    def holds(kept: frozenset[str], error_share: float) -> bool:
        assert 0 < error_share <= 0.5
        tried.append(kept)
        return fragile <= kept

    return find_float_set(ranking, holds, lambda: len(tried) >= limit), tried


def test_nothing_fragile_is_found_by_halving_down_to_none() -> None:
    found, tried = search(set())
    assert found == Fallback((), 7, complete=True, error_share=0.5)
    assert [len(kept) for kept in tried] == [27, 18, 9, 4, 2, 1, 0]


def test_two_fragile_ones_are_found_exactly() -> None:
    found, tried = search({NAMES[0], NAMES[1]})
    assert found is not None
    assert found.kept_float == (NAMES[0], NAMES[1])
    assert len(tried) <= 7


def test_trials_share_the_error_of_one_verdict() -> None:
    """The halving errs no more often than one of its trials; the others' shares add up to no more than the other half."""
    fragile, halving, other = set(NAMES[3:12:2]), [], []

    def holds(kept: frozenset[str], error_share: float) -> bool:
        (halving if error_share == 0.5 else other).append(error_share)
        return fragile <= kept

    found = find_float_set(NAMES, holds, never)
    assert found is not None
    assert set(found.kept_float) == fragile
    assert len(halving) == 3  # 27 and 18 in float hold, 9 do not
    assert sum(other) <= 0.5


@given(st.sets(st.sampled_from(NAMES), max_size=6), st.permutations(NAMES))
def test_whatever_the_ranking_the_set_is_exactly_the_fragile_ones(fragile: set[str], ranking: list[str]) -> None:
    found, tried = search(fragile, tuple(ranking))
    assert found is not None
    assert set(found.kept_float) == fragile
    assert found.complete
    assert len(tried) == len(set(tried)) == found.trials  # no set is tried twice


@given(st.floats(0, 20), st.lists(st.floats(0.01, 5), min_size=1, max_size=36))
def test_with_errors_that_add_up_no_member_can_be_taken_back(budget: float, errors: list[float]) -> None:
    weights = dict(zip(NAMES, sorted(errors, reverse=True), strict=False))

    def holds(kept: frozenset[str], _: float = 1.0) -> bool:
        return sum(error for name, error in weights.items() if name not in kept) <= budget

    found = find_float_set(tuple(weights), holds, never)
    if found is None:
        return  # only with all in float
    assert holds(frozenset(found.kept_float))
    assert not any(holds(frozenset(found.kept_float) - {name}) for name in found.kept_float)


@given(st.sets(st.sampled_from(NAMES), min_size=1, max_size=6), st.permutations(NAMES), st.integers(0, 36))
def test_few_are_taken_back_where_few_are_asked_for(fragile: set[str], ranking: list[str], most: int) -> None:
    shares: list[float] = []

    def holds(kept: frozenset[str], error_share: float) -> bool:
        shares.append(error_share)
        return fragile <= kept

    found, (all_tried, _) = find_float_set(ranking, holds, never, most_take_backs=most), search(fragile, tuple(ranking))
    assert all_tried is not None
    assert sum(share for share in shares if share != 0.5) <= 0.5 + 1e-9
    if found is None:  # even three quarters in float missed the gate, at the first trial
        assert set(ranking[3 * len(ranking) // 4 :]) & fragile
        assert len(shares) == 1
        return
    assert fragile <= set(found.kept_float)
    assert found.trials <= all_tried.trials
    assert len(found.kept_float) <= len(all_tried.kept_float) + max(0, 36 - most)
    if found.complete:
        assert set(found.kept_float) == fragile


@given(st.sets(st.sampled_from(NAMES), min_size=1, max_size=6), st.integers(0, 12))
def test_when_time_runs_out_the_best_so_far_holds(fragile: set[str], limit: int) -> None:
    found, tried = search(fragile, limit=limit)
    assert len(tried) <= limit
    if found is not None:
        assert fragile <= set(found.kept_float)


def test_a_gate_that_never_holds_ends() -> None:
    assert find_float_set(NAMES, lambda _kept, _share: False, never) is None

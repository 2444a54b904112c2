"""Statistics of activations on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hfaccel.errors import IntegrityError
from hfaccel.quant.calibration import ActivationStatistics, load_statistics, save_statistics

NUMBERS = st.floats(width=32, allow_nan=False)


@st.composite
def one_statistics(draw: st.DrawFn) -> ActivationStatistics:
    channels = draw(st.integers(1, 9))
    both = draw(arrays.arrays(np.float32, (2, channels), elements=NUMBERS))
    statistics = ActivationStatistics(both[0], both[1])
    if draw(st.booleans()):
        statistics.update(draw(arrays.arrays(np.float32, (3, channels), elements=st.floats(-1e4, 1e4, width=32))))
    return statistics


@given(st.dictionaries(st.text("abc/:.é_ 0", min_size=1), one_statistics(), max_size=4))
def test_statistics_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, statistics: dict[str, ActivationStatistics]
) -> None:
    path = tmp_path_factory.mktemp("artifact") / "statistics" / "optimized.npz"
    save_statistics(statistics, path)
    again = load_statistics(path)
    assert list(again) == list(statistics)
    for name, expected in statistics.items():
        for field in ("channel_minimum", "channel_maximum", "histogram"):
            actual = getattr(again[name], field)
            assert actual.dtype == getattr(expected, field).dtype
            assert actual.tobytes() == getattr(expected, field).tobytes()
        assert again[name].histogram_limit == expected.histogram_limit
        assert again[name].tokens == expected.tokens
        assert again[name].channel_mean.tobytes() == expected.channel_mean.tobytes()


def test_the_same_statistics_give_the_same_bytes(tmp_path: Path) -> None:
    statistics = {"hidden": ActivationStatistics(np.array([-1.5, 0], np.float32), np.array([0, 2.25], np.float32))}
    for name in ("a.npz", "b.npz"):
        save_statistics(statistics, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_statistics_read_back_can_go_on(tmp_path: Path) -> None:
    before = {"hidden": ActivationStatistics.empty(2)}
    before["hidden"].update(np.array([[1.0, -3.0]], np.float32))
    save_statistics(before, tmp_path / "statistics.npz")
    again = load_statistics(tmp_path / "statistics.npz")["hidden"]
    again.update(np.array([[5.0, 0.0]], np.float32))
    assert again.range("minmax") == (-3.0, 5.0)
    assert again.histogram.sum() == 4
    assert again.channel_mean.tolist() == [3.0, -1.5]


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x03\x04 cut"], ids=["empty", "other", "cut"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "statistics.npz"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="these are no activation statistics") as caught:
        load_statistics(path)
    assert caught.value.where == str(path)
    assert "hfaccel cache clear" in caught.value.hint

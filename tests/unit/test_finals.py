"""What the final race makes of timings that a busy machine took."""

from __future__ import annotations

import pytest

from hfaccel.stages.candidates import PointTiming
from hfaccel.stages.finals import _unless_busy


@pytest.mark.parametrize(("float_ms", "stable"), [(10.0, True), (14.9, True), (15.1, False)])
def test_a_float_graph_slower_than_before_means_a_busy_machine(float_ms: float, stable: bool) -> None:
    timing = PointTiming("8x128", float_ms, 5.0, 6.0, float_ms / 5, 1.5, 2.5, True)
    assert _unless_busy(timing, {"8x128": 10.0}).stable is stable
    assert not _unless_busy(PointTiming("8x128", 1.0, 5.0, 6.0, 0.2, 0.1, 0.3, False), {"8x128": 10.0}).stable
    assert _unless_busy(timing, {}).stable  # nothing to compare with

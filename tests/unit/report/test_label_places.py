"""Names of points are written where they can be read."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from hfaccel.report.labels import Box, place_labels
from hfaccel.report.wording import shortened

FRAME = Box(60, 30, 700, 350)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(120, 640), st.floats(60, 320)), min_size=1, max_size=6), st.data())
def test_labels_stay_in_the_frame_and_rarely_touch(points: list[tuple[float, float]], data: st.DataObject) -> None:
    texts = [data.draw(st.text("abc-", min_size=1, max_size=12)) for _ in points]
    labels = place_labels(points, texts, FRAME)
    assert [label.text for label in labels] == texts
    for label in labels:
        assert math.isclose(label.box.overlap(FRAME), label.box.area, rel_tol=1e-6)
    for index, label in enumerate(labels):
        assert all(label.box.overlap(other.box) < 0.25 * label.box.area for other in labels[index + 1 :])


def test_a_lonely_label_stands_beside_its_point_without_a_leader() -> None:
    (label,) = place_labels([(300, 200)], ["float"], FRAME)
    assert not label.needs_leader
    assert label.box.left - 300 < 20


def test_points_on_each_other_get_labels_that_do_not_overlap() -> None:
    labels = place_labels([(300, 200)] * 5, ["dynamic-per-channel"] * 5, FRAME)
    boxes = [label.box for label in labels]
    assert all(boxes[i].overlap(boxes[j]) == 0 for i in range(5) for j in range(i))
    assert any(label.needs_leader for label in labels)


def test_long_names_keep_both_ends() -> None:
    assert shortened("openvino-dynamic-per-channel-fused", 20) == "openvino-d…nel-fused"
    assert len(shortened("x" * 99, 21)) == 21
    assert shortened("float", 5) == "float"

from __future__ import annotations

import json

import pytest

from hfaccel.errors import UsageError
from hfaccel.measure.bench import COLUMNS, MODES, Contender, run_bench
from hfaccel.measure.likeness import Likeness
from hfaccel.measure.peers import parse_peers
from hfaccel.measure.plot import check_plot_path, draw
from hfaccel.measure.stopwatch import Stopwatch
from hfaccel.measure.stream import COLUMNS as STREAM_COLUMNS
from hfaccel.measure.stream import StreamRun, run_stream
from hfaccel.measure.workload import Point

POINTS = (Point(1, 16), Point(8, 128))


class World:
    """Contenders whose runs take as long as told, on a clock that only they move."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def contender(self, name, graph_ms, end_to_end_ms, *, slower_after_runs=None, growing=1.0):
        def prepare(milliseconds):
            runs = 0

            def run():
                nonlocal runs
                runs += 1
                late = slower_after_runs is not None and runs > slower_after_runs
                self.now_s += milliseconds * growing**runs * (3 if late else 1) / 1000

            return run

        return Contender(name, lambda point: prepare(graph_ms * point.batch), lambda point: prepare(end_to_end_ms * point.batch))

    def bench(self, *contenders, modes=MODES, **told):
        return run_bench(contenders[0], contenders[1:], POINTS, modes=modes, watch=self.watch(**told))

    def watch(self, **told):
        return Stopwatch(2.0, clock=lambda: self.now_s, sleep=lambda _: None, **told)


def test_every_point_and_mode_has_a_row_for_each_contender():
    world = World()
    rows = world.bench(world.contender("artifact", 5, 6), world.contender("torch fp32", 10, 18))
    assert [(str(row.point), row.mode, row.contender) for row in rows] == [
        (point, mode, name)
        for point in ("1x16", "8x128")
        for mode in ("graph only", "end to end")
        for name in ("artifact", "torch fp32")
    ]
    assert rows[0].cells() == ("1x16", "graph only", "artifact", "5.00", "5.00", "5.00", "200.0", "", "", "")
    assert rows[1].cells() == ("1x16", "graph only", "torch fp32", "10.00", "10.00", "10.00", "100.0", "2.00x", "2.00x", "")
    assert rows[3].cells()[-3:-1] == ("3.00x", "3.00x")
    assert all(len(row.cells()) == len(COLUMNS) for row in rows)
    json.dumps([row.to_json() for row in rows])


def test_what_is_not_stable_gets_no_number():
    world = World()
    artifact, growing = world.contender("artifact", 5, 5), world.contender("torch fp32", 10, 10, growing=1.05)
    rows = world.bench(artifact, growing, modes=("graph only",))
    assert rows[1].cells()[3:] == ("not stable", "", "", "", "not stable", "", "")
    data = rows[1].to_json()
    assert (data["stable"], data["p50_ms"], data["artifact_speedup"]["ratio"]) == (False, None, None)
    assert rows[0].cells()[3] == "5.00"


def test_it_waits_for_calm_and_reports_what_came_after():
    world = World()
    artifact, late = world.contender("artifact", 5, 5), world.contender("torch fp32", 10, 10, slower_after_runs=60)
    rows = world.bench(artifact, late, modes=("graph only",))
    assert rows[1].cells()[3:4] + rows[1].cells()[-3:-1] == ("30.00", "6.00x", "6.00x")


def test_an_unknown_peer_is_named():
    assert parse_peers("Torch, torch") == ("torch",)
    assert parse_peers("") == ()
    with pytest.raises(UsageError) as caught:
        parse_peers("torch,llamafile")
    assert str(caught.value) == (
        "--against: no peer 'llamafile' to compare with (known peers: torch, torch-bf16, torch-compile, "
        "onnxruntime-default, openvino, openvino-int8, ctranslate2)"
    )


def test_a_peer_that_fails_is_told_and_left_out():
    world, told = World(), []

    def broken(point):
        if point.batch == 8:
            raise RuntimeError("no kernel for this shape")
        return lambda: None

    artifact, peer = world.contender("artifact", 5, 5), Contender("torch fp32", broken, broken)
    rows = world.bench(artifact, peer, modes=("graph only",), on_failure=lambda *args: told.append(args))
    assert [(str(row.point), row.contender) for row in rows] == [
        ("1x16", "artifact"),
        ("1x16", "torch fp32"),
        ("8x128", "artifact"),
    ]
    assert [(name, str(error)) for name, error in told] == [("torch fp32", "no kernel for this shape")]


def test_a_broken_artifact_is_no_result():
    def broken(point):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        World().bench(Contender("artifact", broken, broken))


def test_answers_unlike_the_source_are_seen():
    assert Likeness(0.95561, None, True, 64).cell() == "0.9556"
    assert Likeness(0.95561, 0.9844, True, 64).cell() == "0.9556, top-1 98.4%"
    assert Likeness(1.0, None, False, 64).cell() == "not finite"


def test_a_stream_has_a_row_for_each_engine_and_order(tmp_path):
    world = World()
    runs = [
        StreamRun("artifact", "as it comes", world.contender("a", 1000, 0).graph_only(Point(1, 1)), None),
        StreamRun("torch fp32", "as it comes", world.contender("b", 4000, 0).graph_only(Point(1, 1)), None),
        StreamRun("torch fp32", "sorted by length", world.contender("c", 2000, 0).graph_only(Point(1, 1)), None),
    ]
    rows = run_stream(runs, 512, watch=world.watch())
    assert [row.cells() for row in rows] == [
        ("artifact", "as it comes", "1000", "512.0", "", "", ""),
        ("torch fp32", "as it comes", "4000", "128.0", "4.00x", "4.00x", ""),
        ("torch fp32", "sorted by length", "2000", "256.0", "2.00x", "2.00x", ""),
    ]
    assert all(len(row.cells()) == len(STREAM_COLUMNS) for row in rows)
    pytest.importorskip("matplotlib")
    draw((), tmp_path / "stream.png", title="tiny", stream=rows)
    assert (tmp_path / "stream.png").stat().st_size > 1000


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    world = World()
    rows = world.bench(world.contender("artifact", 5, 6), world.contender("torch fp32", 10, 18, slower_after_runs=50))
    for name in ("bench.png", "bench.svg"):
        check_plot_path(tmp_path / name)
        draw(rows, tmp_path / name, title="tiny")
        assert (tmp_path / name).stat().st_size > 1000


def test_a_picture_of_another_kind_is_refused(tmp_path):
    with pytest.raises(UsageError) as caught:
        check_plot_path(tmp_path / "bench.doc")
    assert str(caught.value) == "--plot: cannot draw 'bench.doc' (the name must end in .png or .svg)"

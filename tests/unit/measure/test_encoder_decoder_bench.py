"""Tables of encoder-decoders from fakes; says nothing about how fast anything is."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hfaccel.errors import UsageError
from hfaccel.measure.answer_bench import COLUMNS, AnswerRow, OpenAnswerer, check_answer_requests, less, run_answer_bench
from hfaccel.measure.clips import Clip
from hfaccel.measure.decoding import Request
from hfaccel.measure.peers.answers import parse_answer_peers
from hfaccel.measure.speech_bench import COLUMNS as SPEECH_COLUMNS
from hfaccel.measure.speech_bench import PART_COLUMNS, OpenListener, SpeechRow, run_speech_bench
from hfaccel.measure.stopwatch import Stopwatch
from hfaccel.measure.timing import Timing


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeAnswers:
    """Takes so many seconds for the source and for each token; may end early."""

    def __init__(self, clock, source_s, token_s, *, most=1000, differs_at=1000):
        self.clock = clock
        self.source_s = source_s
        self.token_s = token_s
        self.most = most
        self.differs_at = differs_at

    def answer(self, source, new):
        def run():
            self.clock.sleep(self.source_s + self.token_s * new)
            return [token if token < self.differs_at else -1 for token in range(min(new, self.most))]

        return run


def watch(clock, seconds, **told):
    return Stopwatch(seconds, pause_s=0.0, clock=clock, sleep=clock.sleep, **told)


def answer(clock, own, peers, **told):
    return run_answer_bench(
        OpenAnswerer("artifact", own),
        peers,
        [Request(10, 5)],
        source_of=lambda tokens: list(range(tokens)),
        watch=watch(clock, 1.0, **told),
    )


def test_rows_tell_the_first_token_the_others_and_the_whole():
    clock = FakeClock()
    other = OpenAnswerer("other", FakeAnswers(clock, 0.3, 0.02, differs_at=3))
    rows = answer(clock, FakeAnswers(clock, 0.1, 0.01), [other])
    assert [(row.part, row.engine, row.tokens) for row in rows] == [
        (part, engine, tokens)
        for part, tokens in (("source", 10), ("answer", 4), ("whole", 5))
        for engine in ("artifact", "other")
    ]
    assert [row.timing.p50 for row in rows] == pytest.approx([110, 320, 40, 80, 150, 400])
    assert rows[3].cells() == ("10+5", "answer", "other", "50.0", "20.00", "80.0", "80.0", "2.00x", "2.00x", "3 of 5")
    assert rows[2].cells()[-3:] == ("", "", "")
    assert len(rows[0].cells()) == len(COLUMNS)
    assert json.loads(json.dumps(rows[5].to_json()))["artifact_speedup"]["ratio"] == pytest.approx(400 / 150)


def test_an_engine_that_ends_early_is_not_compared():
    clock, told = FakeClock(), []
    early = OpenAnswerer("early", FakeAnswers(clock, 0.1, 0.01, most=2))
    rows = answer(clock, FakeAnswers(clock, 0.1, 0.01), [early], on_failure=lambda name, error: told.append((name, str(error))))
    assert told == [("early", "wrote 2 tokens where 5 were asked for")]
    assert {row.engine for row in rows} == {"artifact"}


def test_what_was_not_stable_gives_no_number():
    timing = Timing((1.0, 1.0, 5.0, 5.0, 9.0, 9.0))
    row = AnswerRow(Request(8, 2), "whole", "artifact", 2, timing, None, None)
    assert "not stable" in row.cells()
    assert row.to_json()["ms_per_token"] is None
    heard = SpeechRow("artifact", 2.0, timing, (5.0,), None, 0.5, 1)
    assert heard.cells() == ("artifact", "not stable", "", "", "", "", "", "50.0%", "")
    assert heard.to_json()["real_time_factor"] is None


def test_what_is_left_of_a_whole_is_told_round_by_round():
    left = less(Timing((10.0, 20.0)), Timing((1.0, 2.0)), Timing((3.0, 4.0)))
    assert left.samples_ms == (6.0, 14.0)


def test_requests_that_do_not_fit_are_refused():
    check_answer_requests([Request(64, 32)], 64, 32)
    for request in (Request(65, 1), Request(1, 33)):
        with pytest.raises(UsageError, match=r"64 tokens of the source, 32 new ones .* 64\+32 at most"):
            check_answer_requests([request], 64, 32)


def test_unknown_peers_are_refused_with_what_to_write():
    assert parse_answer_peers(" CTranslate2,torch,,torch") == ("ctranslate2", "torch")
    assert parse_answer_peers("") == ()
    with pytest.raises(UsageError, match="known peers: torch, ctranslate2"):
        parse_answer_peers("openvino")


def clips(*references):
    return [
        Clip(f"{index}.wav", np.full(10 * (index + 1), index, dtype=np.float32), float(index + 1), own)
        for index, own in enumerate(references)
    ]


def listener(clock, label, seconds_per_sample, texts, heard=None):
    def listen(samples):
        clock.sleep(seconds_per_sample * samples.size)
        if heard is not None:
            heard.append((label, int(samples[0])))
        return texts[int(samples[0])]

    return OpenListener(label, listen)


def hear(clock, own, peers, sounds, parts=None, **told):
    return run_speech_bench(own, peers, sounds, parts or {}, watch=watch(clock, 0.1, **told))


def test_speech_is_told_per_second_of_sound_and_per_clip():
    pytest.importorskip("jiwer")
    clock = FakeClock()
    own = listener(clock, "artifact", 0.01, ["the sea", "says nothing"])
    other = listener(clock, "other", 0.03, ["the sea", "says something"])
    parts = {"features": lambda clip: lambda: clock.sleep(0.001 * clip.samples.size)}
    sounds = clips(("The sea.",), ("Says nothing!",))
    result = hear(clock, own, [other], sounds, parts)
    assert [row.engine for row in result.rows] == ["artifact", "other"]
    assert [row.real_time_factor for row in result.rows] == pytest.approx([0.1, 0.3])
    assert result.rows[1].clips_ms == pytest.approx((300, 600))
    assert [row.word_error_rate for row in result.rows] == [0, 0.25]
    assert [row.same for row in result.rows] == [2, 1]
    cells = result.rows[1].cells()
    assert cells == ("other", "0.3000", "900", "450", "585", "3.00x", "3.00x", "25.0%", "1 of 2")
    assert len(cells) == len(SPEECH_COLUMNS)
    assert [row.cells() for row in result.parts] == [("features", "15.0", "10%"), ("decoder", "135.0", "90%")]
    assert len(PART_COLUMNS) == 3
    shown = json.loads(json.dumps(result.clips_json(sounds)))
    assert shown[1]["text"] == {"artifact": "says nothing", "other": "says something"}
    assert shown[1]["p50_ms"] == {"artifact": pytest.approx(200), "other": pytest.approx(600)}


def test_engines_take_turns_at_each_clip_and_nobody_always_begins():
    clock, heard = FakeClock(), []
    engines = [listener(clock, label, 0.01, ["a", "b"], heard) for label in ("artifact", "other")]
    hear(clock, engines[0], engines[1:], clips((), ()))
    first_round = heard[4:8]  # behind the transcripts
    assert first_round == [("artifact", 0), ("other", 0), ("other", 1), ("artifact", 1)]


def test_without_transcripts_there_is_no_error_rate_and_who_fails_is_left_out():
    clock, told = FakeClock(), []
    bad = listener(clock, "bad", 0.01, [])
    result = hear(
        clock,
        listener(clock, "artifact", 0.01, ["a", "b"]),
        [bad],
        clips(("a",), ()),
        on_failure=lambda name, error: told.append(name),
    )
    assert told == ["bad"]
    assert [(row.engine, row.word_error_rate) for row in result.rows] == [("artifact", None)]
    assert result.rows[0].cells()[-2:] == ("", "")

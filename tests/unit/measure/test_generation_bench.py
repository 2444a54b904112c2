"""Tables of text generation from fakes; says nothing about how fast anything is."""

from __future__ import annotations

import ctypes
import json
import sys

import numpy as np
import pytest

from hfaccel.artifact.artifact import Artifact
from hfaccel.errors import SettingsError, UsageError
from hfaccel.measure.cached_stages import cached_stages, check_stages
from hfaccel.measure.decoding import Request
from hfaccel.measure.generation_bench import COLUMNS, GenerationRow, check_requests, run_generation_bench
from hfaccel.measure.generation_plot import draw_generation, draw_ladder
from hfaccel.measure.ladder import LadderRow, Rung, Share, columns, interpolation_weights, run_ladder
from hfaccel.measure.peers.decoders import DecoderPeer, OpenDecoder, OpenDecoders, open_decoders, parse_decoder_peers
from hfaccel.measure.peers.llama_cpp_decoder import LlamaCppDecoder
from hfaccel.measure.peers.openvino_decoder import OpenvinoDecoder
from hfaccel.measure.stopwatch import Stopwatch
from hfaccel.measure.timing import Timing, compare
from hfaccel.runtime.openvino_session import import_openvino


class FakeClock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class FakeEngine:
    """Takes so many seconds for a token."""

    def __init__(self, clock, seconds_per_token, *, cannot_write=False):
        self.clock = clock
        self.seconds_per_token = seconds_per_token
        self.cannot_write = cannot_write
        self.prompts = []

    def read(self, prompt):
        self.prompts.append(tuple(prompt))
        return lambda: self.clock.sleep(self.seconds_per_token * len(prompt))

    def write(self, prompt, answer):
        if self.cannot_write:
            raise RuntimeError("no cache")
        return lambda: self.clock.sleep(self.seconds_per_token * len(answer))

    def answer(self, prompt, new_tokens):
        self.prompts.append(tuple(prompt))
        return lambda: self.clock.sleep(self.seconds_per_token * (len(prompt) + new_tokens))

    def logits(self, prompt):
        return np.array([1.0, 2.0, 4.0], dtype=np.float32) + self.seconds_per_token


def watch(clock, **told):
    return Stopwatch(1.0, pause_s=0.0, clock=clock, sleep=clock.sleep, **told)


def bench(engines, clock, prompts=None, **told):
    watching = watch(clock, **told)
    return run_generation_bench(engines, [Request(10, 4)], vocabulary_size=50, watch=watching, prompts=prompts or {})


def test_rows_tell_the_speed_of_prompt_and_answer_and_how_much_faster_the_artifact_is():
    clock = FakeClock()
    own, other = FakeEngine(clock, 0.001), FakeEngine(clock, 0.003)
    rows = bench(OpenDecoders(OpenDecoder("artifact", own), (OpenDecoder("other", other),), ()), clock)
    assert [(row.part, row.engine) for row in rows] == [
        (part, engine) for part in ("prompt", "answer") for engine in ("artifact", "other")
    ]
    assert own.prompts == other.prompts
    assert rows[0].cells()[:7] == ("10+4", "prompt", "artifact", "1000.0", "1.00", "10.0", "10.0")
    assert rows[3].cells()[3:9] == ("333.3", "3.00", "12.0", "12.0", "3.00x", "3.00x")
    assert len(rows[0].cells()) == len(COLUMNS)
    data = json.loads(json.dumps(rows[3].to_json()))
    assert data["tokens"] == 4
    assert data["artifact_speedup"]["ratio"] == pytest.approx(3)


def test_whole_requests_are_timed_where_texts_are_given():
    clock = FakeClock()
    own, other = FakeEngine(clock, 0.001), FakeEngine(clock, 0.003)
    engines = OpenDecoders(OpenDecoder("artifact", own), (OpenDecoder("other", other),), ())
    texts = [[1, 2, 3], [4, 5, 6, 7]]
    rows = bench(engines, clock, prompts={Request(10, 4): texts})
    assert [row.part for row in rows] == ["prompt"] * 2 + ["answer"] * 2 + ["request"] * 2
    assert own.prompts[-2:] == other.prompts[-2:] == [(1, 2, 3), (4, 5, 6, 7)]
    # 8 new tokens in the time of 15 tokens, the prompts among them
    assert rows[4].cells()[3:9] == (f"{8 / 0.015:.1f}", f"{15 / 8:.2f}", "15.0", "15.0", "", "")
    assert rows[5].cells()[7] == "3.00x"


def test_a_peer_that_fails_on_the_way_is_told_and_the_others_go_on():
    clock, told = FakeClock(), []
    bad = OpenDecoder("bad", FakeEngine(clock, 0.001, cannot_write=True))
    good = OpenDecoder("good", FakeEngine(clock, 0.002))
    engines = OpenDecoders(OpenDecoder("artifact", FakeEngine(clock, 0.001)), (bad, good), ())
    rows = bench(engines, clock, on_failure=lambda name, error: told.append((name, str(error))))
    assert told == [("bad", "no cache")]
    assert [row.engine for row in rows if row.part == "answer"] == ["artifact", "good"]


def test_what_was_not_stable_gives_no_number():
    timing = Timing((1.0, 1.0, 5.0, 5.0, 9.0, 9.0))
    row = GenerationRow(Request(8, 2), "answer", "artifact", timing, None)
    assert "not stable" in row.cells()
    assert row.to_json()["tokens_per_second"] is None


def test_requests_longer_than_the_model_reads_are_refused():
    with pytest.raises(UsageError, match=r"128\+100 is longer than the 192 tokens .* add up to 192 at most"):
        check_requests([Request(128, 100)], 192)


@pytest.mark.parametrize("text", ["openvino-int8", "torch=there", "genai"])
def test_unknown_peers_are_refused_with_what_to_write(text):
    with pytest.raises(UsageError, match="known peers: torch, onnxruntime-genai=FOLDER"):
        parse_decoder_peers(text)


def test_genai_needs_a_folder_of_its_own(tmp_path):
    with pytest.raises(UsageError, match="write onnxruntime-genai=FOLDER"):
        parse_decoder_peers(f"onnxruntime-genai={tmp_path}")
    with pytest.raises(UsageError, match="write onnxruntime-genai=FOLDER"):
        parse_decoder_peers("onnxruntime-genai")
    (tmp_path / "genai_config.json").write_text("{}", encoding="utf-8")
    peers = parse_decoder_peers(f"torch, onnxruntime-genai={tmp_path}, torch")
    assert peers == (DecoderPeer("torch"), DecoderPeer("onnxruntime-genai", tmp_path))
    assert parse_decoder_peers("") == ()


def test_openvino_needs_a_folder_of_its_own(tmp_path):
    with pytest.raises(UsageError, match="write openvino=FOLDER"):
        parse_decoder_peers(f"openvino={tmp_path}")
    (tmp_path / "openvino_model.xml").write_text("<net/>", encoding="utf-8")
    assert parse_decoder_peers(f"openvino={tmp_path}") == (DecoderPeer("openvino", tmp_path),)


TABLE = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)


def stateful_folder(folder):
    """A model whose state is all it was told: logits are the sum of the rows of a table, one for each token so far."""
    openvino = import_openvino()
    from openvino import opset13 as operators
    from openvino.op.util import Variable, VariableInfo

    ids = operators.parameter([1, -1], np.int64, name="input_ids")
    ids.output(0).set_names({"input_ids"})
    rows = operators.gather(operators.constant(TABLE), ids, operators.constant(np.int64(0)))
    info = VariableInfo()
    info.data_shape, info.data_type, info.variable_id = openvino.PartialShape([1, -1, 4]), openvino.Type.f32, "seen"
    variable = Variable(info)
    nothing = operators.constant(np.zeros((1, 0, 4), dtype=np.float32))
    seen = operators.concat([operators.read_value(nothing, variable), rows], 1)
    logits = operators.reduce_sum(seen, operators.constant(np.array([1])), keep_dims=True)
    logits.output(0).set_names({"logits"})
    model = openvino.Model([operators.result(logits)], [operators.assign(seen, variable)], [ids], "stateful")
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)
    return folder


def test_openvino_steps_from_the_end_of_its_prompt_each_time(tmp_path):
    engine = OpenvinoDecoder(stateful_folder(tmp_path), threads=1)
    np.testing.assert_allclose(engine.logits([1, 2, 3]), TABLE[[1, 2, 3]].sum(axis=0), rtol=1e-5)
    run = engine.write([1, 2], [3, 4])
    engine.read([5, 6])()
    for _ in range(2):
        run()
        np.testing.assert_allclose(engine._step(np.array([[7]])), TABLE[[1, 2, 3, 4, 7]].sum(axis=0), rtol=1e-5)
    told = [int(TABLE[[8]].sum(axis=0).argmax())]
    told.append(int(TABLE[[8, *told]].sum(axis=0).argmax()))
    engine.answer([8], 3)()
    np.testing.assert_allclose(engine._step(np.array([[0]])), TABLE[[8, *told, 0]].sum(axis=0), rtol=1e-5)


def test_llama_cpp_needs_a_file(tmp_path):
    for text in ("llama-cpp", f"llama-cpp={tmp_path}", f"llama-cpp={tmp_path / 'absent.gguf'}"):
        with pytest.raises(UsageError, match=r"write llama-cpp=FILE\.gguf"):
            parse_decoder_peers(text)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert parse_decoder_peers(f"llama-cpp={file}") == (DecoderPeer("llama-cpp", file),)


class LlamaLibrary:
    """The part of llama-cpp-python that the adapter uses; its tokens are counted, and its logits say which were read."""

    def __init__(self):
        self.read = []
        self.opened = None

    def Llama(self, **options):
        self.opened = options
        self.input_ids, self.n_tokens, self.ctx = np.zeros(options["n_ctx"], dtype=np.intc), 0, None
        return self

    def reset(self):
        self.n_tokens = 0

    def eval(self, tokens):
        self.input_ids[self.n_tokens : self.n_tokens + len(tokens)] = tokens  # an error where there is no room
        self.n_tokens += len(tokens)
        self.read.append(list(tokens))

    def generate(self, tokens, *, temp, repeat_penalty, reset):
        assert temp == 0.0
        assert repeat_penalty == 1.0
        assert reset
        self.eval(tokens)
        while True:
            yield 7
            self.eval([7])

    def n_vocab(self):
        return 3

    def llama_get_logits_ith(self, _context, place):
        assert place == -1
        return (ctypes.c_float * 3)(*map(float, self.input_ids[self.n_tokens - 3 : self.n_tokens]))


@pytest.fixture
def llama(monkeypatch, tmp_path):
    library = LlamaLibrary()
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    return library, LlamaCppDecoder(tmp_path / "model.gguf", threads=2, tokens=16)


def test_llama_cpp_steps_over_an_answer_again_and_again(llama):
    library, engine = llama
    assert library.opened["n_threads"] == library.opened["n_threads_batch"] == 2
    run = engine.write([1, 2, 3], [4, 5])
    run()
    run()
    assert library.read == [[1, 2, 3], [4], [5], [4], [5]]  # the prompt is read once, and nothing piles up behind it
    assert library.input_ids[:5].tolist() == [1, 2, 3, 4, 5]
    engine.write([9, 2, 3], [4])()
    assert library.read[-2:] == [[9, 2, 3], [4]]


def test_llama_cpp_keeps_nothing_between_prompts_and_answers_as_long_as_asked(llama):
    library, engine = llama
    engine.read([1, 2, 3])()
    engine.read([1, 2, 3])()
    assert library.read == [[1, 2, 3], [1, 2, 3]]
    library.read.clear()
    engine.answer([1, 2], 4)()
    assert library.read == [[1, 2], [7], [7], [7]]  # of the last token nothing is asked
    np.testing.assert_array_equal(engine.logits([5, 6, 8]), np.array([5, 6, 8], dtype=np.float32))


def test_peers_that_cannot_be_opened_say_so(tmp_path):
    def load():
        raise RuntimeError("no weights")

    own = FakeEngine(FakeClock(), 0.001)
    peers = (DecoderPeer("torch"), DecoderPeer("onnxruntime-genai", tmp_path))
    opened = open_decoders(peers, own, load, threads=1, prompts=[[1, 2]], most_tokens=8)
    assert opened.peers == ()
    assert opened.artifact.likeness is None
    assert [item.name for item in opened.absent] == ["torch", "onnxruntime-genai"]
    assert opened.absent[0].reason == "failed: RuntimeError: no weights"


def test_a_ladder_sums_the_shares_of_a_step_and_its_factors_multiply_to_the_total():
    clock = FakeClock()

    def takes(seconds):
        return lambda: clock.sleep(seconds)

    same = Share("fast", takes(0.125))
    rungs = [
        Rung("slow", (Share("short", takes(0.2), 2.0), Share("long", takes(0.4), 1.5)), "extrapolated"),
        Rung("middle", (Share("middle", takes(0.25)),)),
        Rung("fast", (same,)),
        Rung("the same", (same,), "the run of the step before"),
    ]
    rows = run_ladder(rungs, amount=8, watch=watch(clock))
    assert [row.timing.p50 for row in rows] == pytest.approx([1000, 250, 125, 125])
    assert [row.total for row in rows] == pytest.approx([1, 4, 8, 8])
    assert rows[0].factor is None
    assert [row.factor.ratio for row in rows[1:]] == pytest.approx([4, 2, 1])
    assert rows[0].cells() == ("1", "slow *", "1000 ms", "8.0", "", "1.00x")
    assert rows[2].cells() == ("3", "fast", "125 ms", "64.0", "2.00x", "8.00x")
    assert len(columns("tokens")) == len(rows[0].cells())


def test_a_step_that_was_not_stable_says_so_and_keeps_its_number():
    slow, fast = Timing((4.0,) * 6), Timing((1.0, 1.0, 2.0, 2.0, 4.0, 4.0))
    row = LadderRow(2, "what", "", fast, 8, compare(slow, fast), 2.0)
    assert row.cells()[2:] == ("2.00 ms (not stable)", "4000.0", "2.00x (not stable)", "2.00x")


def test_measured_lengths_stand_for_those_between_them():
    weights = interpolation_weights([10, 13, 16], 10, 7)
    assert sum(weights) == pytest.approx(7)
    # A time that grows with the length is met exactly.
    assert sum(weight * time for weight, time in zip(weights, [10, 13, 16], strict=True)) == pytest.approx(sum(range(10, 17)))


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    steady, unsteady = Timing((4.0,) * 6), Timing((1.0, 1.0, 2.0, 2.0, 4.0, 4.0))
    rows = [
        GenerationRow(Request(8, 2), part, "artifact", timing, None)
        for part, timing in (("prompt", steady), ("answer", unsteady))
    ]
    draw_generation(rows, tmp_path / "bars.png", title="tiny")
    way = [
        LadderRow(1, "slow", "extrapolated", steady, 8, None, 1.0),
        LadderRow(2, "fast", "", unsteady, 8, compare(steady, unsteady), 2.0),
        LadderRow(3, "slower", "", steady, 8, compare(unsteady, steady), 1.0),
    ]
    draw_ladder(way, tmp_path / "way.svg", title="tiny")
    assert (tmp_path / "bars.png").stat().st_size > 1000
    assert "<svg" in (tmp_path / "way.svg").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be written"):
        draw_ladder(way, tmp_path / "none" / "way.svg", title="tiny")


def test_float_graphs_that_are_gone_say_what_to_run(tmp_path):
    manifest = {
        "source": {"id": "tiny"},
        "stages": [
            {"stage": "export", "key": "0" * 64, "status": "done"},
            {"stage": "fuse", "key": "1" * 64, "status": "skipped"},
        ],
    }
    with cached_stages(manifest, tmp_path / "cache") as stages:
        found: dict[str, Artifact] = stages
    assert found == {}
    with pytest.raises(
        SettingsError, match=r"no longer holds the float graphs of this folder \(export\).*hfaccel compile tiny -o"
    ):
        check_stages(found, manifest, tmp_path)

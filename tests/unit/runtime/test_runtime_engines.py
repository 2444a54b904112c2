"""Both engines on one small graph; what happens where openvino is missing; what settings mean."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from hfaccel.artifact.contract import Contract, SessionSettings, TensorSpec, TextSettings
from hfaccel.artifact.load_test import load_test
from hfaccel.cli.run import run
from hfaccel.errors import IntegrityError, MissingExtraError, TargetError
from hfaccel.runtime.engines import EngineFallbackWarning, engine_available, open_graph
from hfaccel.runtime.load import load
from hfaccel.runtime.session import GraphSession

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="the package openvino is not installed")
OPENVINO = SessionSettings(1, engine="openvino")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """input_ids [batch, sequence] -> logits [batch, 2]: mean of token vectors, times a matrix."""
    random = np.random.default_rng(0)
    constants = {"table": random.normal(size=(300, 64)), "weight": random.normal(size=(64, 2))}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("ReduceMean", ["tokens", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["logits"]),
    ]
    made = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            *(numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()),
            numpy_helper.from_array(np.array([1], np.int64), "axes"),
        ],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


@pytest.fixture
def compiled(graph: Path, tokenizer_file: Path, text_settings: TextSettings) -> Path:
    """A folder whose manifest names openvino."""
    (graph.parent / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    contract = Contract(
        "text-classification",
        (TensorSpec("input_ids", "int64", ("batch", "sequence")),),
        (TensorSpec("logits", "float32", ("batch", 2)),),
        text_settings,
        ("bad", "good"),
    )
    session = asdict(replace(OPENVINO, inference_precision="bf16"))
    manifest = {"format_revision": 1, "contract": contract.to_json(), "session": session, "graph": "model.onnx"}
    (graph.parent / "manifest.json").write_text(json.dumps(manifest))
    return graph.parent


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package cannot be imported, as on a machine that does not have it."""
    monkeypatch.setitem(sys.modules, "openvino", None)


def ids(*shape: int, seed: int = 1) -> dict[str, Any]:
    return {"input_ids": np.random.default_rng(seed).integers(0, 300, size=shape)}


@needs_openvino
@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (3, 33)])
def test_both_engines_answer_alike(graph: Path, shape: tuple[int, int]) -> None:
    ours, theirs = open_graph(graph), open_graph(graph, OPENVINO)
    assert (theirs.input_names, theirs.output_names) == (ours.input_names, ours.output_names) == (("input_ids",), ("logits",))
    expected = ours.run(ids(*shape))["logits"]
    answer = theirs.run({**ids(*shape), "attention_mask": np.ones(shape, np.int64)})["logits"]
    assert (answer.shape, answer.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(answer, expected, atol=1e-5)


@needs_openvino
def test_bfloat16_is_close(graph: Path) -> None:
    settings = replace(OPENVINO, inference_precision="bf16")
    expected = open_graph(graph).run(ids(2, 8))["logits"]
    np.testing.assert_allclose(open_graph(graph, settings).run(ids(2, 8))["logits"], expected, atol=0.1)


@needs_openvino
def test_an_answer_survives_the_next_call(graph: Path) -> None:
    runner = open_graph(graph, OPENVINO)
    first = runner.run(ids(2, 8))["logits"]
    before = first.copy()
    second = runner.run(ids(2, 8, seed=2))["logits"]
    assert not np.shares_memory(first, second)
    assert not np.array_equal(before, second)
    np.testing.assert_array_equal(first, before)


@needs_openvino
def test_threads_do_not_mix_their_answers(graph: Path) -> None:
    runner, alone = open_graph(graph, OPENVINO), open_graph(graph)
    feeds = [ids(1 + number % 4, 2 + number % 7, seed=number) for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(runner.run, feeds))
    for given, answer in zip(feeds, answers, strict=True):
        np.testing.assert_allclose(answer["logits"], alone.run(given)["logits"], atol=1e-5)


@needs_openvino
def test_errors_of_openvino_say_what_to_do(graph: Path) -> None:
    with pytest.raises(IntegrityError, match="reads inputs that the run time does not make: input_ids"):
        open_graph(graph, OPENVINO).run({})
    graph.write_bytes(b"not a graph")
    with pytest.raises(IntegrityError, match=r"model\.onnx: openvino .* cannot open the graph: .*\(check the folder with"):
        open_graph(graph, OPENVINO)
    graph.unlink()
    with pytest.raises(IntegrityError, match="the graph file is missing"):
        open_graph(graph, OPENVINO)


@needs_openvino
def test_opening_a_graph_tells_nobody(graph: Path) -> None:
    code = (
        "import socket, sys\n"
        "from pathlib import Path\n"
        "def refuse(*arguments, **named): print('looks up', *arguments[:1])\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
        "from hfaccel.artifact.contract import SessionSettings\n"
        "from hfaccel.runtime.engines import open_graph\n"
        f"open_graph(Path({str(graph)!r}), SessionSettings(1, engine='openvino'))\n"
        "heavy = {'openvino_telemetry', 'torch', 'transformers', 'onnx'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in list(sys.modules)}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.usefixtures("without_openvino")
def test_a_missing_engine_is_replaced_with_a_warning(compiled: Path) -> None:
    assert not engine_available("openvino")
    with pytest.warns(EngineFallbackWarning) as caught:
        model = load(compiled)
    assert isinstance(model.runner, GraphSession)
    assert str(caught[0].message) == (
        "the model was compiled for openvino, which is not installed: onnxruntime runs it, with other speed and slightly other "
        "numbers than were measured (run: pip install 'hfaccel[openvino]')"
    )
    assert caught[0].filename == __file__
    assert model("the dog")[0]["label"] in ("bad", "good")


@pytest.mark.usefixtures("without_openvino")
def test_the_command_line_shows_the_replacement(compiled: Path) -> None:
    app = typer.Typer()
    app.command()(run)
    result = CliRunner().invoke(app, [str(compiled), "the dog", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: the model was compiled for openvino, which is not installed: onnxruntime runs it")
    assert json.loads(result.stdout)


@pytest.mark.usefixtures("without_openvino")
def test_opening_for_a_missing_engine_says_how_to_install_it(graph: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"needs the package 'openvino'.*pip install 'hfaccel\[openvino\]'"):
        open_graph(graph, OPENVINO)


def test_golden_answers_are_not_compared_with_those_of_another_engine(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text("import sys\nsys.modules['openvino'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(blocked))
    (compiled / "golden").mkdir()
    (compiled / "golden" / "inputs.json").write_text("[]")
    np.savez(compiled / "golden" / "outputs.npz")
    with pytest.raises(TargetError, match=r"golden answers hold for the engine that made them: .*openvino.* not installed"):
        load_test(compiled)


@needs_openvino
def test_a_folder_runs_in_the_engine_of_its_manifest(compiled: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert not isinstance(load(compiled).runner, GraphSession)
    assert not [item for item in recwarn if item.category is EngineFallbackWarning]


@pytest.mark.parametrize("which", ["engine", "encoder_engine"])
def test_an_unknown_engine_is_refused(compiled: Path, which: str) -> None:
    manifest = json.loads((compiled / "manifest.json").read_text())
    manifest["session"][which] = "abacus"
    (compiled / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"does not know the engine 'abacus' .*known engines: onnxruntime, openvino"):
        load(compiled)


def test_settings_survive_the_manifest_and_old_manifests_are_read() -> None:
    settings = SessionSettings(2, False, ("SkipLayerNormFusion",), "openvino", "bf16", False, "basic", True)
    assert SessionSettings.from_json(json.loads(json.dumps(asdict(settings)))) == settings
    old = {"intra_op_num_threads": 2, "allow_spinning": True, "disabled_optimizers": ["GeluFusion"]}
    assert SessionSettings.from_json(old) == SessionSettings(2, True, ("GeluFusion",))
    assert SessionSettings.from_json({}) == SessionSettings()


@pytest.mark.parametrize(
    "settings",
    [
        SessionSettings(enable_cpu_mem_arena=False),
        SessionSettings(flush_denormals=True),
        *(SessionSettings(graph_optimization_level=level) for level in ("disabled", "basic", "extended", "layout", "all")),
    ],
)
def test_session_settings_do_not_change_the_answer(graph: Path, settings: SessionSettings) -> None:
    expected = open_graph(graph).run(ids(2, 8))["logits"]
    np.testing.assert_allclose(open_graph(graph, settings).run(ids(2, 8))["logits"], expected, atol=1e-5)


def test_onnxruntime_refuses_bfloat16(graph: Path) -> None:
    with pytest.raises(IntegrityError, match="onnxruntime computes float graphs in float32, not in bf16"):
        open_graph(graph, SessionSettings(inference_precision="bf16"))

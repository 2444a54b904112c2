"""Steps of several rows run on the graph for prompts only where accuracy was shown and it was timed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hfaccel
from hfaccel.artifact.contract import Contract, SessionSettings
from hfaccel.pipeline import CompileResult
from hfaccel.runtime.generation.decoder import Decoder
from hfaccel.stages import many_rows
from hfaccel.stages.many_rows import with_prompt_graph_rows

OFF_TARGET = "cpu-arm-dotprod"
LADDER = (
    "quantize.ladder=[{name: eight, scheme: weight-only, graph: fused, block_size: 32, quantize_embeddings: true, rotate: auto, "
    "prompt_graph: true}]"
)


@pytest.fixture(scope="module")
def compiled(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> CompileResult:
    return hfaccel.compile(
        tiny_decoder,
        output=tmp_path_factory.mktemp("many-rows") / "out",
        task="text-generation",
        target=OFF_TARGET,
        precision="int8",
        overrides=(LADDER,),
        max_loss=0.5,
    )


def rows_of(compiled: CompileResult, *, verdict: dict[str, Any] | None, on_target: bool = True) -> int | None:
    contract = Contract.from_json(compiled.manifest["contract"])
    recipe = SimpleNamespace(accuracy=SimpleNamespace(max_loss=0.01), seed=0)
    ctx: Any = SimpleNamespace(on_target=on_target, recipe=recipe)
    chosen: Any = SimpleNamespace(verdict=verdict)
    assert contract.generation is not None
    decoder = Decoder(compiled.folder / compiled.manifest["graph"], SessionSettings(), contract.generation)
    generation = with_prompt_graph_rows(contract, decoder, chosen, ctx).generation
    assert generation is not None
    return generation.prompt_graph_rows


def test_what_the_graph_for_prompts_loses_alone_is_measured_and_off_the_target_nothing_is_timed(compiled: CompileResult) -> None:
    lost = compiled.manifest["candidates"][0]["verdict"]["many_rows"]
    assert lost["metric"] == "perplexity"
    assert abs(lost["loss"]) < 0.5
    assert compiled.manifest["contract"]["generation"]["prompt_graph_rows"] is None
    assert (compiled.folder / "prompt.onnx.data").is_file()
    answers = hfaccel.load(compiled.folder).generate(["one", "two", "three", "four", "five"], max_new_tokens=3)
    assert len(answers) == 5


@pytest.mark.parametrize(
    ("speedups", "rows"),
    [({16: 1.3, 8: 1.2, 4: 1.1}, 4), ({16: 1.3, 8: 1.0, 4: 1.2}, 16), ({16: 1.0, 8: 1.5, 4: 1.5}, None)],
)
def test_as_few_rows_as_are_faster_like_all_that_are_more(
    compiled: CompileResult, monkeypatch: pytest.MonkeyPatch, speedups: dict[int, float], rows: int | None
) -> None:
    monkeypatch.setattr(many_rows, "_speedup", lambda _decoder, _settings, rows, seed: speedups[rows])
    assert rows_of(compiled, verdict={"many_rows": {"upper_bound": 0.009}}) == rows


def test_nobody_is_timed_who_loses_more_than_the_budget(compiled: CompileResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_rows, "_speedup", lambda *_arguments, **_options: pytest.fail("timed"))
    for verdict in (None, {"many_rows": None}, {"many_rows": {"upper_bound": 0.011}}):
        assert rows_of(compiled, verdict=verdict) is None
    assert rows_of(compiled, verdict={"many_rows": {"upper_bound": 0.009}}, on_target=False) is None


def test_it_is_really_timed(compiled: CompileResult) -> None:
    assert rows_of(compiled, verdict={"many_rows": {"upper_bound": 0.009}}) in (None, 4, 8, 16)

"""The command line of compile, that of plan and the keywords of hfaccel.compile are one set of options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import hfaccel
from hfaccel.api import SilentProgress
from hfaccel.cli import options
from hfaccel.cli.compile import compile_command
from hfaccel.cli.plan import plan
from hfaccel.errors import UsageError
from hfaccel.request import CompileRequest, recipe_settings

# Options that Python names otherwise: several values, a keyword of Python, a denial.
RENAMED = {
    "p95": "max_p95_ms",
    "max_size": "max_size_bytes",
    "column": "columns",
    "engine": "engines",
    "set_": "overrides",
    "no_cache": "use_cache",
}


NOTHING: dict[str, Any] = dict.fromkeys(inspect.signature(recipe_settings).parameters)


def names(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_plan_takes_what_compile_takes() -> None:
    assert inspect.signature(plan).parameters == inspect.signature(compile_command).parameters


def test_python_takes_what_the_command_line_takes() -> None:
    assert {RENAMED.get(name, name) for name in names(compile_command) - {"json"}} == names(hfaccel.compile) - {"progress"}


def test_every_option_reaches_the_request() -> None:
    settings = {"max_loss", "objective", "workload", "precision", "budget", "engines", "threads", "max_p95_ms", "max_size_bytes"}
    assert names(hfaccel.compile) - {"progress"} - settings == names(CompileRequest) - {"settings"}
    assert settings == names(recipe_settings)


def test_options_are_read(tmp_path: Any) -> None:
    request = options.make_request(
        model="m",
        output=tmp_path,
        task=None,
        revision="main",
        target="auto",
        recipe=None,
        overrides=["seed=1"],
        data=None,
        calibration=None,
        columns=["text=body"],
        metric="f1",
        max_loss="2%",
        objective=None,
        workload="1x16, 8x128",
        precision="int8",
        engine="onnxruntime, openvino",
        budget="10m",
        threads=4,
        p95="20ms",
        max_size="50MB",
        strict=True,
        force=False,
        no_cache=True,
        trust_remote_code=False,
        allow_pickle=True,
    )
    assert request.settings == {
        "accuracy.max_loss": 0.02,
        "measure.workload": ["1x16", "8x128"],
        "quantize.precision": "int8",
        "quantize.engines": ["onnxruntime", "openvino"],
        "quantize.search_seconds": 600.0,
        "quantize.fallback": "thorough",
        "measure.threads": 4,
        "measure.max_p95_ms": 20.0,
        "measure.max_size_bytes": 50_000_000,
    }
    assert (request.columns, request.overrides, request.use_cache) == ({"text": "body"}, ("seed=1",), False)
    assert (request.strict, request.allow_pickle, request.trust_remote_code, request.revision) == (True, True, False, "main")


def test_a_workload_may_be_a_sequence() -> None:
    one = recipe_settings(**{**NOTHING, "workload": "1x16,8x128"})
    assert one == recipe_settings(**{**NOTHING, "workload": ("1x16", "8x128")})


@pytest.mark.parametrize(
    ("given", "engines"),
    [
        ("auto", "auto"),
        ("openvino", ["openvino"]),
        (("onnxruntime", "openvino"), ["onnxruntime", "openvino"]),
        (["auto"], "auto"),
    ],
)
def test_engines_are_names_or_auto(given: Any, engines: Any) -> None:
    assert recipe_settings(**{**NOTHING, "engines": given}) == {"quantize.engines": engines}


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("50MB", 50_000_000), ("1.5GB", 1_500_000_000), ("48MiB", 48 << 20), ("900", 900)]
)
def test_sizes_are_read_with_their_unit(text: str, size_bytes: int) -> None:
    assert options.parse_size(text, option="--max-size") == size_bytes


@pytest.mark.parametrize(("text", "seconds"), [("20ms", 0.02), ("90", 90), ("90s", 90), ("10m", 600), ("1h", 3600)])
def test_times_are_read_with_their_unit(text: str, seconds: float) -> None:
    assert options.parse_duration(text, option="--budget") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "MB", "fifty", "-1MB", "0", "50mb", "nanMB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-size"):
        options.parse_size(text, option="--max-size")


@pytest.mark.parametrize("text", ["lots", "0", "100%", "-1%", "1.5"])
def test_a_budget_that_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-loss: "):
        options.parse_share(text, option="--max-loss")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200)])
def test_times_are_read(text: str, seconds: float) -> None:
    assert options.parse_duration(text, option="--budget") == seconds


@pytest.mark.parametrize("text", ["", "soon", "0m", "-5s", "infh", "m"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--budget: "):
        options.parse_duration(text, option="--budget")


def test_python_hears_of_problems_as_the_command_line_does(tmp_path: Any) -> None:
    progress = SilentProgress()
    with pytest.raises(hfaccel.errors.HfaccelError) as caught:
        hfaccel.compile(tmp_path / "nothing", output=tmp_path / "out", metric="guess", progress=progress)  # type: ignore[arg-type]
    assert "metric: unknown metric 'guess'" in str(caught.value)
    assert "nothing" in str(caught.value)

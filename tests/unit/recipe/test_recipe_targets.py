from __future__ import annotations

import pytest

from hfaccel.errors import ExitCode, TargetError
from hfaccel.recipe.load import load_recipe
from hfaccel.recipe.targets import TARGETS, adapt_recipe, detect_host, profile_of, resolve_target
from hfaccel.recipe.weight_format import WeightFormat

BY_NAME = {target.name: target for target in TARGETS}
AVX512 = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}


def test_weights_are_scaled_for_products_that_saturate() -> None:
    recipe = load_recipe("encoder").recipe
    adapted, notices = adapt_recipe(recipe, BY_NAME["cpu-avx2"])
    assert adapted.quantize.weights == WeightFormat(8, sums_in_16_bits=True)
    wanted = (
        "target cpu-avx2: weights are scaled so that sums of 8 bit products fit into 16 bits, which CPUs without VNNI add them in"
    )
    assert notices == (wanted,)
    assert adapt_recipe(adapted, BY_NAME["cpu-avx2"]) == (adapted, ())


def test_who_asks_for_seven_bits_gets_them() -> None:
    recipe = load_recipe("encoder", sets={"quantize.weight_bits": 7}).recipe
    assert adapt_recipe(recipe, BY_NAME["cpu-avx2"]) == (recipe, ())


@pytest.mark.parametrize("name", ["cpu-avx512-vnni", "cpu-amx", "cpu-arm-neon", "cuda"])
def test_eight_bits_elsewhere(name: str) -> None:
    recipe = load_recipe("encoder").recipe
    assert adapt_recipe(recipe, BY_NAME[name]) == (recipe, ())


@pytest.mark.parametrize(
    ("machine", "features", "profile"),
    [
        ("x86_64", set(), "cpu-generic"),
        ("x86_64", {"avx2", "fma"}, "cpu-avx2"),
        ("x86_64", {"avx2", "fma", "avx_vnni"}, "cpu-avx2-vnni"),
        ("x86_64", AVX512, "cpu-avx512"),
        ("x86_64", AVX512 | {"avx512_vnni", "avx_vnni"}, "cpu-avx512-vnni"),
        ("x86_64", AVX512 | {"avx512_vnni", "avx512_bf16"}, "cpu-avx512-bf16"),
        ("x86_64", AVX512 | {"avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"}, "cpu-amx"),
        ("aarch64", {"asimd"}, "cpu-arm-neon"),
        ("aarch64", {"asimd", "asimddp"}, "cpu-arm-dotprod"),
        ("riscv64", set(), "cpu-generic"),
    ],
)
def test_profile_of_features(machine: str, features: set[str], profile: str) -> None:
    assert profile_of(machine, frozenset(features)) == profile


def test_auto_is_this_host() -> None:
    target, on_target = resolve_target("auto")
    assert on_target
    assert target.name == detect_host().profile
    assert resolve_target(target.name) == (target, True)


def test_another_profile_is_a_cross_compile() -> None:
    other = "cpu-generic" if detect_host().profile != "cpu-generic" else "cpu-avx2"
    assert resolve_target(other) == (BY_NAME[other], False)


def test_cuda_without_its_provider_is_a_cross_compile() -> None:
    import onnxruntime

    assert resolve_target("cuda") == (BY_NAME["cuda"], "CUDAExecutionProvider" in onnxruntime.get_available_providers())


def test_unknown_target() -> None:
    with pytest.raises(TargetError) as caught:
        resolve_target("cpu-avx512-vni")
    assert str(caught.value) == "--target: unknown target 'cpu-avx512-vni' (did you mean 'cpu-avx512-vnni'?)"
    assert caught.value.exit_code is ExitCode.TARGET


def test_host_has_numbers_and_no_name() -> None:
    import socket

    host = detect_host()
    assert host.logical_cores >= host.physical_cores >= 1
    assert host.memory_bytes > 0
    assert socket.gethostname() not in (host.os, host.brand, host.microarchitecture)

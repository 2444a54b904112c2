"""Where an artifact will run: a literal table of profiles, and the profile of this host."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Literal

from hfaccel.errors import TargetError
from hfaccel.recipe.closest import did_you_mean
from hfaccel.recipe.schema import Recipe

Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider"]


@dataclass(frozen=True)
class TargetProfile:
    """What the compiler must know about the machine that will serve.

    Attributes:
        name: name on the command line.
        description: one line for people.
        machine: instruction set family (``x86_64``, ``aarch64``); empty when any will do.
        features: CPU features that the profile requires, named as archspec names them.
        int8_dot: whether 8 bit dot products add up in 32 bit (VNNI, AMX, dotprod).
        saturates: whether u8 x s8 products saturate in 16 bit, so that weights must be scaled for that.
        bf16: whether bfloat16 matrix products run in hardware.
        provider: execution provider of onnxruntime.
    """

    name: str
    description: str
    machine: str
    features: tuple[str, ...]
    int8_dot: bool
    saturates: bool
    bf16: bool
    provider: Provider


_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_CPU: Provider = "CPUExecutionProvider"


def _cpu(
    name: str, description: str, machine: str, features: tuple[str, ...], *, int8_dot: bool, saturates: bool, bf16: bool = False
) -> TargetProfile:
    return TargetProfile(name, description, machine, features, int8_dot, saturates, bf16, _CPU)


# Within one machine family the order is from the least to the most able: the last profile whose features the host has is its own.
TARGETS: tuple[TargetProfile, ...] = (
    # May be an x86 CPU whose byte products saturate, so it is treated as one.
    _cpu("cpu-generic", "any CPU", "", (), int8_dot=False, saturates=True),
    _cpu("cpu-avx2", "x86 with AVX2", "x86_64", _AVX2, int8_dot=False, saturates=True),
    _cpu("cpu-avx2-vnni", "x86 with AVX2 and AVX-VNNI", "x86_64", (*_AVX2, "avx_vnni"), int8_dot=True, saturates=False),
    _cpu("cpu-avx512", "x86 with AVX-512, no VNNI", "x86_64", _AVX512, int8_dot=False, saturates=True),
    _cpu("cpu-avx512-vnni", "x86 with AVX-512 and VNNI", "x86_64", (*_AVX512, "avx512_vnni"), int8_dot=True, saturates=False),
    _cpu(
        "cpu-avx512-bf16",
        "x86 with AVX-512, VNNI and bf16",
        "x86_64",
        (*_AVX512, "avx512_vnni", "avx512_bf16"),
        int8_dot=True,
        saturates=False,
        bf16=True,
    ),
    _cpu(
        "cpu-amx",
        "x86 with AMX (int8 and bf16)",
        "x86_64",
        (*_AVX512, "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"),
        int8_dot=True,
        saturates=False,
        bf16=True,
    ),
    _cpu("cpu-arm-neon", "64 bit Arm with Neon", "aarch64", ("asimd",), int8_dot=False, saturates=False),
    _cpu("cpu-arm-dotprod", "64 bit Arm with dot product", "aarch64", ("asimd", "asimddp"), int8_dot=True, saturates=False),
    TargetProfile("cuda", "NVIDIA GPU", "", (), int8_dot=True, saturates=False, bf16=True, provider="CUDAExecutionProvider"),
)


@dataclass(frozen=True)
class HostInfo:
    """This machine, without anything that identifies it.

    Attributes:
        profile: name of the most able CPU profile that fits.
        brand: the CPU's own name.
        microarchitecture: archspec's name; a generic one (``x86_64_v4``) where a virtual machine hides features.
        features: CPU features.
        physical_cores: cores that this machine has.
        logical_cores: hardware threads that this machine has.
        memory_bytes: main memory.
        os: operating system and release.
        python: version of Python.
    """

    profile: str
    brand: str
    microarchitecture: str
    features: tuple[str, ...]
    physical_cores: int
    logical_cores: int
    memory_bytes: int
    os: str
    python: str


def detect_host() -> HostInfo:
    """Look at this machine; takes some 100 ms for the import of archspec."""
    import archspec.cpu
    import archspec.cpu.detect
    import psutil

    host = archspec.cpu.host()
    # A virtual machine can hide one feature of its CPU; archspec's host is then a generic one without VNNI, though the CPU
    # has it. The features as detected tell the truth.
    features = frozenset(archspec.cpu.detect.detected_info().features) | frozenset(host.features)
    logical = psutil.cpu_count(logical=True) or 1
    return HostInfo(
        profile=profile_of(str(host.family), features),
        brand=archspec.cpu.brand_string() or platform.processor() or "unknown",
        microarchitecture=host.name,
        features=tuple(sorted(features)),
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        memory_bytes=psutil.virtual_memory().total,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def profile_of(machine: str, features: frozenset[str]) -> str:
    """The most able CPU profile that a machine family with these CPU features fulfils."""
    fitting = [
        target.name
        for target in TARGETS
        if target.provider == _CPU and target.machine in ("", machine) and features.issuperset(target.features)
    ]
    return fitting[-1]


def resolve_target(name: str) -> tuple[TargetProfile, bool]:
    """The profile of a name (``auto``: of this host), and whether this host is that target, so that timings here count.

    A host that could run the artifact but has another profile is not the target: its kernels and their speed differ.

    Raises:
        TargetError: the name is unknown.
    """
    profiles = {target.name: target for target in TARGETS}
    if name == "auto":
        return profiles[detect_host().profile], True
    if name not in profiles:
        raise TargetError(f"unknown target '{name}'", where="--target", hint=did_you_mean(name, [*profiles, "auto"]))
    target = profiles[name]
    if target.provider == _CPU:
        return target, detect_host().profile == name
    import onnxruntime  # 100 ms that CPU targets do not need

    return target, target.provider in onnxruntime.get_available_providers()


def adapt_recipe(recipe: Recipe, target: TargetProfile) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe as it must be for a target, and a notice for each change."""
    quantize = recipe.quantize
    if not target.saturates or quantize.weights.for_saturating_target or not quantize.enabled:
        return recipe, ()
    notice = f"target {target.name}: weights are scaled so that sums of 8 bit products fit into 16 bits, which CPUs without VNNI add them in"
    return recipe.model_copy(update={"quantize": quantize.model_copy(update={"sums_in_16_bits": True})}), (notice,)

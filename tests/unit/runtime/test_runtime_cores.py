"""How many cores count: those that affinity, and the limit of a container, leave to the process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from hfaccel.runtime.cores import cpu_quota, logical_cores, physical_cores, threads_to_open_with


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A file system with these control groups."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "350000 100000\n"}, 3.5),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        # The limit of a group above holds as well; the tighter one counts.
        (
            "0::/user.slice/work.service\n",
            {
                "sys/fs/cgroup/user.slice/work.service/cpu.max": "max 100000\n",
                "sys/fs/cgroup/user.slice/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/cpu.max": "600000 100000\n",
            },
            2.0,
        ),
        # Version 1 in a container: the path is that of the host, the files lie where the group is mounted.
        (
            "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:name=systemd:/docker/ab\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            "4:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "what is this\n"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_the_limit_of_a_container_is_read(groups: str, files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    assert cpu_quota(machine(tmp_path, groups, files)) == cores


def test_a_system_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (1.9, 1), (2.0, 2), (64.0, 4), (None, 4)])
def test_a_limit_leaves_whole_cores_and_at_least_one(quota: float | None, cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfaccel.runtime.cores.cpu_quota", lambda: quota)
    monkeypatch.setattr("hfaccel.runtime.cores.logical_cores", lambda: 8)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    assert physical_cores() == cores
    assert threads_to_open_with() == (0 if cores == 4 else cores)  # without a limit that binds the engine chooses


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or logical_cores() < 2, reason="needs two cores and affinity")
def test_affinity_counts_and_is_left_to_the_engine() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += (
        "from hfaccel.runtime.cores import physical_cores, threads_to_open_with\nprint(physical_cores(), threads_to_open_with())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["1", "0"]

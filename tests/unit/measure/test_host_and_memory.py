from __future__ import annotations

import json
import time

import numpy as np

from hfaccel.measure.host import CpuUse, busy_warning, host_fingerprint, load_average, logical_cores, physical_cores
from hfaccel.measure.memory import PeakMemory, available_memory_bytes, peak_memory_bytes, resident_bytes

MEBIBYTE = 1024 * 1024


def uses(*readings: CpuUse):
    return iter(readings).__next__


def test_the_fingerprint_names_the_machine_and_does_not_change():
    fingerprint = host_fingerprint()
    assert set(fingerprint) == {"cpu", "machine", "physical_cores", "logical_cores", "os"}
    assert all(fingerprint.values())
    assert json.loads(json.dumps(fingerprint)) == host_fingerprint()
    assert 1 <= physical_cores() <= logical_cores()


def test_the_load_average_is_a_count_where_there_is_one():
    load = load_average()
    assert load is None or load >= 0


def test_other_processes_on_the_cores_are_warned_about():
    busy_s = 0.5 * logical_cores()
    warning = busy_warning(read=uses(CpuUse(0.0, 100.0, 5.0), CpuUse(1.0, 100.0 + busy_s, 5.0)), sleep=lambda _: None)
    assert warning == f"other processes use {busy_s:.1f} of {logical_cores()} cores: timings may be unstable"


def test_our_own_work_is_no_reason_to_warn():
    busy_s = float(logical_cores())
    assert (
        busy_warning(read=uses(CpuUse(0.0, 100.0, 5.0), CpuUse(1.0, 100.0 + busy_s, 5.0 + busy_s)), sleep=lambda _: None) is None
    )


def test_the_peak_covers_what_was_given_back():
    with PeakMemory(interval_s=0.001) as memory:
        block = np.ones(64 * MEBIBYTE, dtype=np.uint8)
        give_up_at = time.monotonic() + 30
        while memory.grown_bytes < 48 * MEBIBYTE and time.monotonic() < give_up_at:
            time.sleep(0.001)
        del block
    assert memory.grown_bytes >= 48 * MEBIBYTE
    assert memory.peak_bytes == memory.start_bytes + memory.grown_bytes


def test_the_peak_of_the_process_is_not_below_what_it_uses_now():
    assert peak_memory_bytes() >= resident_bytes() - 16 * MEBIBYTE


def test_available_memory_is_positive():
    assert available_memory_bytes() > 0

"""Memory of a step: tensors alive at once, the allocator, pages that the system makes."""

from __future__ import annotations

import resource

import torch

from benchmarks.step_cost.allocator import VARIABLES, allocator_settings, page_faults
from benchmarks.step_cost.peak_memory import LiveTensors


def test_live_tensors_count_what_is_alive_at_once():
    x = torch.zeros(100)
    with LiveTensors([x, x.view(10, 10)]) as live:
        assert live.peak == 400  # one storage, seen twice
        a = x + 1
        b = a.view(4, 25)
        del a
        b.mul_(2)
        assert live.peak == 800
        del b
        c = x + 2
        assert live.peak == 800
        d = torch.cat([c, x])
    assert live.peak == 1600 and d.numel() == 200


def test_what_the_environment_says_of_the_allocator(monkeypatch):
    for name in (*VARIABLES, "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    assert allocator_settings() == {}
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "9")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2:/opt/other.so")
    assert allocator_settings() == {"MALLOC_TRIM_THRESHOLD_": "9", "LD_PRELOAD": "libjemalloc.so.2 other.so"}


def test_pages_that_a_step_makes_the_system_make():
    """64 MiB are more than glibc hands out without asking the system, whatever its settings were when it started."""
    size, huge_page = 64 * 2**20, 512 * resource.getpagesize()
    held = []
    found = page_faults(lambda: held.append(b"1" * size))
    assert found >= size // huge_page and page_faults(lambda: None) < found

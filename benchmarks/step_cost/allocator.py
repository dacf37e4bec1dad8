"""How a process gets memory from the system, which can take a good part of a training step on CPU.

By default glibc hands freed memory back, and the next step may have its pages made anew, one fault each.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")


def allocator_settings() -> dict[str, str]:
    """What the environment says about the allocator, and libraries it preloads; empty: glibc with its defaults."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    preloaded = [Path(path).name for path in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()]
    return found | ({"LD_PRELOAD": " ".join(preloaded)} if preloaded else {})


def keeps_memory(settings: dict[str, str]) -> bool:
    """Whether glibc is told to keep what is freed."""
    return {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} <= set(settings)


def page_faults(step: Callable[[], object]) -> int:
    """Pages that the system had to make during one call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

"""Read how much memory a process has, where the system says so (Linux)."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """Return the memory of this process that is in RAM, mapped files included; `None` where it is not known."""
    return _field("VmRSS")


def peak_bytes() -> int | None:
    """Return the most it was since [`forget_peak`]."""
    return _field("VmHWM")


def forget_peak() -> None:
    """Let the peak begin anew from what is in memory now."""
    try:
        CLEAR.write_text("5")
    except OSError:  # another system: nothing is known there
        pass


def _field(name: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)

"""The conversions that are compared, and constants that measurements and page share."""

from __future__ import annotations

from typing import Any

MODULE = "benchmarks.float_function.measure"
"""The script that makes the results and the page."""
CALIBRATION_BATCHES = 2
RHO = 0.05

CONVERSIONS: dict[str, dict[str, Any]] = {
    "W8 per tensor": {"weight_bits": 8, "activation_bits": None},
    "W8 per channel": {"weight_bits": 8, "activation_bits": None, "weight_granularity": "channel"},
    "A8": {"weight_bits": None, "activation_bits": 8},
    "W8A8 per channel": {"weight_bits": 8, "activation_bits": 8, "weight_granularity": "channel"},
    "W8A8 per channel, LSQ+": {
        "weight_bits": 8,
        "activation_bits": 8,
        "weight_granularity": "channel",
        "quantizer": "lsq_plus",
    },
    "W4A4 per channel": {"weight_bits": 4, "activation_bits": 4, "weight_granularity": "channel"},
}


def file_name(conversion: str) -> str:
    return conversion.lower().replace(",", "").replace("+", "_plus").replace(" ", "-")

"""Read what a user writes for a budget of bits: a number with a unit, a part of what there is, or uniform bits."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

UNITS = ("bops", "bytes")
_FORMS = "such as '0.8x' (of the bit operations), '0.8x bytes' (of the packed weights), '3 bits', '1.5e9 bops'"


class BitBudget(NamedTuple):
    """Holds a budget as `hf_saq.analysis.allocate_bits` takes it: `amount` is a number, `"0.8x"` or `"3 bits"`."""

    amount: float | str
    unit: str


def read_bit_budget(where: str, text: Any) -> BitBudget:
    """Read a budget.

    Args:
        where: Name of the setting, for messages.
        text: A number and `bops` or `bytes`; or a factor, `0.8x`, of what the model costs, in bit operations unless a
            unit follows; or `3 bits`, what it costs with 3 bits wherever there is a choice.

    Raises:
        ValueError: If it is none of these.
    """
    number = r"(\d+(?:\.\d*)?(?:e\+?\d+)?|\.\d+)"
    found = (
        re.fullmatch(rf"{number}\s*(x|bits)?\s*({'|'.join(UNITS)})?", text.strip(), re.IGNORECASE)
        if isinstance(text, str)
        else None
    )
    if found is not None and float(found[1]) > 0:
        kind, unit = (found[2] or "").lower(), (found[3] or "").lower()
        if kind == "x":
            # Write powers of ten out: what comes after reads plain factors.
            return BitBudget(f"{float(found[1]):.12f}".rstrip("0").rstrip(".") + "x", unit or UNITS[0])
        if kind == "bits" and found[1].isdigit():
            return BitBudget(f"{found[1]} bits", unit or UNITS[0])
        if not kind and unit:
            return BitBudget(float(found[1]), unit)
    if isinstance(text, str) and re.fullmatch(rf"{number}\s*x?\s*(ns|us|ms|s)", text.strip(), re.IGNORECASE):
        raise ValueError(
            f"{where}={text!r} is a budget of time, which needs a table of the machine that the model is for. Measure "
            "it with hf_saq.analysis.measure_latencies, give bits by allocate_bits(unit='ns', latencies=...), and "
            "quantize with allocation.applied_to(config)."
        )
    raise ValueError(f"{where}={text!r}; expected a budget {_FORMS}, or a number of bytes, '250000 bytes'.")

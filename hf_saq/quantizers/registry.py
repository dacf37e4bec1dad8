"""List the quantizers by name. A new quantizer is one file and one line here."""

from __future__ import annotations

from .contract import Quantizer
from .methods.dorefa import DoReFaQuantizer
from .methods.liq import LIQQuantizer
from .methods.lsq import LSQQuantizer
from .methods.lsq_plus import LSQPlusQuantizer
from .methods.pact import PACTQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "lsq": LSQQuantizer,
    "lsq_plus": LSQPlusQuantizer,
    "liq": LIQQuantizer,
    "pact": PACTQuantizer,
    "dorefa": DoReFaQuantizer,
}


def quantizer_class(name: str) -> type[Quantizer]:
    """Return the class registered as `name`. Raises `ValueError` with the known names otherwise."""
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer={name!r} is unknown; expected one of {sorted(QUANTIZERS)}.")
    return QUANTIZERS[name]


def check_activation_mode(where: str, quantizer: str, mode: str) -> None:
    """Raise `ValueError` if the quantizer registered as `quantizer` cannot do the `activation_mode` called `mode`.

    Args:
        where: What the message starts with: the place where the two were set.
    """
    modes = quantizer_class(quantizer).activation_modes
    if mode not in modes:
        able = sorted(name for name, kind in QUANTIZERS.items() if mode in kind.activation_modes)
        raise ValueError(
            f"{where}activation_mode={mode!r} is not possible with quantizer={quantizer!r}; expected one of "
            f"{list(modes)}, or a quantizer that can do it: {able}."
        )

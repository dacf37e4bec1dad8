"""Run a model while observers see what its quantizers would get, and fit quantizers to it, alike on all processes."""

from .alike import fit_alike, names_of_first_process, reshard
from .batch_inputs import check_keys, check_positions
from .observers import ActivationObserver, PassThrough
from .running import run_in_float, run_observed, run_on_device, run_quantized

__all__ = [
    "ActivationObserver",
    "PassThrough",
    "check_keys",
    "check_positions",
    "fit_alike",
    "names_of_first_process",
    "reshard",
    "run_in_float",
    "run_observed",
    "run_on_device",
    "run_quantized",
]

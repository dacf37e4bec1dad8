"""No tensor becomes float64 on a device that may have no such numbers, as Apple's has not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from quantized_models import quantized
from tiny_models import images

import hf_saq
from hf_saq.quantizers import in_double

ROOMS = ("quantizers", "layers", "sharpness", "conversion", "analysis", "training")
"""Those that compute on the device of a model; exports and timing do on the CPU."""
DOUBLES = re.compile(r"\.double\(\)|float64")
ON_CPU = re.compile(
    r"\.cpu\(\)\.double\(\)|device=\"cpu\"|\"device\": \"cpu\"|in float64|to float64|\"mps\"|where_double_is"
)
KNOWN = {
    "conversion/observing/alike.py": "what processes send each other, which `mps` has not",
    "sharpness/rounding.py": "sums that have been moved to the CPU",
    "quantizers/kernels/eager.py": "numbers of NumPy, which no device holds",
}


def test_float64_is_asked_for_on_the_cpu_alone():
    package = Path(hf_saq.__file__).parent
    found = {}
    for file in (path for room in ROOMS for path in (package / room).rglob("*.py")):
        name = file.relative_to(package).as_posix()
        wide = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if DOUBLES.search(line)]
        if others := [line for line in wide if not ON_CPU.search(line)]:
            found[name] = others
    assert found.keys() == KNOWN.keys(), {name: lines for name, lines in found.items() if name not in KNOWN}


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
def test_a_model_is_quantized_on_it():
    model = quantized().to("mps")
    assert torch.isfinite(model(images().to("mps")).logits).all()


def test_in_double_keeps_values():
    x = torch.tensor([1.0, 2.0**-24], dtype=torch.float32)
    assert in_double(x).dtype == torch.float64 and in_double(x)[1] == 2.0**-24
    assert in_double(x.to("meta")).device.type == "meta"

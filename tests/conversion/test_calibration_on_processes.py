"""Two processes that calibrate on different streams end with the values and signs of the first."""

from __future__ import annotations

import pytest
import torch
from minimizer_nets import linear_net
from processes import SUPPORT, run_python

from hf_saq import SAQQuantizationConfig, calibrate, quantize


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("calibration")
    run_python(SUPPORT / "calibration_worker.py", output, processes=2)
    return [torch.load(output / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "fsdp2"])
@pytest.mark.parametrize("quantizer", ["lsq", "lsq_plus", "pact"])
def test_all_processes_have_what_the_first_one_found(quantizer: str, sharded: bool, results):
    first, second = (result[quantizer, sharded] for result in results)
    assert torch.equal(first["logits"], second["logits"])
    alone = quantize(linear_net().eval(), SAQQuantizationConfig(quantizer=quantizer))
    calibrate(alone, [torch.randn(32, 12, generator=torch.Generator().manual_seed(0))])
    for name, value in alone.state_dict().items():
        assert torch.equal(first["state"][name], value) and torch.equal(second["state"][name], value), name

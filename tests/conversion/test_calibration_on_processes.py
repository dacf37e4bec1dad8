"""Two processes that calibrate on different streams end with the values and signs of the first."""

from __future__ import annotations

import pytest
import torch
from calibration_worker import own_data
from minimizer_nets import linear_net
from own_quantizer import PowerOfTwo
from processes import SUPPORT, run_python

from hf_saq import SAQQuantizationConfig, calibrate, correct_biases, quantize
from hf_saq.quantizers import QUANTIZERS


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    output = tmp_path_factory.mktemp("calibration")
    run_python(SUPPORT / "calibration_worker.py", output)
    return [torch.load(output / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "fsdp2"])
@pytest.mark.parametrize("quantizer", ["lsq", "lsq_plus", "pact", "power_of_two"])
def test_all_processes_have_what_the_first_one_found(quantizer: str, sharded: bool, results, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "power_of_two", PowerOfTwo)  # whose values are buffers
    first, second = (result[quantizer, sharded] for result in results)
    assert torch.equal(first["logits"], second["logits"])
    alone = quantize(linear_net().eval(), SAQQuantizationConfig(quantizer=quantizer))
    calibrate(alone, [torch.randn(32, 12, generator=torch.Generator().manual_seed(0))])
    for name, value in alone.state_dict().items():
        assert torch.equal(first["state"][name], value) and torch.equal(second["state"][name], value), name


def test_batch_norm_statistics_are_those_of_all_batches_of_all_processes(results):
    batches = [batch for rank in (0, 1) for batch in own_data(rank).split(8)]
    mean = torch.stack([batch.mean(dim=0) for batch in batches]).mean(dim=0)
    variance = torch.stack([batch.var(dim=0) for batch in batches]).mean(dim=0)  # unbiased, as torch keeps it
    for result in results:
        torch.testing.assert_close(result["batch_norm"]["running_mean"], mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(result["batch_norm"]["running_var"], variance, rtol=1e-5, atol=0)


def test_biases_are_corrected_as_if_one_process_had_run_all_batches(results):
    alone = quantize(linear_net().eval(), SAQQuantizationConfig(weight_bits=3))
    calibrate(alone, [own_data(0)])
    before = alone[0].bias.clone()
    correct_biases(alone, [batch for rank in (0, 1) for batch in own_data(rank).split(16)])
    assert (alone[0].bias - before).abs().max() > 1e-3
    for name, value in alone.state_dict().items():
        assert torch.equal(results[0]["biases"][name], results[1]["biases"][name]), name
        torch.testing.assert_close(results[0]["biases"][name], value, rtol=0, atol=1e-6)

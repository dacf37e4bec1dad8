"""Bias correction, against the mean error computed from the definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hf_saq import SAQQuantizationConfig, calibrate, correct_biases, pack, quantize

CONFIG = SAQQuantizationConfig(weight_bits=3, activation_bits=4, first_last_bits=None)


def calibrated(model: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
    quantize(model, CONFIG)
    return calibrate(model, batches).eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.rand(6, 4, 5, 5) + 0.5, torch.rand(3, 4, 5, 5) + 0.5]


def mean_output(module: nn.Module, batches: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        outputs = [module(batch) for batch in batches]
    return torch.cat([out.movedim(1, 0).flatten(1) for out in outputs], dim=1).mean(dim=1)


def test_a_bias_takes_up_the_mean_error(batches):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    expected = mean_output(model, batches)
    calibrated(model, batches)
    assert (mean_output(model, batches) - expected).abs().max() > 1e-2
    correct_biases(model, batches)
    assert_close(mean_output(model, batches), expected, atol=1e-5, rtol=0)


def test_a_running_mean_takes_it_up_where_there_is_no_bias(batches):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
    model(torch.rand(8, 4, 5, 5))  # running statistics that are not those of a new layer
    model.eval()
    expected = mean_output(model, batches)
    calibrated(model, batches)
    assert (mean_output(model, batches) - expected).abs().max() > 1e-2
    correct_biases(model, batches)
    assert_close(mean_output(model, batches), expected, atol=1e-5, rtol=0)


def test_errors_of_one_layer_are_not_taken_off_twice(batches):
    """The second layer's error is measured at its float inputs, which the first layer's error has not moved."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(25, 7), nn.ReLU(), nn.Linear(7, 3))
    inputs = [batch.clone() for batch in batches]
    with torch.no_grad():
        hidden = [model[:3](batch) for batch in inputs]
        expected = [model[3](h) for h in hidden]
    bias = model[3].bias.clone()
    calibrated(model, inputs)
    last = model[3]
    with torch.no_grad():
        errors = torch.cat([(last(h) - y).flatten(0, 1) for h, y in zip(hidden, expected, strict=True)])
    correct_biases(model, inputs)
    assert_close(last.bias, bias - errors.mean(dim=0), atol=1e-6, rtol=0)


def test_layers_with_neither_stay_as_they_are_and_nothing_is_added(batches):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1))
    calibrated(model, batches)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    correct_biases(model, batches)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert list(model.state_dict()) == list(before)
    assert changed == ["3.bias"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(module.observer is None for module in model.modules() if hasattr(module, "observer"))
    assert_close(pack(model)(batches[0]), model(batches[0]))


def test_what_it_needs(batches):
    with pytest.raises(ValueError, match=r"Sequential has no quantized layer; call `quantize`"):
        correct_biases(nn.Sequential(nn.Linear(2, 2)), batches)
    model = quantize(nn.Sequential(nn.Conv2d(4, 6, 3)), CONFIG)
    with pytest.raises(RuntimeError, match=r"without a range; run `calibrate"):
        correct_biases(model, batches)
    calibrate(model, batches)
    with pytest.raises(ValueError, match="at least one batch"):
        correct_biases(model, [])

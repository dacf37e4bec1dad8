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


def test_a_layer_is_corrected_at_what_the_corrected_ones_before_it_give(batches):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(25, 7), nn.ReLU(), nn.Linear(7, 3))
    with torch.no_grad():
        first, last = model[:2](batches[0]), model(batches[0])
    biases = model[1].bias.clone(), model[3].bias.clone()
    calibrated(model, batches[:1])
    with torch.no_grad():
        shift = (first - model[:2](batches[0])).flatten(0, 1).mean(dim=0)
        hidden = torch.relu(model[:2](batches[0]) + shift)
        shift_of_last = (last - model[3](hidden)).flatten(0, 1).mean(dim=0)
    correct_biases(model, batches[:1])
    assert_close(model[1].bias, biases[0] + shift, atol=1e-6, rtol=0)
    assert_close(model[3].bias, biases[1] + shift_of_last, atol=1e-6, rtol=0)
    with torch.no_grad():
        assert_close(model(batches[0]).flatten(0, 1).mean(dim=0), last.flatten(0, 1).mean(dim=0), atol=1e-5, rtol=0)


def test_a_layer_that_runs_twice_takes_the_mean(batches):
    torch.manual_seed(1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = Twice()
    x = batches[0]
    with torch.no_grad():
        first, second = model.layer(x), model(x)
    bias = model.layer.bias.clone()
    calibrated(model, [x])
    with torch.no_grad():
        shifts = [(first - model.layer(x)).flatten(0, -2).mean(dim=0)]
        shifts.append((second - model.layer(model.layer(x) + shifts[0])).flatten(0, -2).mean(dim=0))
    correct_biases(model, [x])
    assert_close(model.layer.bias, bias + (shifts[0] + shifts[1]) / 2, atol=1e-6, rtol=0)


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
    with pytest.raises(
        RuntimeError,
        match="^correct_biases: .* is not calibrated: 1 quantizers have no range yet.* Run `hf_saq.calibrate",
    ):
        correct_biases(model, batches)
    calibrate(model, batches)
    with pytest.raises(ValueError, match="at least one batch"):
        correct_biases(model, [])


class TwoNorms(nn.Module):
    """One convolution for two levels, each with statistics of its own, as in the heads of EfficientDet."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(6)])

    def levels(self, x):
        return [norm(self.conv(level)) for norm, level in zip(self.norms, (x, 3 * x), strict=True)]

    def forward(self, x):
        return sum(self.levels(x))


def test_each_norm_behind_a_shared_layer_takes_up_the_error_of_its_own_use(batches):
    torch.manual_seed(1)
    model = TwoNorms()
    model(torch.rand(8, 4, 5, 5))
    model.eval()

    def means():
        return [mean_output(lambda x, k=k: model.levels(x)[k], batches) for k in (0, 1)]

    expected = means()
    calibrated(model, batches)
    assert all((found - wanted).abs().max() > 1e-2 for found, wanted in zip(means(), expected, strict=True))
    correct_biases(model, batches)
    assert_close(means(), expected, atol=1e-5, rtol=0)

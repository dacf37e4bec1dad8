"""Code that was compiled before there was a perturbation, or for another model, is not used in a perturbed step."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import linear_net, vectors
from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, quantize
from hf_saq.analysis import compare, sensitivity, sharpness

X, LABELS = vectors(), torch.zeros(8, dtype=torch.long)


def built() -> nn.Module:
    return calibrate(quantize(linear_net(), SAQQuantizationConfig(weight_bits=4, activation_bits=4)), [X]).train()


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), LABELS)


def gradients_of_a_step(model: nn.Module, run: nn.Module) -> Tensor:
    """Of a full step of `model`, which is run as `run`, and of a plain one after it."""
    minimizer = SharpnessAwareMinimizer(model, rho=0.5)
    with minimizer.ascent():
        loss_of(run).backward()
    with minimizer.perturbed():
        loss_of(run).backward()
    minimizer.detach()
    found = [p.grad.flatten() for p in model.parameters()]
    model.zero_grad()
    loss_of(run).backward()
    return torch.cat([*found, *(p.grad.flatten() for p in model.parameters())])


@pytest.fixture
def compiled_before():
    """Another model of the same code was compiled and trained plainly in this process."""
    torch._dynamo.reset()
    loss_of(torch.compile(built(), backend="eager")).backward()


@pytest.mark.parametrize("is_warm", [False, True], ids=["another model", "this model"])
def test_a_compiled_model_is_perturbed(compiled_before, is_warm):
    expected = gradients_of_a_step(model := built(), model)
    model = built()
    compiled = torch.compile(model, backend="eager")
    if is_warm:
        loss_of(compiled).backward()
        model.zero_grad()
    torch.testing.assert_close(gradients_of_a_step(model, compiled), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "number", ["sharpness", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sensitivity", "compare"))]
)
def test_analyses_of_a_model_that_was_compiled_in_place(number):
    """They look at layers through hooks, which code compiled before does not see."""
    model = built().eval()
    batches = [(X, LABELS)]

    def measured(model: nn.Module) -> list[float]:
        if number == "sharpness":
            return [sharpness(model, batches, 0.1, power_iterations=1, trace_samples=2).steepest.mean]
        if number == "sensitivity":
            return [entry.loss_rise for entry in sensitivity(model, batches, candidates=(2,)).entries]
        return [layer.snr for layer in compare(model, other, batches).layers]

    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight.mul_(1.1)
    expected = measured(model)
    torch._dynamo.reset()
    model.compile(backend="eager")
    model(X)
    assert measured(model) == pytest.approx(expected, rel=1e-5)

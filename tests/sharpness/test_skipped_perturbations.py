"""Training that is never perturbed is plain training: it is told of."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from minimizer_nets import batch, linear_net, loss_of, quantized

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, quantize


def climbs(minimizer, net, count: int, factor: float = 1.0) -> None:
    for _ in range(count):
        with minimizer.ascent():
            (loss_of(net, batch(net)) * factor).backward()
        with minimizer.perturbed():
            pass


def test_a_loss_of_a_copy_of_the_model():
    """A user wraps, copies or reloads the model after the minimizer was built."""
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    other = copy.deepcopy(net)
    climbs(minimizer, other, 19)
    with pytest.warns(UserWarning, match="last 20 perturbations were to be made of is zero: the loss does not depend"):
        climbs(minimizer, other, 1)
    climbs(minimizer, other, 20)  # said once
    assert minimizer.skipped == 40


@pytest.mark.parametrize("weight_bits", [None, 4], ids=["float weights", "quantized"])
def test_weights_in_float_are_not_perturbed_without_a_word(weight_bits: int | None):
    """With activations alone quantized, or a model that nobody has quantized, biases were all that was perturbed."""
    net = quantize(linear_net(), SAQQuantizationConfig(weight_bits=weight_bits, first_last_bits=None))
    told = pytest.warns(UserWarning, match=r"no weight of Sequential is quantized, .*so that \d other tensors, such")
    with told if weight_bits is None else nullcontext():
        SharpnessAwareMinimizer(net, rho=0.1)
    for perturb in (["bias"], ["weight", "other"]):
        SharpnessAwareMinimizer(net, rho=0.1, perturb=perturb)


@pytest.mark.parametrize("too_large", [16, 20])
def test_a_loss_scale_that_finds_its_place(too_large):
    """Gradients of fp16 overflow at first; that is nothing to be told of."""
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    with pytest.warns(UserWarning, match="is nan") if too_large == 20 else nullcontext():
        climbs(minimizer, net, too_large, torch.inf)
    climbs(minimizer, net, 1)
    climbs(minimizer, net, 10, torch.inf)
    assert minimizer.skipped == too_large + 10

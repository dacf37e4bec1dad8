"""The hooks of a minimizer: what users do to them, and to objects that hold a model together with its minimizer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from minimizer_nets import batch, linear_net, loss_of, quantized, two_passes
from torch import Tensor

from hf_saq import SharpnessAwareMinimizer
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep


def gradients(net, minimizer) -> list[Tensor]:
    """Gradients of one step in two passes."""
    net.zero_grad()
    two_passes(net, minimizer, batch(net))
    return [p.grad.clone() for p in net.parameters()]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Experiment:
    """Holds what belongs together, as the module of a training framework or a fold of a cross-validation does."""

    def __init__(self):
        self.model = quantized(linear_net)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.step = ScheduledStep(SharpnessAwareMinimizer(self.model, rho=0.4), PerturbationSchedule())
        self.step.rule.loss_scale = float  # pickles, as a lambda does not


class TestHooksThatWereRemoved:
    """Without them biases and norms alone were perturbed, with the whole radius."""

    @pytest.fixture(autouse=True)
    def minimized(self):
        self.net = quantized(linear_net)
        self.minimizer = SharpnessAwareMinimizer(self.net, rho=0.4)
        self.expected = gradients(self.net, self.minimizer)

    def test_a_minimizer_is_used_again_after_detach(self):
        """A user detaches it for the evaluation at the end of each epoch."""
        self.minimizer.detach()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in self.net.modules())
        assert same(gradients(self.net, self.minimizer), self.expected)

    def test_a_kept_eps_is_added_after_detach(self):
        with self.minimizer.ascent():
            loss_of(self.net, batch(self.net)).backward()
        eps = self.minimizer.climb()
        self.minimizer.detach()
        with torch.no_grad(), self.minimizer.displaced(eps):
            w_q = self.net[0].quantized_weight()
        moved = (
            self.net[0].weight_quantizer.fake_quantize(self.net[0].weight) + eps.outputs[self.net[0].weight_quantizer]
        )
        assert torch.equal(w_q, moved)

    def test_hooks_that_somebody_cleared_are_put_back(self):
        """A user clears the hooks that took features."""
        for module in self.net.modules():
            module._forward_hooks.clear()
        assert same(gradients(self.net, self.minimizer), self.expected)

    def test_a_model_in_use_keeps_one_hook_on_each_quantizer(self):
        gradients(self.net, self.minimizer)
        assert {len(layer.weight_quantizer._forward_hooks) for layer in (self.net[0], self.net[3], self.net[5])} == {1}


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
def test_a_copy_of_an_experiment_has_a_minimizer_of_its_own(duplicate):
    """A user copies model, optimizer and minimizer together: the minimizer stayed with the original model."""
    one = Experiment()
    expected = gradients(one.model, one.step.minimizer)
    with one.step.minimizer.ascent():  # a step that is under way is not copied
        loss_of(one.model, batch(one.model)).backward()
    two = duplicate(one)
    minimizer = two.step.minimizer
    assert minimizer.model is two.model and two.step.rule.minimizer is minimizer
    assert same(gradients(two.model, minimizer), expected)
    minimizer.detach()
    one.step.minimizer.reset()
    assert same(gradients(one.model, one.step.minimizer), expected)


def hooks_of(net) -> set[int]:
    """Count the hooks on each quantizer, and those on the model itself."""
    quantizers = [layer.weight_quantizer for layer in (net[0], net[3], net[5])]
    return {len(net._forward_pre_hooks), *(len(quantizer._forward_hooks) for quantizer in quantizers)}


def test_hooks_of_minimizers_that_are_gone_do_not_pile_up():
    """A user tries one radius after the other on one model: each left its hooks there for good."""
    net = quantized(linear_net)
    for trial in range(4):
        minimizer = SharpnessAwareMinimizer(net, rho=0.4)
        found = gradients(net, minimizer)
        assert hooks_of(net) == {1}, trial
    twin = copy.deepcopy(net)
    assert same(found, gradients(twin, SharpnessAwareMinimizer(twin, rho=0.4)))
    assert hooks_of(twin) == {1}  # those that were copied with the model are nobody's


def test_minimizers_that_take_turns_keep_their_hooks():
    net = quantized(linear_net)
    small, large = (SharpnessAwareMinimizer(net, rho=rho) for rho in (0.4, 0.8))
    expected = [gradients(net, minimizer) for minimizer in (small, large)]
    assert hooks_of(net) == {2}
    assert not same(*expected)
    for minimizer, grads in zip((small, large), expected, strict=True):
        fresh = quantized(linear_net)
        assert same(gradients(fresh, SharpnessAwareMinimizer(fresh, rho=minimizer.rho)), grads)
        assert same(gradients(net, minimizer), grads)


def test_a_model_that_holds_its_minimizer_is_copied():
    net = quantized(linear_net)
    net.minimizer = SharpnessAwareMinimizer(net, rho=0.4)
    twin = copy.deepcopy(net)
    assert twin.minimizer.model is twin
    assert same(gradients(twin, twin.minimizer), gradients(net, net.minimizer))


@pytest.mark.parametrize("context", ["ascent", "recorded"])
def test_a_backward_after_the_block_of_its_forward_is_refused(context):
    """A user indents the forward alone: gradients of biases and norms of both passes added up."""
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.4)
    expected = gradients(net, minimizer)
    with getattr(minimizer, context)():
        loss = loss_of(net, batch(net))
    with pytest.raises(RuntimeError, match="backward of a first pass ran after its block"):
        loss.backward()
    minimizer.reset()
    assert same(gradients(net, minimizer), expected)


def test_kinds_and_ways_that_do_not_exist_are_refused():
    """A typo selected less than was meant, without a word."""
    net = quantized(linear_net)
    for perturb in (("weights", "bias"), "weights"):
        with pytest.raises(ValueError, match=r"perturb=.*; expected a list of some of \['weight'"):
            SharpnessAwareMinimizer(net, rho=0.1, perturb=perturb)
    with pytest.raises(ValueError, match="sync='Global'; expected"):
        SharpnessAwareMinimizer(net, rho=0.1, sync="Global")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

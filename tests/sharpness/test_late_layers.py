"""The last layers alone are perturbed, and what comes before them runs once for both passes of a step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_models import deit_with_teacher, images, swin
from torch import nn
from training import quantized_model

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, quantize
from hf_saq.sharpness.depth import SharedPrefix, find_late_layers
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep

FIRST = {
    ("vit", 0.5): "vit.layers.1",
    ("vit", 0.3): "vit.layernorm",
    ("convnext", 0.5): "convnext.encoder.stages.1",
    ("mobilenet_v2", 0.5): "mobilenet_v2.conv_1x1.normalization",
    ("resnet", 0.5): "resnet.embedder.embedder.normalization",
}
"""Where the last layers begin. Modules inside of residual blocks are never first: a shortcut goes past them."""


class Training:
    """Steps of one model under `ascent_depth`, with the prefix run once or, for comparison, twice."""

    def __init__(self, model, depth, shared=True, count=1, dropout=0.0, **how):
        self.model = model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        self.minimizer = SharpnessAwareMinimizer(model, rho=0.1, **how)
        self.step = ScheduledStep(self.minimizer, PerturbationSchedule(ascent_depth=depth))
        x, y = images(4, seed=3).to(next(model.parameters()).dtype), torch.tensor([0, 1, 2, 0])
        self.batches = list(zip(x.chunk(count), y.chunk(count), strict=True))
        if not shared:
            self.step._choose_layers(lambda: self.backward(self.batches[0]))
            self.minimizer._prefix = SharedPrefix(self.model)

    def backward(self, batch, reduce=True):
        loss = nn.functional.cross_entropy(self.model(pixel_values=batch[0]).logits, batch[1]) / len(self.batches)
        loss.backward()
        return loss.detach()

    def run(self, steps=2):
        """Gradients, buffers and what was logged."""
        torch.manual_seed(1)  # of dropout
        logged = []
        for number in range(steps):
            for k in range(len(self.batches)):
                outcome = self.step.micro_batch(k, self.batches, self.backward, number, steps)
                logged += [outcome.loss, *outcome.sharpness]
        grads = [p.grad for p in self.model.parameters()]
        return [*(g for g in grads if g is not None), *self.model.buffers(), *logged, torch.get_rng_state()]


HOW = [(1, dict(count=2, dropout=0.3)), (2, dict(count=2, sync="global")), (3, dict(adaptive=True))]


@pytest.mark.parametrize(
    ("family", "depth", "case", "how"),
    [
        pytest.param(*model, *how, marks=pytest.mark.slow if model[0] == "mobilenet_v2" else ())
        for model in FIRST
        for how in HOW
    ],
    ids=str,
)
def test_sharing_changes_no_bit(family, depth, case, how):
    """Dropout, running statistics and the state of the random generator are those of two whole passes too."""
    net = quantized_model(family, torch.float32)
    shared = Training(copy.deepcopy(net), depth, case=case, **how)
    calls = count_calls(shared.model)
    found = shared.run()
    whole = Training(net, depth, shared=False, case=case, **how)
    expected = whole.run()
    assert shared.minimizer.late.first == FIRST[family, depth]
    assert whole.minimizer.late == shared.minimizer.late
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # Two steps with one or two micro-batches, the pass that finds the layers, and the trial.
    micro_batches = 2 * len(shared.batches)
    assert calls[shared.minimizer.late.before[0]] == 2 + micro_batches
    assert calls[shared.minimizer.late.first] == 3 + 2 * micro_batches


def count_calls(model):
    """How often the own `forward` of each module runs; a replayed one does not."""
    calls = {}
    for name, module in model.named_modules():

        def counted(*args, name=name, forward=module.forward, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return forward(*args, **kwargs)

        module.forward = counted
    return calls


def test_only_the_last_layers_are_perturbed():
    training = Training(quantized_model("vit", torch.float32), 0.5)
    training.run(1)
    moved = {entry.name for entry in training.minimizer._tensors.weights}
    quantized = {name for name, m in training.model.named_modules() if hasattr(m, "weight_quantizer")}
    assert moved == {name for name in quantized if f"{name}.weight" in training.minimizer.late.parameters}
    assert "vit.layers.1.mlp.fc1" in moved and not any("layers.0" in name for name in moved)


def test_the_pass_that_finds_the_layers_leaves_no_trace():
    training = Training(quantized_model("resnet", torch.float32), 0.5, dropout=0.3)
    before = copy.deepcopy(training.model.state_dict())
    training.model.classifier[-1].weight.grad = marked = torch.ones_like(training.model.classifier[-1].weight)
    state = torch.get_rng_state()
    training.step._choose_layers(lambda: training.backward(training.batches[0]))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())
    assert training.model.classifier[-1].weight.grad is marked and torch.equal(marked, torch.ones_like(marked))
    assert sum(p.grad is not None for p in training.model.parameters()) == 1


class Chain(nn.Module):
    """Three layers of known cost one after the other: 32, 16 and 4 multiply-accumulates a sample."""

    def __init__(self, shortcut=False, in_place=False):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(2, 2)
        self.act = nn.ReLU(inplace=in_place)
        self.side = nn.Linear(4, 2) if shortcut else None

    def forward(self, x):
        past = 0 if self.side is None else self.side(x)
        return self.c(self.b(self.act(self.a(x)))) + past


def ends_of(net, depth):
    def run():
        net(torch.randn(3, 4)).sum().backward()

    return find_late_layers(net, depth, set(net.parameters()), run)


@pytest.mark.parametrize(
    ("depth", "first", "share"), [(0.9, "b", 20 / 52), (0.39, "b", 20 / 52), (0.38, "c", 4 / 52), (0.01, "c", 4 / 52)]
)
def test_the_longest_end_within_the_depth(depth, first, share):
    """`act` has nothing to perturb before `b`, so that it begins the same end. Where none is short enough, the
    shortest."""
    end = ends_of(Chain(), depth)
    assert end.first in {first, "act"} and end.share == pytest.approx(share)
    assert "c.weight" in end.parameters and "a" in end.before and "a.weight" not in end.parameters


def test_an_activation_in_place_is_not_the_first():
    """It would run again on what it has changed."""
    assert ends_of(Chain(in_place=True), 0.9).first == "b"
    assert ends_of(Chain(), 0.9).first == "act"


def test_branches_side_by_side_to_the_end_are_refused():
    with pytest.raises(ValueError, match="ascent_depth=0.5: Chain has no layer through which all goes"):
        ends_of(Chain(shortcut=True), 0.5)


@pytest.mark.parametrize(
    ("build", "first"), [(deit_with_teacher, "deit.layers.1"), (swin, "swin.encoder.layers.0.downsample")]
)
def test_two_heads_and_windows(build, first):
    """DeiT's logits are made by two heads of one trunk; the blocks of Swin are stages."""
    model = quantize(build(), SAQQuantizationConfig(weight_bits=4, activation_bits=4))
    training = Training(calibrate(model, [{"pixel_values": images(8)}]), 0.35)
    training.run(1)
    assert training.minimizer.late.first == first


def test_a_shortcut_in_a_later_step_is_told():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.shortcut = nn.Linear(4, 4), nn.Linear(4, 2), False

        def forward(self, x):
            h = self.a(x)
            return self.b(h) + (h[:, :2] if self.shortcut else 0)

    net = quantize(Sometimes(), SAQQuantizationConfig(activation_bits=None))
    x = torch.randn(3, 4)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    minimizer.perturb_last_layers(0.5, lambda: net(x).sum().backward())
    net.zero_grad()
    net.shortcut = True
    with pytest.raises(RuntimeError, match="reaches layers before b by another way"):
        with minimizer.ascent():
            net(x).square().sum().backward()


def test_more_forwards_in_the_second_pass_are_told():
    net = quantize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), SAQQuantizationConfig(activation_bits=None))
    x = torch.randn(3, 4)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    minimizer.perturb_last_layers(0.5, lambda: net(x).sum().backward())
    with minimizer.ascent():
        net(x).square().sum().backward()
    with pytest.raises(RuntimeError, match="0 runs more often in the second pass of a step than in its first"):
        with minimizer.perturbed():
            (net(x) + net(x)).square().sum().backward()
    assert "forward" not in vars(net[0])  # and the model is as it was


@pytest.mark.filterwarnings("ignore:ascent_depth. perturbed steps take two whole passes")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_code_that_is_compiled_for_the_last_layers_serves_all_of_them_too():
    """What is compiled while the last layers are perturbed has no hooks at the others; they get theirs later."""
    net = quantize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), SAQQuantizationConfig(activation_bits=None))
    torch._dynamo.reset()
    net.compile(backend="eager")
    x = torch.randn(3, 4)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1, perturb=["weight"])
    minimizer.perturb_last_layers(0.5, lambda: net(x).sum().backward())
    torch._dynamo.reset()

    def perturbed() -> set[nn.Module]:
        with minimizer.ascent():
            net(x).square().sum().backward()
        with minimizer.perturbed() as eps:
            net(x).square().sum().backward()
            return set(eps.outputs)

    assert perturbed() == {net[1].weight_quantizer}
    with minimizer.all_perturbed():
        assert perturbed() == {net[0].weight_quantizer, net[1].weight_quantizer}
    assert perturbed() == {net[1].weight_quantizer}


def test_gradient_checkpointing_takes_two_whole_passes_with_the_same_result():
    found = []
    for checkpointing in (False, True):
        training = Training(quantized_model("vit"), 0.5)
        if checkpointing:
            training.model.gradient_checkpointing_enable()
            with pytest.warns(UserWarning, match="two whole passes, because gradient checkpointing"):
                found.append(training.run())
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found.append(training.run())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_parameters_that_were_replaced_have_gradients_too():
    training = Training(quantized_model("vit"), 0.5)
    training.run(1)
    layer = training.model.vit.layers[0].mlp.fc1
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    training.run(1)
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_a_new_training_looks_for_its_layers_again():
    training = Training(quantized_model("vit"), 0.5)
    training.run(1)
    assert training.minimizer.late is not None
    training.step.start_again()
    assert training.minimizer.late is None
    assert any("layers.0" in entry.name for entry in training.minimizer._tensors.weights)

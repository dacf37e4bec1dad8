"""What comes before the perturbed layers runs once in models that do with their modules what models may do."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_models import images
from torch import nn
from torch.nn.functional import cross_entropy, gelu, linear, relu
from torch.utils.checkpoint import checkpoint
from transformers import RegNetConfig, RegNetForImageClassification, ResNetConfig, ResNetForImageClassification

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, quantize
from hf_saq.sharpness.depth import SharedPrefix
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep

X, Y = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 0, 1, 2])


class Net(nn.Module):
    """`stem`, blocks with `norm` and a `pos` parameter between them, `head`."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.stem, self.norm, self.blocks = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ModuleList(blocks)
        self.head, self.act, self.drop = nn.Linear(8, 3), nn.GELU(), nn.Dropout(0.3)
        self.pos, self.scale = nn.Parameter(torch.full((8,), 0.1)), nn.Parameter(torch.tensor(1.5))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def layers(count=3):
    return [nn.Linear(8, 8) for _ in range(count)]


class SharedActivation(Net):
    def forward(self, x):
        x = self.act(self.stem(x))
        for block in self.blocks:
            x = self.drop(self.act(block(x)))
        return self.head(x)


class OneBlockThrice(Net):
    def forward(self, x):
        x = self.stem(x)
        for _ in range(3):
            x = self.act(self.blocks[0](x))
        return self.head(x)


class InPlace(Net):
    def forward(self, x):
        x = self.stem(x)
        x += self.pos
        x = relu(self.norm(x), inplace=True)
        x = self.blocks[0](x)
        x *= 2
        return self.head(self.blocks[1](x))


class Unnoticed(nn.Module):
    """Reads the weight of a layer that it does not call, as attention of torch does."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.called(gelu(linear(x, self.read.weight, self.read.bias)))


class ScaledAtTheEnd(Net):
    def forward(self, x):
        return super().forward(x) * self.scale


class Popping(Net):
    class Backbone(Net):
        def forward(self, x):
            return [self.blocks[0](self.stem(x))]

    def __init__(self):
        super().__init__(self.Backbone(*layers(1)))

    def forward(self, x):
        return self.head(self.blocks[0](x).pop())


class Appending(Net):
    class Block(nn.Linear):
        def forward(self, x, seen):
            seen.append(super().forward(x))
            return seen[-1]

    def __init__(self):
        super().__init__(*(self.Block(8, 8) for _ in range(3)))

    def forward(self, x):
        x, seen = self.stem(x), []
        for block in self.blocks:
            x = block(x, seen)
        return self.head(sum(seen))


class Remembering(Net):
    """Has a buffer whose shape is that of the batch, beside a norm."""

    def forward(self, x):
        if len(self.last) != len(x):
            self.last = torch.arange(len(x)).float()
        x = self.blocks[0](self.norm(self.stem(x)) + 0.01 * self.last[:, None])
        return self.head(x)


class EarlyBias(Net):
    """Reads a parameter of a late layer before."""

    def forward(self, x):
        x = self.blocks[0](self.stem(x) + self.blocks[1].bias)
        return self.head(self.act(self.blocks[1](gelu(x))))


class Handing(Net):
    """Hands a parameter through a layer without parameters, past all others."""

    def forward(self, x):
        scale = self.act(self.pos)
        return self.head(self.blocks[1](gelu(self.blocks[0](self.stem(x)))) * scale)


class Noisy(Net):
    """Draws random numbers between layers, for later."""

    def forward(self, x):
        x = self.drop(self.stem(x))
        noise = 0.5 * torch.randn_like(x)
        return self.head(self.blocks[1](gelu(self.blocks[0](x))) + noise)


class Adding(Net):
    """Changes what a frozen layer returned in place, and adds it at the end."""

    frozen = True

    def forward(self, x):
        x = self.stem(x)
        x += self.pos
        return self.head(x + self.act(self.blocks[1](gelu(self.blocks[0](gelu(x))))))


class Remarking(Net):
    """Remembers a statistic of an early layer for the end."""

    class Stem(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            self.mean = y.detach().mean(0)
            return y

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.stem = self.Stem(6, 8)

    def forward(self, x):
        return self.head(self.blocks[0](self.stem(x))) + self.stem.mean[:3]


class Hooked(Net):
    def forward(self, x):
        x = self.stem(x)
        x.register_hook(lambda grad: None)
        return self.head(self.blocks[0](x))


def plain_loss(net, x, y):
    return cross_entropy(net(x), y)


def two_views(net, x, y):
    return plain_loss(net, x, y) + plain_loss(net, 1.1 * x, y)


def of_a_teacher(net, x, y):
    with torch.no_grad():
        target = (x @ torch.ones(6, 500) @ torch.ones(500, 500))[:, :3] * 0
    return plain_loss(net, x, y) + (net(x) - target).square().mean()


def pseudo_labels(net, x, y):
    with torch.inference_mode():
        y = net(x).argmax(-1)
    return plain_loss(net, x, y.clone())


def decayed(net, x, y):
    return plain_loss(net, x, y) + 0.01 * sum(p.square().sum() for p in net.parameters())


def adversarial(net, x, y):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(plain_loss(net, x, y), x)
    return plain_loss(net, (x + 0.1 * grad.sign()).detach(), y)


AWKWARD = {
    "shared activation and dropout": (lambda: SharedActivation(*layers()), 0.6, "blocks.1", plain_loss),
    "one block thrice": (lambda: OneBlockThrice(*layers(1)), 0.9, "head", plain_loss),
    "in-place operations": (lambda: InPlace(*layers(2)), 0.6, "blocks.1", plain_loss),
    "a layer that is only read": (lambda: Net(Unnoticed(), Unnoticed()), 0.5, "blocks.1", plain_loss),
    "a parameter of the model at the end": (lambda: ScaledAtTheEnd(*layers()), 0.4, "blocks.2", plain_loss),
    "a list that is emptied": (Popping, 0.4, "head", plain_loss),
    "a list that grows": (Appending, 0.5, "head", plain_loss),
    "a buffer that changes its shape": (lambda: Remembering(*layers(1)), 0.3, "head", plain_loss),
    "a late bias that is read before": (lambda: EarlyBias(*layers(2)), 0.5, "act", plain_loss),
    "labels of its own": (lambda: Net(*layers()), 0.4, "blocks.2", pseudo_labels),
    "two views": (lambda: Net(*layers()), 0.4, "blocks.2", two_views),
    "other products in the loss": (lambda: Net(*layers()), 0.4, "blocks.2", of_a_teacher),
}


def steps(net, depth, loss, shared=True, sizes=(6, 6, 4), between=lambda net, number: None):
    """Gradients, running statistics and what was logged, of one step for each batch size; and the minimizer."""
    torch.manual_seed(0)
    minimizer = SharpnessAwareMinimizer(net.train(), rho=0.1)
    step = ScheduledStep(minimizer, PerturbationSchedule(ascent_depth=depth))
    found = []

    def backward(batch, reduce=True):  # noqa: ARG001
        value = loss(net, *batch)
        value.backward()
        return value.detach()

    for number, size in enumerate(sizes):
        between(net, number)
        net.zero_grad()
        batch = (X[:size], Y[:size])
        if not shared and not step._knows_layers():
            step._choose_layers(lambda batch=batch: backward(batch))
            minimizer._prefix = SharedPrefix(net)
        outcome = step.micro_batch(0, [batch], backward, number, len(sizes))
        found += [outcome.loss, *outcome.sharpness, torch.tensor(minimizer.ascent_norm), torch.get_rng_state()]
        found += [torch.zeros(()) if p.grad is None else p.grad.clone() for p in net.parameters()]
        found += [buffer.clone() for buffer in net.buffers()]
    return found, minimizer


def built(build):
    torch.manual_seed(5)
    net = quantize(build(), SAQQuantizationConfig(activation_bits=None))
    if getattr(net, "frozen", False):
        net.stem.requires_grad_(False)
        net.pos.requires_grad_(False)
    return net


@pytest.mark.parametrize("name", AWKWARD)
def test_the_result_is_that_of_two_whole_passes(name):
    build, depth, first, loss = AWKWARD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they do share
        found, minimizer = steps(built(build), depth, loss)
    expected, _ = steps(built(build), depth, loss, shared=False)
    assert minimizer.late.first == first and minimizer.late.share <= max(depth, 0.15)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_layers_that_are_only_read_belong_to_their_block():
    _, minimizer = steps(built(lambda: Net(Unnoticed(), Unnoticed())), 0.5, plain_loss)
    assert {"blocks.1.read.weight", "blocks.1.called.weight"} < minimizer.late.parameters
    assert "blocks.0.read.weight" not in minimizer.late.parameters


class Checkpointed(Net):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


ANOTHER = "a trial .* the gradient of .* was another"
NOT_SHARED = {
    "gradients of images": (lambda: Net(*layers()), adversarial, "the loss asks for gradients of the model's inputs"),
    "checkpointing": (lambda: Checkpointed(*layers()), plain_loss, "parts of it also run outside of its forward"),
    "a parameter that passes a module": (lambda: Handing(*layers(2)), plain_loss, ANOTHER),
    "random numbers": (lambda: Noisy(*layers(2)), plain_loss, ANOTHER),
    "a change in place that goes past": (lambda: Adding(*layers(2)), plain_loss, ANOTHER),
    "what a layer remembers": (lambda: Remarking(*layers(1)), two_views, ANOTHER),
    "a term of the parameters": (lambda: Net(*layers()), decayed, "a trial .* by another way than through it"),
    "hooks of tensors": (lambda: Hooked(*layers(1)), plain_loss, "a trial .*cannot register a hook"),
}


@pytest.mark.parametrize("name", NOT_SHARED)
def test_what_cannot_be_shared_takes_two_whole_passes(name):
    build, loss, reason = NOT_SHARED[name]
    with pytest.warns(UserWarning, match=f"two whole passes, because .*{reason}"):
        found, minimizer = steps(built(build), 0.5, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, _ = steps(built(build), 0.5, loss, shared=False)
    assert minimizer.late.obstacle and len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_first_layer_that_is_left_out_is_told():
    class Leaving(Net):
        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks if self.training else ():
                x = block(x) if self.all or block is not self.blocks[2] else x
            return self.head(x)

    net = built(lambda: Leaving(*layers()))
    net.all = True

    def leave(net, number):
        net.all = number == 0

    with pytest.raises(RuntimeError, match="blocks.2, where the perturbed layers begin, did not run in this step"):
        steps(net, 0.4, plain_loss, between=leave)


def test_unfrozen_layers_are_looked_at_again():
    """With a frozen prefix an end may begin inside of a residual block; once that is trained it may not."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

        def forward(self, x):
            return x + self.inner(x)

    def build():
        net = Net(Residual(), Residual())
        return net

    def unfreeze(net, number):
        net.requires_grad_(number > 0)
        net.head.requires_grad_(True)
        net.blocks[1].requires_grad_(True)

    found, minimizer = steps(built(build), 0.4, plain_loss, between=unfreeze)
    expected, _ = steps(built(build), 0.4, plain_loss, shared=False, between=unfreeze)
    assert minimizer.late.first == "head" and minimizer.late.is_current(minimizer.model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_parts_that_are_compiled_each_by_itself_are_refused():
    """Torch would run the code of blocks that are not perturbed in those that are (found by running it)."""
    net = built(lambda: Net(*layers()))
    for block in net.blocks:
        block.compile(backend="eager")
    with pytest.raises(ValueError, match="ascent_depth: blocks.0 is compiled by itself"):
        steps(net, 0.5, plain_loss)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "regnet"])
def test_residual_networks_of_several_blocks(kind):
    """Their blocks add the shortcut in place, to what the layers before have returned."""
    if kind == "regnet":
        sizes = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=8, layer_type="y")
        model = RegNetForImageClassification(RegNetConfig(**sizes, num_labels=3))
    else:
        sizes = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type=kind)
        model = ResNetForImageClassification(ResNetConfig(**sizes, num_labels=3))
    net = quantize(model, SAQQuantizationConfig(activation_bits=None))

    def loss(net, x, y):
        return cross_entropy(net(pixel_values=images(6)[: len(x)]).logits, y)

    for depth in (0.02, 0.2):
        found, _ = steps(copy.deepcopy(net), depth, loss, sizes=(6, 4))
        expected, _ = steps(copy.deepcopy(net), depth, loss, shared=False, sizes=(6, 4))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

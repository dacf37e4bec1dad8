"""Two small networks, plain training data for them, and the two passes of a step of the minimizer."""

from __future__ import annotations

import torch
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize


def linear_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 4),
    )


def batch(net: nn.Module, size: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = (size, 12) if isinstance(net[0], nn.Linear) else (size, 3, 8, 8)
    return torch.randn(shape, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def loss_of(model, data):
    x, y = data
    return nn.functional.cross_entropy(model(x), y)


def quantized(build, bits: int = 3) -> nn.Module:
    net = build()
    quantize(net, SAQQuantizationConfig(weight_bits=bits, activation_bits=bits, first_last_bits=None))
    calibrate(net, [batch(net)[0]])
    return net.train()


def two_passes(net, minimizer, data) -> None:
    with minimizer.ascent():
        loss_of(net, data).backward()
    with minimizer.perturbed():
        loss_of(net, data).backward()


def state_of(net) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same_state(net, before) -> None:
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name

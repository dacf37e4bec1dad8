"""Models whose layers read the same tensor, and how to see what they share."""

from __future__ import annotations

import torch
from tiny_models import images
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.layers import PackedLayer, QuantizedLayer
from hf_saq.quantizers import Quantizer

ATTENTION = "vit.layers.{}.attention.{}_proj"
GROUPS = [[ATTENTION.format(block, name) for name in "qkv"] for block in range(2)]
LABELS = torch.arange(len(images())) % 3


def readers(model: nn.Module, block: int = 0) -> list[QuantizedLayer | PackedLayer]:
    base = getattr(model, "vit", model)
    return [getattr(base.layers[block].attention, f"{name}_proj") for name in "qkv"]


def share_one_quantizer(model: nn.Module) -> bool:
    quantizers = [layer.activation_quantizer for layer in readers(model)]
    return quantizers[0] is not None and all(quantizer is quantizers[0] for quantizer in quantizers)


def activation_quantizers(model: nn.Module) -> list[Quantizer]:
    return [m for m in model.modules() if isinstance(m, Quantizer) and m.role == "activation"]


class Two(nn.Module):
    """Layers `a` and `b` that read what `forward` gives them."""

    def __init__(self, forward):
        super().__init__()
        self.stem, self.a, self.b, self.drop = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Dropout()
        self.how = forward

    def forward(self, x):
        return self.how(self, self.stem(x))


def written_to_between(net, x):
    y = net.a(x)
    x.relu_()
    return y + net.b(x)


def quantized_two(forward):
    config = SAQQuantizationConfig(share_inputs=True, shared_input_modules=[["a", "b"]], first_last_bits=None)
    return calibrate(quantize(Two(forward), config), [torch.randn(4, 3, 8, 8)])

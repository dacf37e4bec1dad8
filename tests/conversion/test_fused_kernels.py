"""Encoder layers of torch, which in evaluation without gradients run a fused kernel on the weights of their layers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.layers import QuantizedLayer

X = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5, [False] * 4 + [True]])


class Net(nn.Module):
    """A ViT as people write it by hand."""

    def __init__(self, activation: str, pads: bool):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation=activation, batch_first=True)
        self.encoder, self.head, self.pads = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3), pads

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=PADDING if self.pads else None)[:, 0])


@pytest.mark.parametrize("pads", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_evaluation_is_quantized(activation, pads):
    """The same with and without gradients, and packed; all layers are calibrated."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no layer stays in float
        net = quantize(Net(activation, pads).eval(), SAQQuantizationConfig(weight_bits=2, activation_bits=2))
        calibrate(net, [X])
    assert sum(isinstance(m, QuantizedLayer) for m in net.modules()) == 5
    expected = net(X)
    with torch.no_grad():
        torch.testing.assert_close(net(X), expected)
        torch.testing.assert_close(pack(net)(X), expected)


def test_a_layer_that_stays_in_float_keeps_its_kernel():
    config = SAQQuantizationConfig(modules_to_not_convert=["encoder"], first_last_bits=None)
    net = quantize(Net("gelu", False), config)
    assert [layer.activation_relu_or_gelu for layer in net.encoder.layers] == [2, 2]

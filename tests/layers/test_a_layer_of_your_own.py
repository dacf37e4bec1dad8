"""A new layer type is one class and one line of the registry: everything else takes it as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_saq
from hf_saq.layers import LIBRARY_LAYERS, QUANTIZED_LAYERS, PackedLayer, QuantizedLayer


class QuantConvTranspose1d(QuantizedLayer, nn.ConvTranspose1d):
    """The one class, for a layer of torch. Weight `(in_channels, out_channels, width)`."""

    channel_axis = 1
    output_channel_axis = -2

    @staticmethod
    def constructor_arguments(layer: Any) -> dict[str, Any]:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose1d(x, weight, bias, self.stride, self.padding)


class Scaled(nn.Module):
    """A float layer of a library: `weight`, `(features, 1)`, multiplies each feature."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.randn(features, 1))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, 0] + self.bias


class QuantScaled(QuantizedLayer):
    """The one class, for a layer that this package cannot import."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.empty(features, 1))
        self.bias = nn.Parameter(torch.empty(features))

    @staticmethod
    def constructor_arguments(layer: Any) -> dict[str, Any]:
        return {"features": layer.features}

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x * weight[:, 0] + bias


@pytest.fixture
def model(monkeypatch) -> nn.Sequential:
    monkeypatch.setitem(QUANTIZED_LAYERS, nn.ConvTranspose1d, QuantConvTranspose1d)
    monkeypatch.setitem(LIBRARY_LAYERS, f"{__name__}.Scaled", QuantScaled)
    return nn.Sequential(nn.ConvTranspose1d(4, 6, 3, stride=2, bias=False), nn.GELU(), Scaled(9), nn.Linear(9, 2))


class QuantEmbedding(QuantizedLayer, nn.Embedding):
    """The one class, for a layer that has no bias and whose input is no number to be quantized."""

    @staticmethod
    def constructor_arguments(layer: Any) -> dict[str, Any]:
        return {"num_embeddings": layer.num_embeddings, "embedding_dim": layer.embedding_dim}

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG002
        return F.embedding(x, weight)


def test_an_embedding_is_quantized_too(monkeypatch):
    """It stayed in float: its bias, which it has not, was taken for one that is computed."""
    monkeypatch.setitem(QUANTIZED_LAYERS, nn.Embedding, QuantEmbedding)
    x = torch.tensor([[0, 3, 1], [2, 2, 4]])
    config = hf_saq.SAQQuantizationConfig(weight_bits=3, first_last_bits=None)
    net = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"^0.activation_quantizer: its input is of torch.int64, .*'activation_bits'"):
        hf_saq.calibrate(hf_saq.quantize(net, config), [x])
    net = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 2))
    model = hf_saq.quantize(net, config.replace(overrides={"0": {"activation_bits": None}}))
    expected = hf_saq.calibrate(model, [x])(x)
    assert isinstance(model[0], QuantEmbedding) and model[0].quantized_weight().unique().numel() <= 8
    packed = hf_saq.pack(model)
    again = hf_saq.pack(hf_saq.unpack(packed))
    for other in (packed, again):
        assert isinstance(other[0], PackedLayer)
        torch.testing.assert_close(other(x), expected)
    assert type(hf_saq.dequantize(again)[0]) is nn.Embedding


def test_without_the_line_such_layers_stay_in_float():
    net = nn.Sequential(nn.ConvTranspose1d(4, 6, 3), Scaled(6), nn.Linear(6, 2))
    report = hf_saq.quantize(net, hf_saq.SAQQuantizationConfig()).quantization_report
    assert [layer.name for layer in report.converted] == ["2"]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("quantizer", ["lsq", "liq"])
def test_from_float_to_packed_and_back(model: nn.Sequential, granularity: str, quantizer: str):
    x = torch.randn(8, 4, 4)
    before = model(x)
    settings = {"weight_granularity": granularity, "quantizer": quantizer, "first_last_bits": None}
    config = hf_saq.SAQQuantizationConfig(weight_bits=8, activation_bits=8, **settings)
    hf_saq.calibrate(hf_saq.quantize(model, config), [x])
    assert [type(layer) for layer in model] == [QuantConvTranspose1d, nn.GELU, QuantScaled, type(model[3])]
    assert len(model.quantization_report.converted) == 3
    if granularity == "channel":
        assert model[0].weight_quantizer.scale_shape == (1, 6, 1) and model[2].weight_quantizer.scale_shape == (9, 1)
    torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.05)
    hf_saq.correct_biases(model, [x])

    minimizer = hf_saq.SharpnessAwareMinimizer(model, rho=0.1)
    for context in (minimizer.ascent, minimizer.perturbed):
        with context() as eps:
            model(x).square().mean().backward()
    assert set(eps.outputs) == {model[i].weight_quantizer for i in (0, 2, 3)}
    torch.optim.SGD(model.parameters(), lr=0.01).step()

    model.eval()
    expected = model(x)
    assert not torch.allclose(expected, before)
    packed = hf_saq.pack(model)
    assert sum(isinstance(layer, PackedLayer) for layer in packed) == 3
    torch.testing.assert_close(packed(x), expected)
    torch.testing.assert_close(hf_saq.unpack(packed).eval()(x), expected)
    restored = hf_saq.dequantize(packed)
    assert [type(layer) for layer in restored] == [nn.ConvTranspose1d, nn.GELU, Scaled, nn.Linear]
    assert torch.equal(restored[0].weight, model[0].quantized_weight())
    assert hf_saq.cost(packed, x[:1]).quantized_parameters == 4 * 6 * 3 + 9 + 18

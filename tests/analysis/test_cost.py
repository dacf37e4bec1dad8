"""Counts against numbers worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import linear_net, vectors, vit
from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, cost, pack, quantize
from hf_saq.analysis import LayerCost

W4A3 = SAQQuantizationConfig(weight_bits=4, activation_bits=3, first_last_bits=None)


class Attention(nn.Module):
    """A convolution over 8 x 8 pixels, attention of two heads over 16 tokens, a layer kept in float, a head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2, groups=1)  # 16 tokens of width 8
        self.qkv = nn.Linear(8, 24, bias=False)
        self.float_layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        q, k, v = self.qkv(tokens).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.norm(self.float_layer(mixed)).mean(1))


def image() -> Tensor:
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_convolution_attention_and_linear_layers():
    config = W4A3.replace(modules_to_not_convert=["float_layer"], overrides={"head": {"activation_bits": None}})
    found = cost(quantize(Attention(), config), image())
    # per output pixel 3 * 2 * 2 inputs for each of 8 channels; each of 16 tokens has 8 x 24 products
    assert found.layers == (
        LayerCost("patches", 16 * 8 * 12, 4, 3),
        LayerCost("qkv", 16 * 8 * 24, 4, 3),
        LayerCost("head", 8 * 5, 4, 32),
    )
    # two products of 16 x 16 x 4 for each of 2 heads, and 16 tokens through 8 x 8
    assert found.other_macs == 2 * 2 * 16 * 16 * 4 + 16 * 64
    assert found.macs == 1536 + 3072 + 40 + 4096 + 1024
    assert found.bops == (1536 + 3072) * 12 + 40 * 128 + (4096 + 1024) * 1024
    assert found.float_bops == found.macs * 1024


@pytest.mark.parametrize("is_quantized", [False, True])
def test_attention_of_torch_counts_where_it_has_one_fused_kernel(is_quantized: bool):
    """In evaluation without gradients torch runs an encoder layer, and an attention alone, as one operator."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 3)).eval()
    if is_quantized:
        model = quantize(model, W4A3)
    found = cost(model, torch.randn(1, 5, 16))
    # 5 tokens: query, key and value; both products of two heads of 8; what mixes the heads
    attention = 5 * 16 * 48 + 2 * 2 * 5 * 5 * 8 + 5 * 16 * 16
    feed_forward, head = 2 * 5 * 16 * 32, 5 * 16 * 3
    assert found.macs == attention + feed_forward + head
    assert found.other_macs == (attention if is_quantized else found.macs)
    assert torch.backends.mha.get_fastpath_enabled()


def test_parameters_and_bytes():
    config = W4A3.replace(weight_bits=3, modules_to_not_convert=["float_layer"])
    found = cost(quantize(Attention(), config), image())
    assert found.parameters == (96 + 8) + 192 + (64 + 8) + 16 + (40 + 5)
    assert found.quantized_parameters == 96 + 192 + 40
    # 3 bits a weight; biases, the float layer and the norm in 32; two scales for each of three layers
    assert found.weight_bytes == (96 + 192 + 40) * 3 // 8 + 4 * (8 + 72 + 16 + 5) + 4 * 6
    assert found.float_weight_bytes == 4 * found.parameters


def test_it_becomes_json():
    found = cost(quantize(Attention(), W4A3), image())
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["layers"][0] == {"name": "patches", "macs": 16 * 96, "weight_bits": 4, "activation_bits": 3}
    assert plain["bops"] == found.bops == sum(e["macs"] * 12 for e in plain["layers"]) + plain["other_macs"] * 1024
    assert plain["float_bops"] == 1024 * plain["macs"] and plain["float_weight_bytes"] == 4 * plain["parameters"]


def test_inputs_that_are_none_are_refused():
    with pytest.raises(ValueError, match="`batches` holds a str; expected a tensor"):
        cost(quantize(Attention(), W4A3), "image.png")


def test_channel_scales_are_stored_too():
    tensor, channel = (
        cost(quantize(linear_net(), W4A3.replace(weight_granularity=g)), vectors()) for g in ("tensor", "channel")
    )
    assert channel.weight_bytes - tensor.weight_bytes == 4 * (8 + 8 + 3 - 3)


def test_work_grows_with_the_batch_and_a_shared_layer_counts_every_time():
    layer = nn.Linear(6, 6)
    model = quantize(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 3)), W4A3)
    one, eight = cost(model, vectors(1)), cost(model, vectors(8))
    assert one.layers[0].macs == 2 * 36 and one.parameters == 42 + 21
    assert eight.macs == 8 * one.macs and eight.weight_bytes == one.weight_bytes


def test_a_float_model_costs_what_float_costs():
    found = cost(linear_net(), vectors(1))
    assert found.layers == () and found.macs == 48 + 64 + 24
    assert found.bops == found.float_bops and found.weight_bytes == found.float_weight_bytes
    assert found.quantized_parameters == 0


@pytest.mark.parametrize("quantizer", ["lsq", "lsq_plus", "liq"])
def test_the_packed_model_costs_the_same(quantizer: str):
    model = calibrate(quantize(linear_net(), W4A3.replace(quantizer=quantizer)), [vectors()])
    assert cost(pack(model), vectors()) == cost(model, vectors())


def test_the_packed_file_has_these_bytes(tmp_path):
    model = calibrate(quantize(vit(), W4A3), [torch.randn(2, 3, 16, 16)])
    expected = cost(model, torch.randn(1, 3, 16, 16)).weight_bytes
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in pack(model).state_dict().items()
        if not name.endswith("range_state")
    )
    assert stored == expected


def test_the_model_is_left_as_it_was():
    model = calibrate(quantize(linear_net(), W4A3), [vectors()]).train()
    minimizer = SharpnessAwareMinimizer(model, rho=0.1)
    before = model(vectors())
    cost(model, {"input": vectors()})
    cost(model, (vectors(),))
    assert model.training and torch.equal(model(vectors()), before)
    assert not any(layer._forward_pre_hooks for layer in model)
    minimizer.detach()


def test_as_text():
    config = W4A3.replace(modules_to_not_convert=["float_layer"])
    assert str(cost(quantize(Attention(), config), image())).splitlines() == [
        "                      float32  quantized",
        "bit operations           10 M      5.3 M  1.9 times less",
        "weight bytes           1.72 k        592  2.9 times less",
        "multiply-accumulates   9.77 k     4.65 k  47.6% in quantized layers",
        "parameters                429        328  76.5% in quantized layers",
    ]

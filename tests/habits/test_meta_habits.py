"""Users build models without memory: on the meta device, in `init_empty_weights`, or moved there.

Quantizing, reports, costs and forwards work; what needs values says that there are none.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from quantized_models import assert_same_state, codes, quantized
from tiny_models import conv_net, linear_net, vectors
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, cost, dequantize, pack, quantize

CONFIG = SAQQuantizationConfig()
every_net = pytest.mark.parametrize(
    ("build", "x"), [(linear_net, vectors()), (conv_net, torch.randn(2, 3, 8, 8))], ids=["linear", "conv"]
)


@pytest.mark.parametrize("inside", [False, True], ids=["after_the_block", "in_the_block"])
@pytest.mark.parametrize("block", [lambda: torch.device("meta"), init_empty_weights], ids=["device", "accelerate"])
@every_net
def test_a_model_without_memory_is_quantized_and_loaded(build, x, block, inside: bool):
    """A user builds on the meta device, quantizes, and loads the state of a quantized model."""
    source = quantized(build, x)
    with block():
        net = build()
        if inside:
            quantize(net, CONFIG)
    if not inside:
        quantize(net, CONFIG)
    assert all(p.is_meta for p in net.parameters())
    assert len(net.quantization_report.converted) == len(source.quantization_report.converted)
    net.load_state_dict(source.state_dict(), assign=True)
    assert_same_state(net, source)
    assert torch.equal(net.eval()(x), source(x))


@every_net
def test_float_weights_loaded_later_are_fitted_to(build, x):
    """A user quantizes on the meta device and loads the float state: codes are those of the usual order."""
    plain = build().eval()
    with torch.device("meta"):
        net = quantize(build(), CONFIG)
    net.to_empty(device="cpu").load_state_dict(plain.state_dict(), strict=False)
    quantize(plain, CONFIG)
    found, expected = codes(net), codes(plain)
    assert found and all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(calibrate(net, [x]).eval()(x), calibrate(plain, [x])(x))


@every_net
def test_shapes_gradients_and_costs_on_the_meta_device(build, x):
    """A user moves a quantized or packed model to the meta device to count."""
    net = quantized(build, x)
    expected = cost(net, x)
    packed = pack(net).to("meta")
    net.to("meta")
    assert cost(net, x.to("meta")) == expected
    y = net(x.to("meta"))
    y.sum().backward()
    assert y.shape == packed(x.to("meta")).shape == (len(x), 3)
    assert all(p.grad.shape == p.shape for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "use",
    [pack, dequantize, lambda net: calibrate(net, [vectors()])],
    ids=["pack", "dequantize", "calibrate"],
)
def test_what_needs_values_says_that_there_are_none(use):
    with torch.device("meta"):
        net = quantize(linear_net(), CONFIG)
    with pytest.raises(ValueError, match=r"^Sequential: 0.weight has no values \(device='meta'\); load the model's"):
        use(net)


def test_offloaded_weights_are_told_from_absent_ones():
    """A user packs a quantized model whose weights accelerate keeps elsewhere: the error says how to get them back."""
    net = cpu_offload(nn.Sequential(quantized(linear_net, vectors())), execution_device="cpu")
    with pytest.raises(ValueError, match=r"has no values .* take accelerate's hooks off \(remove_hook_from_module\)"):
        pack(net)


def test_a_weight_that_had_no_values_is_not_blamed_on_calibration():
    """A user gives values by an initialization instead of loading: `calibrate` is not what is missing."""
    with torch.device("meta"):
        net = quantize(linear_net(), SAQQuantizationConfig(activation_bits=None))
    net.to_empty(device="cpu")
    for layer in (net[0], net[2], net[4]):
        nn.init.ones_(layer.weight)
        layer.weight_quantizer.reset()
    with pytest.raises(RuntimeError, match=r"^0.weight_quantizer: .* no range yet\. Its weight had no values when"):
        net(vectors())


def test_a_real_model_is_quantized_where_it_is():
    """A user quantizes a real model inside of `torch.device("meta")`: its quantizers get memory."""
    net, plain = linear_net(), linear_net()
    with torch.device("meta"):
        quantize(net, CONFIG)
    calibrate(net, [vectors()])
    calibrate(quantize(plain, CONFIG), [vectors()])
    assert torch.equal(net(vectors()), plain(vectors()))


def test_a_real_model_in_init_empty_weights_is_refused_unchanged():
    """accelerate would put its weights on the meta device as soon as a new layer takes them."""
    net = linear_net()
    with (
        init_empty_weights(),
        pytest.raises(ValueError, match=r"^0.weight_quantizer: something puts every new .* cpu"),
    ):
        quantize(net, CONFIG)
    assert type(net[0]) is nn.Linear and not net[0].weight.is_meta

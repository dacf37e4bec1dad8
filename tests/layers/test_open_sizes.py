"""Batches without a sample, and batches whose size an export leaves open."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TRANSFORMERS_MODELS, conv_net, images, linear_net, vectors
from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.layers import QuantAttentionProducts
from hf_saq.quantizers import QUANTIZERS, LSQQuantizer, QuantizerSettings

every_name = pytest.mark.parametrize("name", sorted(QUANTIZERS))
every_granularity = pytest.mark.parametrize("granularity", ["tensor", "channel"])


def quantized(net: nn.Module, x: Tensor, name: str = "lsq", granularity: str = "tensor") -> nn.Module:
    quantize(net, SAQQuantizationConfig(quantizer=name, weight_granularity=granularity))
    return calibrate(net, [x])


@every_name
@every_granularity
@pytest.mark.parametrize("shape", [(0, 6), (0, 5, 6), (3, 0, 6)], ids=["batch", "tokens_of_a_batch", "tokens"])
def test_training_on_nothing_gives_gradients_of_zero(name: str, granularity: str, shape):
    net = quantized(linear_net(), vectors(), name, granularity)
    x = torch.empty(shape, requires_grad=True)
    y = net(x)
    assert y.shape == (*shape[:-1], 3)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    for key, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.equal(parameter.grad, torch.zeros_like(parameter)), key


@every_name
@pytest.mark.parametrize("form", ["trainable", "packed"])
def test_inference_on_nothing(name: str, form: str):
    net = quantized(conv_net().eval(), torch.randn(8, 3, 8, 8), name, "channel")
    net = pack(net) if form == "packed" else net
    with torch.no_grad():
        assert net(torch.empty(0, 3, 8, 8)).shape == (0, 3)


def test_attention_products_of_nothing():
    operands = [
        LSQQuantizer(QuantizerSettings(4, "activation", signed=signed)) for signed in (True, True, False, True)
    ]
    for quantizer in operands:
        quantizer.initialize(torch.rand(10))
    products = QuantAttentionProducts(*operands)
    query, key, value = (torch.empty(0, 2, 5, 4, requires_grad=True) for _ in range(3))
    output, _ = products(query, key, value)
    assert output.shape == (0, 5, 2, 4)
    output.sum().backward()
    assert query.grad.shape == (0, 2, 5, 4) and operands[0].scale.grad == 0


def test_the_factor_of_a_scales_gradient_does_not_depend_on_the_batch():
    quantizer = LSQQuantizer(QuantizerSettings(4, "activation"))
    quantizer.initialize(torch.randn(100))
    x = torch.randn(1, 7, 5)
    grads = []
    for count in (1, 2, 3):
        quantizer.scale.grad = None
        quantizer(x.expand(count, -1, -1)).sum().backward()
        grads.append(quantizer.scale.grad / count)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # of transformers itself
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "strict"])
@pytest.mark.parametrize("form", ["trainable", "packed"])
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_an_export_leaves_the_batch_open(family: str, form: str, strict: bool):
    model = quantized(TRANSFORMERS_MODELS[family]().eval(), images(8), "lsq_plus" if family == "vit" else "lsq")
    model = pack(model) if form == "packed" else model
    batch = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (images(4),), dynamic_shapes=batch, strict=strict).module()
    for count in (1, 3, 8):
        torch.testing.assert_close(program(images(count)).logits, model(images(count)).logits)
    if family == "resnet":  # the attention of transformers reshapes with a -1, which is ambiguous for no element
        assert program(images(2)[:0]).logits.shape == model(images(2)[:0]).logits.shape == (0, 3)


@pytest.mark.parametrize("name", ["lsq", "lsq_plus"])
def test_an_export_leaves_the_size_of_images_open(name: str):
    """The factor of LSQ counts pixels: in the forward it would fix their number."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 4, 3))
    quantized(net, torch.randn(4, 3, 8, 8), name)
    sizes = ({2: torch.export.Dim("height", min=6), 3: torch.export.Dim("width", min=6)},)
    program = torch.export.export(net, (torch.randn(2, 3, 9, 8),), dynamic_shapes=sizes).module()
    x = torch.randn(2, 3, 12, 20)
    torch.testing.assert_close(program(x), net(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_training_with_an_open_batch():
    net = quantized(linear_net(), vectors())
    torch._dynamo.reset()
    fast = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (4, 7):
        grads = []
        for run in (net, fast):
            net.zero_grad()
            run(vectors(count)).square().sum().backward()
            grads.append([p.grad for p in net.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)

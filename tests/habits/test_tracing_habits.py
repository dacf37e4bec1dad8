"""Users trace and transform models: `torch.jit.trace`, feature extractors of torchvision, `torch.func`, fake tensors.

Each gives the values and gradients of the model itself, or a clear answer.
"""

from __future__ import annotations

import io

import pytest
import torch
from minimizer_nets import batch, loss_of
from minimizer_nets import linear_net as classifier
from minimizer_nets import quantized as quantized_classifier
from quantized_models import quantized
from tiny_models import conv_net, images, linear_net, vectors, vit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, pack, quantize
from hf_saq.quantizers import QUANTIZERS, affine_fake_quantize
from hf_saq.quantizers.affine import _by_operations
from hf_saq.quantizers.kernels import Grid

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning")
every_quantizer = pytest.mark.parametrize("name", sorted(QUANTIZERS))
every_form = pytest.mark.parametrize("form", ["trainable", "packed"])


def small(name: str = "lsq", seed: int = 0, form: str = "trainable", **fields) -> nn.Module:
    net = quantized(lambda: linear_net(seed), vectors(), quantizer=name, **fields)
    return pack(net) if form == "packed" else net


def pictures(size: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def gradients_of(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(net(x).square().sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


# The operations that stand in for our autograd functions where those are not understood --------------------------


@pytest.mark.parametrize("through_rounding", [True, False], ids=["", "pact"])
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
@pytest.mark.parametrize("shape", [(1,), (3, 1)], ids=["tensor", "channel"])
def test_operations_give_the_values_and_gradients_of_the_function(shape, offset: bool, through_rounding: bool):
    """Also exactly at the ends of the grid and below the floor of a scale; values to the bit."""
    scale = torch.full(shape, 0.25, dtype=torch.float64)
    scale[-1] = 1e-9 if scale.numel() > 1 else 0.25
    o = torch.full(shape, -0.5, dtype=torch.float64) if offset else None
    x = torch.randn(3, 40, dtype=torch.float64) * 3
    x[:, :4] = torch.tensor([-8, 7, -8.2, 7.2]) * 0.25 + (-0.5 if offset else 0)
    x[0, 4:6] = torch.tensor([torch.inf, -torch.inf])
    leaves = [t.requires_grad_() for t in (x, scale, o) if t is not None]
    upstream = torch.randn(3, 40, dtype=torch.float64)
    expected = affine_fake_quantize(x, scale, o, -8, 7, 0.37, through_rounding)
    found = _by_operations(x, scale, o, Grid(-8, 7, through_rounding), 0.37)
    assert torch.equal(found, expected)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (found, expected)), strict=True):
        assert_close(a.nan_to_num(), b.nan_to_num(), rtol=1e-10, atol=1e-10)


# torch.jit.trace -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@every_quantizer
@every_form
def test_a_traced_model_is_stored_and_gives_its_logits(name: str, form: str):
    """A user traces a model for a C++ program: the stored trace gives the model's logits for another batch size."""
    net, x = small(name, form=form), vectors(5, seed=3)
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(net, vectors()), stream)
    stream.seek(0)
    assert torch.equal(torch.jit.load(stream)(x), net(x))


def test_a_trace_has_the_gradients_of_the_model():
    """A user trains what was traced: LSQ's gradients, not those of a rounding, which are zero."""
    net, x = small(), vectors(5, seed=3)
    traced = torch.jit.trace(net, x)
    expected = gradients_of(net, x)
    for name, found in gradients_of(traced, x).items():
        assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is_gradient_checkpointing.*:FutureWarning")
@every_form
def test_a_traced_vit(form: str):
    net = quantized(vit, quantize_attention=True)
    net = pack(net) if form == "packed" else net
    x = images(3, seed=4)
    assert_close(torch.jit.trace(net, images(2), strict=False, check_trace=False)(x)["logits"], net(x).logits)


# torch.fx ------------------------------------------------------------------------------------------------------------


@every_form
def test_a_feature_extractor_of_torchvision(form: str):
    """A user takes features from a quantized ResNet: they are those inside of the model, at any size of image."""
    torch.manual_seed(0)
    net = quantize(ResNet(BasicBlock, [1, 1, 1, 1], 3).eval(), SAQQuantizationConfig(scale_init="mean"))
    calibrate(net, [pictures(32)])
    net = (pack(net) if form == "packed" else net).eval()
    features = create_feature_extractor(net, {"layer1.0.conv1": "early", "fc": "logits"}).eval()
    x, seen = pictures(40), []
    net.layer1[0].conv1.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = net(x)
    found = features(x)
    assert torch.equal(found["logits"], expected) and torch.equal(found["early"], seen[0])


def test_layers_are_leaves_that_train():
    """A user trains a graph of `torch.fx`: it calls the quantized layers themselves, in training mode too."""
    net, x = small().train(), vectors(5, seed=3)
    graph = torch.fx.symbolic_trace(net)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", *5 * ["call_module"], "output"]
    assert graph.get_submodule("0") is net[0]
    expected = gradients_of(net, x)
    for name, found in gradients_of(graph, x).items():
        assert torch.equal(found, expected[name])


# torch.func ----------------------------------------------------------------------------------------------------------


def parts(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {name: p.detach() for name, p in net.named_parameters()}, dict(net.named_buffers())


@every_quantizer
def test_gradients_of_single_samples_add_up(name: str):
    """A user computes `vmap(grad(...))` of each sample: their sum is the gradient of the batch."""
    net, x = small(name), vectors(5, seed=3)
    parameters, buffers = parts(net)

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(net, (values, buffers), (sample[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for key, expected in gradients_of(net, x).items():
        assert_close(each[key].sum(0), expected, rtol=1e-4, atol=1e-4)


@every_quantizer
@every_form
def test_vmap_over_samples(name: str, form: str):
    net, x = small(name, form=form), vectors(5, seed=3)
    assert_close(vmap(net)(x), net(x))


def test_the_forward_gradient_is_the_transposed_one():
    """`jvp` in a direction, against the gradient of the same sum by backward."""
    net = small()
    x, direction = vectors(5, seed=3).requires_grad_(), vectors(5, seed=4)
    _, found = jvp(lambda t: net(t).sum(), (x,), (direction,))
    (backward,) = torch.autograd.grad(net(x).sum(), x)
    assert_close(found, (backward * direction).sum(), rtol=1e-4, atol=1e-5)


def test_a_jacobian_of_many_gradients_at_once():
    net, x = small(), vectors(3, seed=3)
    fast, slow = (torch.autograd.functional.jacobian(net, x, vectorize=v) for v in (True, False))
    assert_close(fast, slow, rtol=1e-5, atol=1e-6)


def test_an_ensemble():
    """A user runs several models as one, with the skeleton on the meta device, as the documentation of torch says."""
    nets, x = [small(seed=seed) for seed in range(3)], vectors(5, seed=3)
    values = stack_module_state(nets)
    skeleton = small().to("meta")

    def run(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return functional_call(skeleton, (parameters, buffers), (x,))

    assert_close(vmap(run)(*values), torch.stack([net(x) for net in nets]))


def test_an_ensemble_of_models_with_different_signs_is_refused():
    """One code runs for all, and codes have one sign: the error names the quantizer and says what to do."""
    nets = [quantize(linear_net(seed), SAQQuantizationConfig()) for seed in range(2)]
    for net, x in zip(nets, (vectors(), vectors().abs()), strict=True):
        calibrate(net, [x])
    parameters, buffers = stack_module_state(nets)
    inputs = vectors()
    with pytest.raises(
        ValueError, match=r"^0.activation_quantizer: .* \[50, 100\] .*the one they run in 100; .*'sign"
    ):
        vmap(lambda p, b: functional_call(nets[0], (p, b), (inputs,)))(parameters, buffers)


def test_a_first_pass_by_torch_func_is_refused():
    """A user computes gradients by `torch.func.grad` in the first pass: nothing would reach the perturbation."""
    net = quantized_classifier(classifier)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    parameters, buffers = parts(net)
    with pytest.raises(RuntimeError, match=r"^0.weight_quantizer: a first pass inside .*Call loss.backward\(\)"):
        with minimizer.ascent():
            grad(lambda p: loss_of(lambda x: functional_call(net, (p, buffers), (x,)), batch(net)))(parameters)


# Fake tensors --------------------------------------------------------------------------------------------------------


@every_form
def test_shapes_by_fake_tensors(form: str):
    """A user asks for the shape of an output without computing it; tracing with fake tensors computes the same."""
    net, x = quantized(conv_net, pictures()), pictures(seed=2)
    net = pack(net) if form == "packed" else net
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert net(mode.from_tensor(x)).shape == (2, 3)
    graph = make_fx(net, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    assert torch.equal(graph(x), net(x))


def test_quantize_among_fake_tensors():
    """A user builds and quantizes in a `FakeTensorMode`: the report is that of the real model."""
    with FakeTensorMode():
        faked = quantize(conv_net(), SAQQuantizationConfig())
    assert str(faked.quantization_report) == str(quantize(conv_net(), SAQQuantizationConfig()).quantization_report)

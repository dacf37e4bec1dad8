"""What a quantized layer keeps for the backward pass, and that recomputing changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.layers import quantized as base


class Net(nn.Module):
    """Convolution, normalization and linear layers, two of which read the same input."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", groups=4)
        self.norm = nn.LayerNorm(8)
        self.left, self.right = nn.Linear(8, 16), nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.circular(self.stem(x).relu()).relu().flatten(2).mT
        x = self.norm(x)
        return self.head(nn.functional.gelu(self.left(x) * self.right(x)))


QUANTIZERS = ["lsq", "lsq_plus", "liq", "pact", "dorefa"]


def models(quantizer: str = "lsq", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = Net().to(dtype), torch.randn(16, 3, 12, 12, dtype=dtype)
    config = SAQQuantizationConfig(weight_bits=4, activation_bits=4, first_last_bits=None, quantizer=quantizer)
    quantized = quantize(copy.deepcopy(model), config)
    calibrate(quantized, [x])
    return model, quantized.train(), x


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps beyond the parameters and the batch, each storage once."""
    not_counted = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    sizes: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        kept.append(t.detach())
        if t.untyped_storage().data_ptr() not in not_counted:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        model(x).square().sum().backward()
    return sum(sizes.values())


@pytest.fixture
def kept(monkeypatch):
    """Call it, and layers keep their quantized inputs as autograd would."""
    from contextlib import nullcontext

    return lambda: monkeypatch.setattr(base, "operand_recomputed", lambda *_: nullcontext())


def test_activations_of_a_quantized_model_take_what_those_of_the_float_model_take(kept):
    model, quantized, x = models()
    floats, recomputed = kept_bytes(model, x), kept_bytes(quantized, x)
    weights = 4 * sum(m.weight.numel() for m in quantized.modules() if isinstance(m, base.QuantizedLayer))
    few = 100 * 4 * sum(1 for _ in quantized.parameters())  # step sizes
    # The padded input of the circular convolution is a copy that cannot be recomputed; the float model has it too.
    extra = 16 * 8 * 12 * 12 * 4  # x before padding, which the float model's ReLU keeps as its result
    assert recomputed <= floats + weights + few + extra
    kept()
    assert kept_bytes(quantized, x) > 1.3 * recomputed


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "bfloat16"])
def test_gradients_are_those_of_kept_inputs_to_the_bit(quantizer: str, autocast: bool, kept):
    _, quantized, x = models(quantizer)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        recomputed = gradients(quantized, x)
        kept()
        expected = gradients(quantized, x)
    assert recomputed.keys() == expected.keys() and len(expected) > 10
    for name, gradient in expected.items():
        assert torch.equal(recomputed[name], gradient), name


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_under_checkpointing(reentrant: bool):
    _, quantized, x = models()
    expected = gradients(quantized, x)
    actual = gradients(Checkpointed(quantized, reentrant), x)
    for name, gradient in expected.items():
        assert torch.equal(actual[f"model.{name}"], gradient), name


def test_checkpointing_keeps_the_input_alone():
    _, quantized, x = models()
    assert kept_bytes(Checkpointed(quantized, False), x) < 0.2 * kept_bytes(quantized, x)


def test_under_offloading_and_where_hooks_are_forbidden():
    _, quantized, x = models()
    expected = gradients(quantized, x)
    with save_on_cpu():
        offloaded = gradients(quantized, x)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        forbidden = gradients(quantized, x)
    for name, gradient in expected.items():
        assert torch.equal(offloaded[name], gradient) and torch.equal(forbidden[name], gradient), name


class Pictures(nn.Module):
    """Convolutions whose outputs keep the layout of their input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def come_back_contiguous() -> saved_tensors_hooks:
    """What `save_on_cpu(pin_memory=True)` does where there is a GPU: the layout is lost on the way."""
    return saved_tensors_hooks(lambda t: torch.empty(t.size(), dtype=t.dtype).copy_(t), lambda t: t)


@pytest.mark.parametrize("hooks", [save_on_cpu, come_back_contiguous], ids=["save_on_cpu", "contiguous"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["", "channels_last"])
def test_offloading_keeps_the_gradients_in_every_layout(layout: torch.memory_format, hooks):
    config = SAQQuantizationConfig(weight_bits=4, activation_bits=4, first_last_bits=None)
    net = quantize(Pictures().to(memory_format=layout), config).train()
    x = torch.randn(4, 3, 8, 8).contiguous(memory_format=layout)
    calibrate(net, [x])
    expected = gradients(net, x)
    with hooks():
        offloaded = gradients(net, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(offloaded[name], gradient, rtol=1e-5, atol=1e-5)


def test_without_addresses_only_the_quantized_input_is_recomputed():
    """Meta and fake tensors have no address: the weight must not be taken for the input."""
    _, quantized, x = models()
    meta = copy.deepcopy(quantized).to("meta")
    kept: list[tuple[int, ...]] = []
    with saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        meta.head(torch.empty(5, 16, device="meta"))
    # The input twice, for its quantizer and as the product's recipe; the latent and the quantized weight.
    assert sorted(kept) == [(1,), (1,), (4, 16), (5, 16), (5, 16), (16, 4)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = quantized(mode.from_tensor(x))  # asking for an address would warn, which is an error here
    assert y.shape == (16, 144, 4)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in_place"])
def test_a_hook_that_changes_the_quantized_input_is_respected(in_place: bool, kept):
    _, quantized, x = models()

    def shift(module: nn.Module, args: tuple, x_q: Tensor) -> Tensor:
        return x_q.add_(0.5) if in_place else x_q + 0.5

    quantized.head.activation_quantizer.register_forward_hook(shift)
    actual = gradients(quantized, x)
    kept()
    for name, gradient in gradients(quantized, x).items():
        assert torch.equal(actual[name], gradient), name


def test_second_derivatives(kept):
    _, quantized, x = models(dtype=torch.float64)
    weights = [quantized.head.weight, quantized.left.weight, quantized.stem.activation_quantizer.scale]

    def hessian_product() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(quantized(x).square().sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), weights)

    actual = hessian_product()
    kept()
    for a, e in zip(actual, hessian_product(), strict=True):
        assert torch.equal(a, e) and (e != 0).any()

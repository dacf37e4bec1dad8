"""Readers of the same tensor compute what they would with a quantizer each of the same scale."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_models import quantized
from sharing_models import (
    GROUPS,
    LABELS,
    activation_quantizers,
    quantized_two,
    readers,
    written_to_between,
)
from tiny_models import images, vit
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from hf_saq import SAQQuantizationConfig, pack, quantize
from hf_saq.layers.shared_input import SharedInput


def test_values_and_gradients_are_those_of_one_scale_read_three_times():
    """Against separate quantizers of equal scales: equal outputs; the gradient of the one scale is their sum."""
    shared = quantized(share_inputs=True).train()
    apart = quantize(vit(), SAQQuantizationConfig())
    state = shared.state_dict()
    for group in GROUPS:
        first = f"{group[0]}.activation_quantizer."
        values = {name.removeprefix(first): value for name, value in state.items() if name.startswith(first)}
        state.update({f"{name}.activation_quantizer.{key}": v for name in group for key, v in values.items()})
    apart.load_state_dict(state)
    calls = []
    for quantizer in activation_quantizers(shared):
        quantizer.register_forward_hook(lambda quantizer, *_: calls.append(quantizer.path))
    losses = [model(images(), labels=LABELS).loss for model in (shared, apart)]
    assert torch.equal(*losses)
    assert len(calls) == len(set(calls)) == len(activation_quantizers(apart)) - 4
    for loss in losses:
        loss.backward()
    for name, parameter in shared.named_parameters():
        group = next((g for g in GROUPS if name == f"{g[0]}.activation_quantizer.scale"), None)
        names = [f"{member}.activation_quantizer.scale" for member in group] if group else [name]
        expected = sum(apart.get_parameter(other).grad for other in names)
        # Order of sums alone differs: the three gradients meet before the quantizer, or behind it.
        assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
    assert all(layer.shared_input._kept is None for layer in readers(shared)), "kept longer than needed"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(reentrant):
    grads = []
    for checkpointed in (False, True):
        model = quantized(share_inputs=True).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(images(), labels=LABELS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_tensor_written_to_is_quantized_anew():
    shared, x, seen = SharedInput(2), torch.ones(2), []
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)

    def quantize_x(t):
        seen.append(t.clone())
        return t * 2

    assert shared.once(a, x, quantize_x) is shared.once(b, x, quantize_x)
    assert shared._kept is None
    first = shared.once(a, x, quantize_x)
    x.add_(1)
    assert torch.equal(shared.once(b, x, quantize_x), x * 2) and shared.once(a, x, quantize_x) is not first
    scale = nn.Parameter(torch.ones(1))
    first = shared.once(a, x, quantize_x, [scale])
    with torch.no_grad():
        scale.add_(1)
    assert shared.once(b, x, quantize_x, [scale]) is not first
    first = shared.once(a, x, quantize_x)
    assert shared.once(a, x, quantize_x) is not first, "a reader that asks again is in another forward"
    with torch.no_grad():
        assert shared.once(b, x, quantize_x) is not first
    assert copy.deepcopy(shared)._kept is None
    with torch.inference_mode():  # nothing counts writes to these
        y = torch.ones(2)
        shared.once(a, y, quantize_x)
        assert torch.equal(shared.once(b, y.add_(1), quantize_x), y * 2)


def test_writes_between_two_readers_are_seen_in_every_mode():
    model, x = quantized_two(written_to_between).eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_a_reader_that_runs_twice_and_a_second_pass():
    """The second pass of SAM has the same inputs and, where only weights are perturbed, the same scales."""
    model, x = quantized_two(lambda net, x: net.a(x) + net.a(x) + net.b(x)).train(), torch.randn(4, 3, 8, 8)
    features = model.stem(x).detach().requires_grad_()
    for _ in range(2):
        model.how(model, features).sum().backward()


def test_readers_in_checkpointed_regions_of_their_own():
    """What a region saves must be its own: it is made again alone."""

    def apart(net, x):
        parts = [nn.Sequential(net.a, nn.Tanh()), nn.Sequential(net.b, nn.Tanh())]
        if not net.training:
            return parts[0](x) + parts[1](x)
        return sum(checkpoint(part, x, use_reentrant=False) for part in parts)

    grads = []
    for training in (True, False):
        torch.manual_seed(0)
        model = quantized_two(apart).train(training)
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


def test_interrupted_forwards_leave_nothing_wrong_behind():
    model = quantized(share_inputs=True)
    expected = model(images()).logits
    query, key, _ = readers(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        query(x)  # and nobody else
        query.activation_quantizer.scale.mul_(2)
        assert torch.equal(key(x), nn.functional.linear(key.activation_quantizer(x), key.quantized_weight(), key.bias))
        query.activation_quantizer.scale.div_(2)
    assert torch.equal(model(images()).logits, expected)


@pytest.mark.slow
def test_compiled_models_compute_the_same():
    model = quantized(share_inputs=True)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(images()).logits, model(images()).logits)


def test_data_parallel_is_refused():
    """What `nn.DataParallel` does to each module, on several GPUs."""
    readers(quantized())[0]._replicate_for_data_parallel()
    sharing = quantized(share_inputs=True)
    for layer in (readers(sharing)[1], readers(pack(sharing))[1]):
        with pytest.raises(ValueError, match=r"q_proj.activation_quantizer: nn.DataParallel copies .*share_inputs"):
            layer._replicate_for_data_parallel()

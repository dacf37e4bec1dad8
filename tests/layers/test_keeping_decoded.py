"""Packed layers that keep their decoded weight: same results, no state, decoded again whenever codes may be others."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from quantized_models import quantized
from tiny_models import images, linear_net, vectors, vit

from hf_saq import keep_decoded, pack
from hf_saq.layers import PackedLayer


@pytest.fixture
def packed():
    return pack(quantized(vit, weight_bits=4))


def decodings(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the layers that decode from now on, one entry for each time."""
    found: list[str] = []
    original = PackedLayer.quantized_weight

    def counted(layer: PackedLayer) -> torch.Tensor:
        found.append(layer.path)
        return original(layer)

    monkeypatch.setattr(PackedLayer, "quantized_weight", counted)
    return found


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(images(2)).logits


def test_weights_are_decoded_once_and_results_stay(packed, monkeypatch):
    expected, state = logits(packed), {k: v.clone() for k, v in packed.state_dict().items()}
    layers = [m for m in packed.modules() if isinstance(m, PackedLayer)]
    assert keep_decoded(packed) == 4 * sum(torch.Size(layer.weight_shape).numel() for layer in layers)
    found = decodings(packed, monkeypatch)
    assert torch.equal(logits(packed), expected) and len(found) == len(layers)
    assert torch.equal(logits(packed), expected) and len(found) == len(layers)
    assert packed.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in packed.state_dict().items())
    keep_decoded(packed, False)
    assert torch.equal(logits(packed), expected) and len(found) == 2 * len(layers)
    assert not any(layer._decoded for layer in layers)


def test_other_codes_are_decoded_again(packed):
    keep_decoded(packed)
    before = logits(packed)
    layer = next(m for m in packed.modules() if isinstance(m, PackedLayer))
    other = {k: v.clone() for k, v in packed.state_dict().items()}
    changed = next(name for name in other if name.endswith("packed_weight"))
    other[changed] ^= 0xFF
    for change in (
        lambda: packed.load_state_dict(other),
        lambda: layer.weight_scale.mul_(2),
        lambda: setattr(layer, "weight_scale", layer.weight_scale * 2),
        lambda: packed.load_state_dict(other, assign=True),
    ):
        change()
        now = logits(packed)
        assert torch.equal(now, logits(copy.deepcopy(packed))) and not torch.equal(now, before)
        before = now
    packed.bfloat16()
    with torch.no_grad():
        assert packed(images(2).bfloat16()).logits.dtype == torch.bfloat16


def test_copies_and_pickles_carry_no_decoded_weight(packed):
    keep_decoded(packed)
    expected = logits(packed)
    for made in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        kept = [m for m in made.modules() if isinstance(m, PackedLayer)]
        assert all(layer.keeps_decoded and layer._decoded is None for layer in kept)
        assert torch.equal(logits(made), expected)
    assert len(pickle.dumps(packed)) == len(pickle.dumps(copy.deepcopy(packed)))


def test_a_weight_decoded_in_inference_mode_serves_a_backward_pass():
    model = pack(quantized(linear_net, vectors(), weight_bits=4))
    keep_decoded(model)
    layer = next(m for m in model.modules() if isinstance(m, PackedLayer))
    x = torch.randn(2, layer.weight_shape[1])
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    layer.keep_decoded(False)
    expected, x.grad = x.grad, None
    layer(x).sum().backward()
    assert torch.equal(x.grad, expected) and expected.any()


def test_what_inference_mode_made_is_decoded_each_time(packed, monkeypatch):
    """Nothing counts writes to its tensors."""
    with torch.inference_mode():
        model = copy.deepcopy(packed)
        keep_decoded(model)
        found = decodings(model, monkeypatch)
        once = logits(model)
        count = len(found)
        next(m for m in model.modules() if isinstance(m, PackedLayer)).weight_scale.mul_(2)
        assert not torch.equal(logits(model), once) and len(found) == 2 * count


def test_a_model_that_is_not_packed_is_refused():
    with pytest.raises(ValueError, match="is not packed; expected a model made by `pack`"):
        keep_decoded(quantized(linear_net, vectors(), weight_bits=4))

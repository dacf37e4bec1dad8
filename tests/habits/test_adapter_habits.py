"""Users train adapters of peft. They are merged into the float model before it is quantized; all else is refused."""

from __future__ import annotations

import pytest
import torch
from quantized_models import codes, quantized
from tiny_models import images, vit
from torch import nn
from training import Images, arguments

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, calibrate, dequantize, pack, quantize

peft = pytest.importorskip("peft")

CONFIG = SAQQuantizationConfig(weight_bits=4, activation_bits=8)
MESSAGE = r"{}: .* has adapters of peft, for example at .*(_proj|classifier); expected .* `merge_and_unload\(\)`"


def lora(**fields):
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **fields)


def wrapped(model: nn.Module, **fields) -> nn.Module:
    return peft.get_peft_model(model, lora(**fields))


def with_adapter(model: nn.Module) -> nn.Module:
    model.add_adapter(lora())
    return model


@pytest.mark.parametrize("adapt", [wrapped, with_adapter], ids=["get_peft_model", "add_adapter"])
def test_a_float_model_with_adapters_is_not_quantized(adapt):
    """Else the two thin factors would be quantized one by one, the second of them zero at first."""
    model = adapt(vit())
    with pytest.raises(ValueError, match=MESSAGE.format("quantize")):
        quantize(model, CONFIG)
    with pytest.raises(ValueError, match=MESSAGE.format("quantize")):
        quantize(next(m for m in model.modules() if type(m).__name__ == "ViTModel"), CONFIG)  # nor is a part of it


def test_merged_adapters_are_weights():
    """A user does as told: the merged model is quantized as any other."""
    merged = wrapped(vit()).merge_and_unload()
    plain = vit()
    plain.load_state_dict(merged.state_dict())
    found, expected = (codes(quantize(model, CONFIG)) for model in (merged, plain))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["classifier"]}], ids=["lora", "modules_to_save"])
@pytest.mark.parametrize("case", [None, 3])
def test_adapters_on_a_quantized_model_are_not_trained(fields, case, tmp_path):
    """What `save_model` would write of them loads nowhere, and merging them moves the logits."""
    model = wrapped(quantized(weight_bits=4), **fields)
    with pytest.raises(ValueError, match=MESSAGE.format("SAQTrainer")):
        SAQTrainer(model, arguments(tmp_path), saq_config=SAQConfig(case=case), train_dataset=Images(8, torch.float32))


@pytest.mark.parametrize("change", [pack, dequantize], ids=["pack", "dequantize"])
def test_a_quantized_model_with_adapters_has_no_other_form(change):
    with pytest.raises(ValueError, match=MESSAGE.format(change.__name__)):
        change(wrapped(quantized(weight_bits=4)))


def test_a_quantized_model_with_adapters_is_not_calibrated():
    with pytest.raises(ValueError, match=MESSAGE.format("calibrate")):
        calibrate(wrapped(quantize(vit(), CONFIG)), [{"pixel_values": images()}])


def test_unloaded_adapters_leave_the_quantized_model_as_it_was():
    """A user takes them off again: the model is the one from before, and packs."""
    model = quantized(weight_bits=4)
    before = model(images()).logits
    restored = wrapped(model).unload()
    assert torch.equal(restored(images()).logits, before)
    pack(restored)

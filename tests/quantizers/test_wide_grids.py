"""A model goes to bfloat16 or float16, its grids stay in float32: what it computes is what `pack` stores."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tiny_models import TRANSFORMERS_MODELS, images, jitter
from torch import Tensor, nn
from training import BATCH, Images, arguments
from transformers import AutoModelForImageClassification

from hf_saq import SAQQuantizationConfig, SAQTrainer, calibrate, pack, quantize
from hf_saq.layers import PackedLayer, QuantizedLayer
from hf_saq.quantizers import QUANTIZERS, Quantizer, QuantizerSettings, quantizer_class

NARROW: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to_bfloat16": lambda m: m.to(torch.bfloat16),
    "to_float16_and_device": lambda m: m.to("cpu", torch.float16),
    "half": lambda m: m.half(),
    "type": lambda m: m.type(torch.bfloat16),
}
every_way = pytest.mark.parametrize("narrow", NARROW.values(), ids=NARROW)
every_name = pytest.mark.parametrize("name", sorted(QUANTIZERS))


def quantized(family: str = "vit", **config) -> nn.Module:
    model = TRANSFORMERS_MODELS[family]()
    quantize(model, SAQQuantizationConfig(**{"weight_bits": 8, "activation_bits": 8, **config}))
    return jitter(calibrate(model, [{"pixel_values": images(8)}]))


def grids(model: nn.Module) -> dict[str, Tensor]:
    """Everything that quantizers and packed layers store, by name, but the weight itself."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, module in model.named_modules()
        if isinstance(module, (Quantizer, PackedLayer))
        for key, tensor in module.state_dict().items()
        if key not in ("weight", "bias")
    }


def assert_kept(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = grids(model)
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


@every_name
@every_way
@pytest.mark.parametrize("role", ["weight", "activation"])
def test_no_value_of_a_quantizer_is_narrowed(name: str, narrow, role):
    shape = (5, 1) if role == "weight" else (1,)
    quantizer = quantizer_class(name)(QuantizerSettings(8, role, True, shape))
    quantizer.initialize(torch.randn(5, 40))
    for parameter in quantizer.parameters():
        parameter.grad = torch.full_like(parameter, 1 / 3)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    assert narrow(quantizer) is quantizer
    for key, value in quantizer.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key]), key
    for parameter in quantizer.parameters():
        assert torch.equal(parameter.grad, torch.full(parameter.shape, 1 / 3))


@every_name
def test_wider_types_pass_through(name: str):
    quantizer = quantizer_class(name)(QuantizerSettings(8, "weight")).double()
    assert {p.dtype for p in quantizer.parameters()} == {torch.float64}
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.fill_(1 / 3)
    quantizer.to(torch.bfloat16)
    for parameter in quantizer.parameters():
        assert torch.equal(parameter, torch.tensor([1 / 3]))  # in float32, rounded once


@every_way
@pytest.mark.parametrize("form", ["trainable", "packed"])
def test_there_and_back_changes_no_grid(narrow, form: str):
    model = quantized("resnet", quantizer="liq", weight_bits=4)
    if form == "packed":
        model = pack(model)
    before = grids(model)
    narrow(model)
    assert model.dtype in (torch.bfloat16, torch.float16)
    assert_kept(model, before)
    assert_kept(model.float(), before)


def test_packed_grids_widen_too():
    model = pack(quantized(activation_bits=None))  # activations near the middle of two codes may round either way
    logits = model(images()).logits
    model.double()
    assert all(m.weight_scale.dtype == torch.float64 for m in model.modules() if isinstance(m, PackedLayer))
    assert all(m.packed_weight.dtype == torch.uint8 for m in model.modules() if isinstance(m, PackedLayer))
    torch.testing.assert_close(model(images().double()).logits.float(), logits, rtol=1e-4, atol=1e-4)


@every_name
def test_eight_bit_weights_of_a_bfloat16_model_lie_on_the_grid_that_pack_stores(name: str):
    model = quantized(quantizer=name)
    scales = {key: value for key, value in grids(model).items() if "weight_quantizer" in key}
    model.to(torch.bfloat16)
    packed = pack(model)
    layers = {key: m for key, m in model.named_modules() if isinstance(m, QuantizedLayer)}
    assert layers
    for key, layer in layers.items():
        stored = packed.get_submodule(key)
        grid = stored.codes() * stored.weight_scale + (0 if stored.weight_offset is None else stored.weight_offset)
        assert torch.equal(layer.quantized_weight(), grid.bfloat16()), key
        if f"{key}.weight_quantizer.scale" in scales:
            assert torch.equal(stored.weight_scale, scales[f"{key}.weight_quantizer.scale"])
    x = images().bfloat16()
    assert torch.equal(packed(x).logits, model.eval()(x).logits)


@pytest.mark.parametrize("form", ["trainable", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_a_checkpoint_loaded_in_a_narrow_type_keeps_its_grids(form: str, dtype: torch.dtype, tmp_path):
    model = quantized("resnet", quantizer="lsq_plus")
    if form == "packed":
        model = pack(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for name, p in loaded.named_parameters() if "quantizer" not in name} == {dtype}
    assert_kept(loaded, grids(model))


@pytest.mark.parametrize("form", ["trainable", "packed"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_saved_in_bfloat16_loads_in_bfloat16(form: str, when: str, tmp_path):
    """Its first layer has no bias: in packed form a step size would be the first parameter that transformers sees."""
    model = quantized("resnet") if when == "after" else TRANSFORMERS_MODELS["resnet"]().bfloat16()
    if when == "before":
        quantize(model, SAQQuantizationConfig())
        calibrate(model, [{"pixel_values": images(8).bfloat16()}])
    model = model.bfloat16().eval()
    if form == "packed":
        model = pack(model)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert_kept(loaded, grids(model))
    assert torch.equal(loaded(images().bfloat16()).logits, model(images().bfloat16()).logits)


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_in_a_narrow_type_changes_no_grid(option: str, tmp_path):
    model = quantized()
    before = copy.deepcopy(grids(model))
    trainer = SAQTrainer(
        model,
        arguments(tmp_path, **{option: True}),
        eval_dataset=Images(BATCH, torch.bfloat16 if "b" in option else torch.half),
    )
    trainer.evaluate()
    assert model.vit.layers[0].mlp.fc1.weight.dtype in (torch.bfloat16, torch.float16)
    assert_kept(model, before)

"""Back from quantized and packed models: plain float ones, and ones that can be trained again."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from matrices import matrix
from processes import run_python
from quantized_models import assert_same_codes, codes, quantized, storages
from safetensors.torch import load_file
from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from tiny_models import conv_net, images, jitter, linear_net, resnet, seeded, vectors, vit
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig
from transformers.pytorch_utils import Conv1D

from hf_saq import SAQQuantizationConfig, calibrate, dequantize, pack, quantize, unpack
from hf_saq.conversion.forms import is_packed
from hf_saq.layers import PackedLayer, QuantizedLayer
from hf_saq.quantizers import QUANTIZERS

FAMILIES = {"vit": vit, "resnet": resnet}  # layer norms and legacy names on disk; batch norms and convolutions
each_family = pytest.mark.parametrize("build", FAMILIES.values(), ids=FAMILIES)
either = pytest.mark.parametrize("form", [lambda model: model, pack], ids=["quantized", "packed"])


class Scaled(nn.Linear):
    """Adds a constructor and what that leaves behind, and nothing else."""

    def __init__(self, width: int, note: str):
        super().__init__(width, width)
        self.note = note


def every_layer(seed: int = 0) -> nn.Sequential:
    """`(batch, 3, 8, 8) -> (batch, 5)`, one layer of each class that can be quantized."""
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
            Conv2dSame(4, 4, 3, stride=2, bias=False),
            nn.Flatten(2),
            nn.Conv1d(4, 4, 3, stride=2, dilation=2),
            nn.Flatten(),
            nn.Linear(24, 8),
            TimmLinear(8, 6),
            Conv1D(5, 6),
            Scaled(5, note="kept"),
        )


def module_names(model: nn.Module) -> set[str]:
    return {type(module).__module__.split(".")[0] for module in model.modules()}


def grid_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Quantized weights by name of the layer, from codes and grid."""
    return {
        name: layer.weight_quantizer.dequantize(layer.weight_quantizer.quantize(layer.weight), layer.weight)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None
    }


# To plain float ----------------------------------------------------------------------------------------------------


@either
@each_family
def test_weights_are_the_grid_values_in_the_original_classes(build, form):
    model = quantized(build, images())
    expected = grid_values(model)
    restored = dequantize(form(model))
    original = build()
    assert [(n, type(m)) for n, m in restored.named_modules()] == [(n, type(m)) for n, m in original.named_modules()]
    assert "hf_saq" not in module_names(restored)
    assert [n for n, _ in restored.named_parameters()] == [n for n, _ in original.named_parameters()]
    assert all(p.requires_grad for p in restored.parameters())
    state = restored.state_dict()
    for name, value in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and layer in expected:
            torch.testing.assert_close(state[name], expected[layer], rtol=1e-6, atol=1e-7)
        elif "_quantizer" not in name:
            assert torch.equal(state[name], value), name


@either
def test_without_activation_quantization_the_function_stays(form):
    model = quantized(vit, images(), activation_bits=None)
    x = images(seed=1)
    torch.testing.assert_close(dequantize(form(model))(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)


@either
def test_layers_of_every_class(form):
    model = quantized(every_layer, images(size=8), activation_bits=None, weight_granularity="channel")
    restored = dequantize(form(model))
    assert [type(layer) for layer in restored] == [type(layer) for layer in every_layer()]
    assert restored[8].note == "kept" and repr(restored) == repr(every_layer())
    x = images(size=8, seed=1)
    torch.testing.assert_close(restored(x), model(x), rtol=1e-5, atol=1e-6)


SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
for directory in sys.argv[1:]:
    model, info = AutoModelForImageClassification.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    save_file({"logits": model(load_file(f"{directory}/x.st")["x"]).logits.detach()}, f"{directory}/logits.st")
assert not any(name.startswith("hf_saq") for name in sys.modules)
"""


def test_what_it_saves_is_an_ordinary_checkpoint(tmp_path):
    """Read by a process that never imports this package; also what `model.dequantize()` of transformers leaves."""
    from safetensors.torch import save_file

    x, logits = images(seed=1), {}
    for family, build in FAMILIES.items():
        pack(quantized(build, images(), quantize_attention=family == "vit")).save_pretrained(tmp_path / "packed")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
        restored = {"ours": dequantize(loaded), "theirs": loaded.dequantize()}
        assert restored["theirs"] is loaded and not hasattr(loaded, "hf_quantizer") and not loaded.is_quantized
        for how, model in restored.items():
            assert "hf_saq" not in module_names(model)
            directory = tmp_path / f"{family}-{how}"
            model.save_pretrained(directory)
            assert "quantization_config" not in json.loads((directory / "config.json").read_text())
            save_file({"x": x}, directory / "x.st")
            logits[directory] = model(x).logits
    run_python("-c", SCRIPT, *logits)
    for directory, expected in logits.items():
        # Mapped tensors lie at odd addresses, where a convolution may round differently.
        torch.testing.assert_close(load_file(directory / "logits.st")["logits"], expected, rtol=1e-5, atol=1e-6)


def test_dtype_of_transformers_dequantize(tmp_path):
    pack(quantized(vit, images())).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.dequantize(dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="first quantize your model"):
        model.dequantize()


@either
@pytest.mark.parametrize("back", [dequantize, lambda model: unpack(pack(model) if not is_packed(model) else model)])
def test_the_copy_is_independent_and_the_original_as_before(form, back):
    model = form(quantized(vit, images(), overrides={"*.fc1": {"weight_bits": None}}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config.quantization_config)
    copied = back(model)
    assert storages(copied).isdisjoint(storages(model))
    with torch.no_grad():
        for tensor in [*copied.parameters(), *copied.buffers()]:
            tensor.zero_()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.config.quantization_config == config
    assert is_packed(model) == (form is pack) and not is_packed(copied)


def test_shared_modules_and_weights_stay_shared():
    shared = nn.Linear(6, 6)
    tied = nn.Linear(6, 6)
    tied.weight = shared.weight
    model = nn.Sequential(shared, nn.ReLU(), shared, tied)
    model = jitter(calibrate(quantize(model, SAQQuantizationConfig(first_last_bits=None)), [vectors()]))
    model[3].weight_quantizer.scale.data.copy_(model[0].weight_quantizer.scale)
    restored = dequantize(model)
    assert restored[0] is restored[2] and restored[3].weight is restored[0].weight
    model[3].weight_quantizer.scale.data.mul_(2)
    apart = dequantize(model)
    assert not torch.equal(apart[3].weight, apart[0].weight)  # two grids, two weights: each as it was
    assert torch.equal(apart[3].weight, model[3].quantized_weight())
    unpacked = unpack(pack(model))
    assert unpacked[0] is unpacked[2]


class Tied(PreTrainedModel):
    """Two layers that the model declares to share one weight, as language models do with their embeddings."""

    config_class = ViTConfig
    _tied_weights_keys = {"second.weight": "first.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.post_init()


def test_a_declared_tie_cannot_hold_two_weights():
    config = ViTConfig()
    config.tie_word_embeddings = True
    model = quantize(Tied(config), SAQQuantizationConfig(activation_bits=None, first_last_bits=None))
    assert model.second.weight is model.first.weight
    restored = dequantize(pack(model))
    assert restored.second.weight is restored.first.weight
    assert torch.equal(restored.first.weight, model.first.quantized_weight())
    model.second.weight_quantizer.scale.data.mul_(2)
    for form in (model, pack(model)):
        with pytest.raises(ValueError, match="^Tied ties second.weight to first.weight, but the two were"):
            dequantize(form)


@pytest.mark.parametrize("back", [pack, lambda model: unpack(pack(model)), dequantize, lambda m: dequantize(pack(m))])
def test_hooks_and_modes_go_along(back):
    model = quantized(linear_net, vectors())
    calls = []
    handle = model[2].register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    model[2].weight.requires_grad_(back is not dequantize)
    model[0].train()
    copied = back(model)
    assert copied[2].weight.requires_grad == (back not in (dequantize, pack))
    assert copied[0].training == (back is dequantize)  # packed models come in evaluation mode
    copied.eval()(vectors())
    assert calls == [type(copied[2]).__name__]
    model.eval()(vectors())
    handle.remove()
    calls.clear()
    model(vectors())
    assert not calls
    copied(vectors())
    assert len(calls) == 1  # the hooks of the copy are its own


def test_dequantize_refuses_what_is_not_quantized():
    for model in (linear_net(), dequantize(quantize(linear_net(), SAQQuantizationConfig()))):
        with pytest.raises(ValueError, match="^Sequential has no quantized layer; expected a model made by"):
            dequantize(model)
    model = quantize(linear_net(), SAQQuantizationConfig())
    model[2].weight_quantizer.reset()
    with pytest.raises(RuntimeError, match="^2.weight_quantizer: this weight quantizer has no range yet"):
        dequantize(model)
    with pytest.raises(ValueError, match=r"^Sequential: 0.weight has no values \(device='meta'\)"):
        dequantize(quantize(linear_net(), SAQQuantizationConfig()).to("meta"))


def test_a_dequantized_model_can_be_quantized_again():
    model = quantized(vit, images(), activation_bits=None)
    again = quantize(dequantize(model), SAQQuantizationConfig(activation_bits=None))
    for name, layer in again.named_modules():
        if isinstance(layer, QuantizedLayer):
            layer.weight_quantizer.scale.data.copy_(model.get_submodule(name).weight_quantizer.scale)
    assert_same_codes(codes(again), codes(model))


# To trainable ------------------------------------------------------------------------------------------------------


@matrix(5, quantizer=QUANTIZERS.keys(), bits={f"{n}bit": n for n in range(2, 9)}, granularity=["tensor", "channel"])
def test_unpacked_weights_have_the_same_codes(quantizer: str, bits: int, granularity: str):
    model = quantized(
        conv_net,
        images(size=8),
        weight_bits=bits,
        activation_bits=bits,
        first_last_bits=None,
        quantizer=quantizer,
        weight_granularity=granularity,
    )
    packed = pack(model)
    unpacked = unpack(packed)
    assert_same_codes(codes(unpacked), codes(packed))
    assert_same_codes(codes(pack(unpacked)), codes(packed))
    for name in codes(packed):
        weight, expected = (
            unpacked.get_submodule(name).quantized_weight(),
            packed.get_submodule(name).quantized_weight(),
        )
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
        if quantizer.startswith("lsq"):
            assert torch.equal(weight, expected)
            assert torch.equal(unpacked.get_submodule(name).weight, expected)  # the latent weight is on the grid
    torch.testing.assert_close(unpacked(images(size=8)), packed(images(size=8)), rtol=1e-4, atol=1e-5)


@each_family
def test_unpacked_models_train_and_are_saved_in_float_storage(build, tmp_path):
    pack(quantized(build, images())).save_pretrained(tmp_path / "packed")
    packed = AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
    model = unpack(packed)
    x = images(seed=1)
    assert torch.equal(model(x).logits, packed(x).logits)
    model.save_pretrained(tmp_path / "float")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "float")
    assert again.config.quantization_config.storage == "float"
    assert_same_codes(codes(again), codes(packed))
    F.cross_entropy(model.train()(x).logits, torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert any(
        layer.weight_quantizer.scale.grad.abs() > 0 for layer in model.modules() if hasattr(layer, "float_form")
    )


def test_bfloat16_keeps_the_grid_and_the_codes():
    packed = pack(quantized(vit, images(), weight_bits=8))
    before = {
        name: layer.weight_scale.clone() for name, layer in packed.named_modules() if isinstance(layer, PackedLayer)
    }
    expected = codes(packed)
    packed.to(torch.bfloat16)
    for name, scale in before.items():
        layer = packed.get_submodule(name)
        assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.weight_scale, scale)
        assert layer.weight_scale.dtype == torch.float32
    assert_same_codes(codes(packed), expected)
    assert packed(images().bfloat16()).logits.dtype == torch.bfloat16
    unpacked = unpack(packed)
    assert unpacked.classifier.weight.dtype == torch.bfloat16
    assert_same_codes(codes(unpacked), expected)


def test_unpack_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="^Sequential is not packed; expected a model made by `pack`"):
        unpack(linear_net())
    packed = pack(quantized(linear_net, vectors(), quantizer="liq"))
    # Codes of one sign only, on a grid around zero: no weight has this grid, whose middle is the weight's mean.
    packed[2].packed_weight.fill_(0xFF)
    packed[2].packed_weight[0] = 0xDF
    with pytest.raises(ValueError, match=r"^2: LIQQuantizer cannot be brought back to this grid of 4 bits: \d+ of 64"):
        unpack(packed)

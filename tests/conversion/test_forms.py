"""Packed models: the same codes and outputs, a fraction of the memory, nothing shared with the original."""

from __future__ import annotations

import copy

import pytest
import torch
from matrices import matrix
from quantized_models import assert_same_codes, codes, quantized, storages
from tiny_models import TRANSFORMERS_MODELS, conv_net, images, jitter, linear_net, vectors, vit

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.conversion import float_parameters
from hf_saq.conversion.forms import convert_to_packed, is_packed
from hf_saq.layers import PackedLayer
from hf_saq.layers.packing import packed_size
from hf_saq.quantizers import QUANTIZERS

every_family = pytest.mark.parametrize("build", TRANSFORMERS_MODELS.values(), ids=TRANSFORMERS_MODELS)


@every_family
def test_codes_and_outputs_are_equal(build):
    model = quantized(build, images())
    packed = pack(model)
    assert is_packed(packed) and not is_packed(model)
    assert_same_codes(codes(packed), codes(model))
    assert torch.equal(packed(images(seed=1)).logits, model(images(seed=1)).logits)


@matrix(5, quantizer=QUANTIZERS.keys(), bits={f"{n}bit": n for n in range(2, 9)}, granularity=["tensor", "channel"])
def test_every_quantizer_and_width(quantizer: str, bits: int, granularity: str):
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
    assert_same_codes(codes(packed), codes(model))
    low, high = (f(code.min() if f is min else code.max() for code in codes(packed).values()) for f in (min, max))
    assert -(2 ** (bits - 1)) <= low < 0 < high <= 2 ** (bits - 1) - 1
    for name in codes(model):
        layer, original = packed.get_submodule(name), model.get_submodule(name)
        assert layer.packed_weight.shape == (packed_size(original.weight.numel(), bits),)
        # DoReFa scales its levels before it shifts them, the packed grid after: one rounding apart.
        torch.testing.assert_close(layer.quantized_weight(), original.quantized_weight(), rtol=1e-5, atol=1e-6)


def test_a_zero_scale_and_a_constant_weight():
    model = linear_net()
    model[2].weight.data.zero_()
    model[4].weight.data.fill_(0.5)
    model = calibrate(quantize(model, SAQQuantizationConfig(weight_granularity="channel")), [vectors()])
    assert torch.equal(pack(model)(vectors()), model.eval()(vectors()))
    assert not codes(model)["2"].any()


def test_the_copy_is_independent_and_the_original_as_before():
    model = quantized(vit, images()).train()
    model.get_submodule("vit.layers.0").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    config = copy.deepcopy(model.config.quantization_config)
    packed = pack(model)
    assert storages(packed).isdisjoint(storages(model))
    with torch.no_grad():
        for tensor in [*packed.parameters(), *packed.buffers()]:
            tensor.zero_()
    packed.config.quantization_config.overrides["*"] = {}
    packed.config.num_hidden_layers = 77
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert [module.training for module in model.modules()] == modes
    assert model.config.quantization_config == config and config.storage == "float"
    assert model.config.num_hidden_layers == 2
    assert packed.config.quantization_config.storage == "packed"


def test_the_original_trains_on_and_the_copy_stays():
    model = quantized(vit, images())
    packed = pack(model)
    expected = packed(images()).logits
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.5)
    model(images(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    assert torch.equal(packed(images()).logits, expected)
    assert not torch.equal(model.eval()(images()).logits, expected)


def test_a_copy_of_the_copy():
    packed = pack(quantized(conv_net, images(size=8)))
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(images(size=8)), packed(images(size=8)))
    assert storages(twin).isdisjoint(storages(packed))


def test_memory():
    model = quantized(vit, images(), weight_bits=2, first_last_bits=None)
    packed = pack(model)
    assert all(p.numel() < 100 for n, p in packed.named_parameters() if "proj" in n or "fc" in n)
    count = sum(code.numel() for code in codes(model).values())
    packed_layers = [layer for layer in packed.modules() if isinstance(layer, PackedLayer)]
    assert sum(layer.packed_weight.numel() for layer in packed_layers) == count / 4


def test_layers_without_a_weight_quantizer_stay_what_they_are():
    model = quantized(linear_net, vectors(), overrides={"2": {"weight_bits": None}, "4": {"activation_bits": None}})
    packed = pack(model)
    assert [type(packed[i]).__name__ for i in (0, 2, 4)] == ["PackedLayer", "QuantLinear", "PackedLayer"]
    assert packed[2].weight is not model[2].weight and packed[4].activation_quantizer is None
    assert torch.equal(packed(vectors()), model(vectors()))


def test_skeletons_take_a_state_dict():
    """What `from_pretrained` does, without files: shapes from the configuration, values from the state dict."""
    config = SAQQuantizationConfig(weight_bits=3, weight_granularity="channel", quantizer="liq")
    packed = pack(jitter(calibrate(quantize(conv_net(), config), [images(size=8)])))
    empty = conv_net(seed=5).eval()
    convert_to_packed(empty, config)
    empty.load_state_dict(packed.state_dict(), strict=True)
    assert torch.equal(empty(images(size=8)), packed(images(size=8)))


def test_training_raises_with_the_path():
    packed = pack(quantized(vit, images())).train()
    with pytest.raises(RuntimeError) as error:
        packed(images())
    assert str(error.value) == (
        "vit.embeddings.patch_embeddings.projection: packed weights cannot be trained. Load a checkpoint in float "
        "storage to train, or call `model.eval()` for inference."
    )
    with torch.no_grad():
        packed(images())  # a training-mode forward that learns nothing is harmless
    packed.eval()(images())


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_parameters_are_those_of_the_float_model_in_every_form(quantizer: str):
    expected = sum(parameter.numel() for parameter in vit().parameters())
    model = quantized(vit, quantizer=quantizer)
    assert float_parameters(vit()) == float_parameters(model) == float_parameters(pack(model)) == expected


def test_pack_refuses_models_without_quantized_weights():
    with pytest.raises(ValueError, match="^Sequential has no layer with quantized weights; expected a model made by"):
        pack(linear_net())
    with pytest.raises(ValueError, match="^Sequential has no layer with quantized weights"):
        pack(quantize(linear_net(), SAQQuantizationConfig(weight_bits=None)))
    with pytest.raises(ValueError, match="^Sequential is packed already; expected a model made by `quantize`"):
        pack(pack(quantize(linear_net(), SAQQuantizationConfig(activation_bits=None))))


def test_pack_refuses_weights_without_a_range():
    model = quantize(linear_net(), SAQQuantizationConfig(activation_bits=None))
    model[2].weight_quantizer.reset()
    with pytest.raises(
        RuntimeError, match="^pack: Sequential is not calibrated: 1 quantizers have no range yet.* 2.weight_q"
    ):
        pack(model)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_weight_that_is_nan_is_not_packed(quantizer: str):
    """No integer stands for it: the packed model of a diverged one gave numbers."""
    model = calibrate(quantize(linear_net(), SAQQuantizationConfig(quantizer=quantizer)), [vectors()])
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="^2: its weight has NaN, which no integer stands for"):
        pack(model)


def test_a_weight_whose_grid_is_no_numbers_is_not_packed():
    """LIQ places its grid by mean and deviation, which one infinite value makes NaN; the codes were then zeros."""
    model = calibrate(quantize(linear_net(), SAQQuantizationConfig(quantizer="liq")), [vectors()])
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="^2: its weight has infinite values, .* which no integer stands for"):
        pack(model)


def test_codes_of_another_size_raise_with_the_path():
    packed = pack(quantize(linear_net(), SAQQuantizationConfig(activation_bits=None)))
    packed[2].packed_weight = packed[2].packed_weight[:-1]
    with pytest.raises(ValueError, match=r"^2.packed_weight: found shape \(31,\), expected \(32,\): 4 bits for each"):
        packed[2].codes()


def test_text_and_attributes():
    packed = pack(quantize(conv_net(), SAQQuantizationConfig(activation_bits=None)))
    assert "Conv2d, weight_shape=(8, 2, 3, 3), bits=4" in repr(packed[3])
    assert packed[3].weight.dtype == torch.float32  # what code that asks for `layer.weight.dtype` gets
    assert (packed[3].stride, packed[3].groups, packed[7].in_features) == ((2, 2), 4, 72)
    with pytest.raises(AttributeError, match="'PackedLayer' object has no attribute 'strides'"):
        _ = packed[3].strides
    assert all(not module.training for module in packed.modules())

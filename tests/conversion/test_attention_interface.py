"""Where attention products are quantized, that they are the model's own attention in float, and what is refused."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from architectures import ARCHITECTURES, logits_of
from attention_models import ONLY_ATTENTION, W4A4, all_products, batch_of, build, quantized_vit
from tiny_models import images, vit
from torch import nn
from torch.testing import assert_close
from transformers import ViTForImageClassification
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.vit.modeling_vit import ViTAttention

from hf_saq import SAQQuantizationConfig, calibrate, cost, pack, quantize
from hf_saq.analysis import LayerCost
from hf_saq.conversion.attention_interface import quantized_attention, uses_interface
from hf_saq.conversion.forms import dequantize
from hf_saq.conversion.observing.observers import PassThrough
from hf_saq.conversion.planning import plan
from hf_saq.conversion.swapping import convert
from hf_saq.layers import QuantAttentionProducts
from hf_saq.quantizers import Quantizer

SUPPORTED = (
    "beit clip deit DeiTForImageClassificationWithTeacher dinov2 dinov2_with_registers ijepa metaclip_2 segformer "
    "shieldgemma2 siglip siglip2 swin vit vit_msn"
).split()
FAST = (
    "vit",
    "DeiTForImageClassificationWithTeacher",
    "swin",
    "beit",
    "dinov2",
    "segformer",
    "siglip2",
    "shieldgemma2",
)


# In float ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SUPPORTED]
)
def test_in_float_it_is_the_models_own_eager_attention(name: str):
    """In training mode with dropout on the probabilities: the random numbers are the same as well."""
    model = build(name)
    attentions = [m for m in model.modules() if uses_interface(m)]
    for attention in attentions:
        attention.attention_dropout = attention.dropout = 0.3
    model.set_attn_implementation("eager")
    batch = batch_of(model, name)
    with torch.no_grad():
        in_evaluation = logits_of(model(**batch))
        torch.manual_seed(5)
        in_training = logits_of(model.train()(**batch))
    assert (in_training - in_evaluation).abs().max() > 1e-4
    quantize(model, W4A4)
    products = all_products(model)
    assert len(products) == len(attentions) and model.config._attn_implementation == "saq"
    for quantizer in (m for m in model.modules() if isinstance(m, Quantizer)):
        quantizer.observer = PassThrough()
    with torch.no_grad():
        torch.manual_seed(5)
        assert_close(logits_of(model(**batch)), in_training, rtol=0, atol=1e-6)
        assert_close(logits_of(model.eval()(**batch)), in_evaluation, rtol=0, atol=1e-6)
    assert all(q.observer.ran for p in products.values() for q in p.own_quantizers())


def test_grouped_queries_and_the_cap_of_scores_as_in_gemma():
    attention = next(m for m in build("shieldgemma2").modules() if isinstance(m, Gemma3Attention))
    attention.num_key_value_groups = 2
    query, key, value = (torch.randn(3, heads, 5, 8) for heads in (4, 2, 2))
    mask = torch.randn(3, 1, 5, 5)
    arguments = {"scaling": 0.9, "softcap": 0.7, "sliding_window": 8, "dropout": 0.0}
    expected = modeling_gemma3.eager_attention_forward(attention, query, key, value, mask, **arguments)
    without_products = quantized_attention(attention, query, key, value, mask, **arguments)
    attention.products = QuantAttentionProducts(None, None, None, None)
    with_products = quantized_attention(attention, query, key, value, mask, **arguments)
    for found in (without_products, with_products):
        assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_no_other_architecture_goes_through_the_interface():
    names = [name.removeprefix("transformers/") for name in ARCHITECTURES if name.startswith("transformers/")]
    names.remove("dinat")  # needs a library
    assert {name for name in names if any(uses_interface(m) for m in build(name).modules())} == set(SUPPORTED)


def test_attention_is_found_without_running_and_without_memory():
    with torch.device("meta"):
        model = ViTForImageClassification(vit().config)
    report = convert(model, W4A4)
    assert [layer.name for layer in report.converted if layer.name.endswith("products")] == [
        "vit.layers.0.attention.products",
        "vit.layers.1.attention.products",
    ]
    assert all(p.is_meta for p in model.parameters())


# What the configuration says ---------------------------------------------------------------------------------------


def test_overrides_and_exclusions_by_the_name_of_the_attention_or_of_its_products():
    overrides = {
        "*.1.attention": {"activation_bits": 2, "weight_bits": 8},
        "*.0.attention.products": {"quantizer": "pact"},
    }
    layers = {layer.name: layer for layer in plan(vit(), W4A4.replace(overrides=overrides)).layers}
    first, second = (layers[f"vit.layers.{i}.attention.products"] for i in (0, 1))
    common = {"activation_mode": "auto", "scale_init": "mse"}
    assert first.settings == {"activation_bits": 4, "quantizer": "pact", **common}
    assert second.settings == {"activation_bits": 2, "quantizer": "lsq", **common}
    assert layers["vit.layers.1.attention.q_proj"].settings["weight_bits"] == 4  # the glob ends with the attention

    excluded = ["vit.layers.0.attention.products", "*.1.attention"]
    config = W4A4.replace(modules_to_not_convert=excluded)
    layers = {layer.name: layer for layer in plan(vit(), config).layers}
    for i in (0, 1):
        assert layers[f"vit.layers.{i}.attention.products"].reason == "listed in modules_to_not_convert"
        assert layers[f"vit.layers.{i}.attention.q_proj"].settings
    in_float = calibrate(quantize(vit(), config), [images()])
    expected = calibrate(
        quantize(vit(), config.replace(quantize_attention=False, modules_to_not_convert=None)), [images()]
    )
    assert not all_products(in_float) and in_float.config._attn_implementation == "saq"
    assert_close(in_float(images()).logits, expected(images()).logits, rtol=0, atol=1e-6)


def test_the_report():
    model = quantize(vit(), W4A4.replace(modules_to_not_convert=["vit.layers.1.attention.products"]))
    lines = [line.split(maxsplit=4) for line in str(model.quantization_report).splitlines() if "products" in line]
    assert lines[0][:4] == ["vit.layers.0.attention.products", "ViTAttention", "-", "4"]
    assert lines[0][4].split("  ") == ["auto, probabilities unsigned", "lsq"]
    assert lines[1][2:4] == ["float", "float"] and lines[1][4].endswith("listed in modules_to_not_convert")
    calibrate(model, [images()])
    assert "4      signed, probabilities unsigned  lsq" in str(model.quantization_report)
    affine = quantize(vit(), W4A4.replace(quantizer="lsq_plus"))
    assert "affine, probabilities unsigned  lsq_plus" in str(affine.quantization_report)


def test_cost():
    """Five tokens, two heads of width 8: each product has 2 * 5 * 5 * 8 multiply-accumulates in each layer."""
    model = quantized_vit(W4A4.replace(activation_bits=3))
    found, without = cost(model, images(1)), cost(quantized_vit(SAQQuantizationConfig(activation_bits=3)), images(1))
    products = [layer for layer in found.layers if layer.name.endswith("products")]
    assert products == [LayerCost(name, 2 * 400, 3, 3) for name in all_products(model)]
    assert found.macs == without.macs and without.other_macs - found.other_macs == 2 * 800
    assert without.bops - found.bops == 2 * 800 * (32 * 32 - 3 * 3)
    assert found.weight_bytes - without.weight_bytes == 4 * 2 * 4  # four scales in each of two layers
    assert cost(pack(model), images(1)) == found


def test_quantize_replaces_what_the_user_chose_with_a_warning_and_what_is_the_default_without():
    model = vit()
    assert model.config._attn_implementation == "sdpa"
    quantize(model, W4A4)
    model = vit()
    model.config._attn_implementation = "flex_attention"
    with pytest.warns(UserWarning, match="^attn_implementation='flex_attention' is replaced by 'saq'"):
        quantize(model, W4A4)


def test_another_implementation_later_on_does_not_pass_the_quantizers_by():
    model = quantized_vit()
    expected = model(images()).logits
    for one in (model, copy.deepcopy(model), pack(model)):
        one.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError) as error:
            one(images())
        assert str(error.value) == (
            "vit.layers.0.attention.products: attn_implementation is now 'sdpa', which passes quantized products by. "
            "Call `model.set_attn_implementation('saq')`."
        )
        one.set_attn_implementation("saq")
        assert torch.equal(one(images()).logits, expected)


# Errors ------------------------------------------------------------------------------------------------------------


class WithSinks(ViTAttention):
    forward = None  # set below, in a namespace of its own


def eager_attention_forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sinks=None):  # noqa: ARG001
    return torch.cat([query, module.sinks], -1), None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet", "no attention module"),
        (
            "data2vec-vision",
            r"4 attention modules that do not, for example data2vec_vision\.encoder\.layer\.0\.attention",
        ),
        ("cvt", r"\d+ attention modules that do not, for example cvt\.encoder\.stages\.0\.layers\.0\.attention \(Cvt"),
    ],
)
def test_models_without_the_interface_are_refused(name: str, found: str):
    model = build(name)
    expected = (
        rf"^{type(model).__name__}: quantize_attention=True, but no attention of this model can be quantized. "
        r"Expected modules that go through transformers' attention interface; "
        rf"found {found}.*\. Set quantize_attention=False\.$"
    )
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=expected):
        quantize(model, W4A4)
    assert [type(m) for m in model.modules()] == before
    assert quantize(model, SAQQuantizationConfig()).quantization_report.converted


def test_an_attention_that_does_more_is_left_in_float():
    model = vit()
    namespace = {
        **inspect.unwrap(ViTAttention.forward).__globals__,
        "eager_attention_forward": eager_attention_forward,
    }
    code = inspect.unwrap(ViTAttention.forward).__code__
    WithSinks.forward = type(eager_attention_forward)(code, namespace, "forward", (None,))
    model.vit.layers[1].attention.__class__ = WithSinks
    layers = {layer.name: layer for layer in plan(model, W4A4).layers}
    assert layers["vit.layers.0.attention.products"].settings
    assert layers["vit.layers.1.attention.products"].reason == (
        "its attention is more than two products and a softmax: it has sinks, cat, sinks"
    )
    model.vit.layers[0].attention.__class__ = WithSinks
    with pytest.raises(ValueError, match="found vit.layers.0.attention: its attention is more than two products"):
        plan(model, W4A4)


def test_bits_of_none_are_refused():
    with pytest.raises(ValueError) as error:
        SAQQuantizationConfig(activation_bits=None, quantize_attention=True)
    assert str(error.value) == (
        "SAQQuantizationConfig.quantize_attention=True with activation_bits=None: both operands of an attention "
        "product are activations. Set activation_bits, or quantize_attention=False."
    )


def test_output_attentions_in_the_configuration_is_refused():
    model = vit()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="^config.output_attentions=True with quantize_attention=True: transformers"):
        quantize(model, W4A4)


def test_products_wait_for_calibration():
    with pytest.raises(RuntimeError, match="quantizer has no range yet"):
        quantize(vit(), ONLY_ATTENTION)(images())
    with pytest.raises(ValueError, match="^ViTForImageClassification has quantized layers already"):
        quantize(quantize(vit(), ONLY_ATTENTION), SAQQuantizationConfig())


@pytest.mark.parametrize("packed", [False, True], ids=["float", "packed"])
def test_dequantized_there_is_no_trace_of_it(packed: bool):
    model = quantized_vit()
    restored = dequantize(pack(model) if packed else model)
    assert restored.config._attn_implementation == "sdpa" and not all_products(restored)
    assert restored.state_dict().keys() == vit().state_dict().keys()
    assert not any(m._forward_pre_hooks for m in restored.modules())
    layer = model.vit.layers[0].attention.q_proj
    assert torch.equal(restored.vit.layers[0].attention.q_proj.weight, layer.quantized_weight())
    assert restored(images()).logits.isfinite().all() and len(all_products(model)) == 2


def test_models_inside_of_other_modules():
    """Whatever holds the model of transformers, and a lone attention as well."""
    model = nn.Sequential(vit(), nn.Identity())
    calibrate(quantize(model, W4A4), [images()])
    assert list(all_products(model)) == [f"0.vit.layers.{i}.attention.products" for i in (0, 1)]
    assert model[0].config._attn_implementation == "saq"
    alone = nn.Sequential(copy.deepcopy(vit().vit.layers[0]))
    calibrate(quantize(alone, W4A4), [torch.randn(2, 5, 16)])
    assert alone[0].attention.config._attn_implementation == "saq"
    assert all(q.initialized for p in all_products(alone).values() for q in p.own_quantizers())

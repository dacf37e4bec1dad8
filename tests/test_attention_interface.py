"""Quantized attention products in models of transformers, from `quantize` to a fresh process."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, inputs, logits_of
from reference import lsq, package_name, to_reference, train_reference
from test_hf_quantizer import assert_same_state, load
from tiny_models import convnext, images, jitter, linear_net, vit
from torch import Tensor, nn
from torch.testing import assert_close
from training import LEARNING_RATE, SCALE_LR_RATIO, Images, InOrder, arguments, loss_of
from transformers import AttentionInterface, PreTrainedModel, ViTForImageClassification
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.vit.modeling_vit import ViTAttention

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, calibrate, cost, pack, quantize
from hf_saq.analysis.cost import LayerCost
from hf_saq.conversion.attention_interface import quantized_attention, uses_interface
from hf_saq.conversion.calibration import NEVER_RUN
from hf_saq.conversion.forms import dequantize, is_packed
from hf_saq.conversion.observers import PassThrough
from hf_saq.conversion.planning import plan
from hf_saq.conversion.swapping import convert
from hf_saq.layers import QuantAttentionProducts
from hf_saq.quantizers import QUANTIZERS, Quantizer

W4A4 = SAQQuantizationConfig(quantize_attention=True)
ONLY_ATTENTION = SAQQuantizationConfig(
    weight_bits=None,
    activation_bits=3,
    quantize_attention=True,
    overrides={"*": {"activation_bits": None}, "*.products": {"activation_bits": 3}},
)
OPERANDS = ("query", "key", "probability", "value")
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
FAMILIES = ("vit", "swin", "beit", "dinov2", "DeiTForImageClassificationWithTeacher")


def build(name: str) -> PreTrainedModel:
    model = ARCHITECTURES[f"transformers/{name}"].build()
    if name == "beit":  # with relative position biases, which come in place of a mask
        config = copy.deepcopy(model.config)
        config.use_relative_position_bias = True
        model = jitter(type(model)(config)).eval()
        tables = [p for n, p in model.named_parameters() if n.endswith("relative_position_bias_table")]
        assert len(tables) == 2
        for table in tables:
            nn.init.normal_(table, generator=torch.Generator().manual_seed(1))
    return model


def batch_of(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    return inputs(ARCHITECTURES[f"transformers/{name}"], model)


def all_products(model: nn.Module) -> dict[str, QuantAttentionProducts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantAttentionProducts)}


def quantized_vit(config: SAQQuantizationConfig = W4A4) -> PreTrainedModel:
    return jitter(calibrate(quantize(vit(), config), [images()])).eval()


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


# Quantized ---------------------------------------------------------------------------------------------------------


class PlainProducts(nn.Module):
    """Attention with each operand by the formula of LSQ; shares no code with the package."""

    def __init__(self, products: QuantAttentionProducts):
        super().__init__()
        self.ranges = {}
        for operand in OPERANDS:
            quantizer = getattr(products, f"{operand}_quantizer")
            self.register_parameter(f"{operand}_scale", nn.Parameter(quantizer.scale.detach().clone()))
            signed = int(quantizer.range_state) == 1
            half = 2 ** (quantizer.bits - 1)
            self.ranges[operand] = (-half, half - 1) if signed else (0, 2 * half - 1)

    def q(self, operand: str, x: Tensor) -> Tensor:
        low, high = self.ranges[operand]
        return lsq(x, getattr(self, f"{operand}_scale"), low, high, 1 / math.sqrt(x[0].numel() * high))

    def forward(self, query, key, value, mask, scaling, dropout):
        scores = scaling * self.q("query", query) @ self.q("key", key).transpose(-1, -2)
        p = torch.softmax(scores if mask is None else scores + mask, -1)
        p = nn.functional.dropout(self.q("probability", p), dropout)
        return (p @ self.q("value", value)).transpose(1, 2), p


@pytest.fixture
def plain_attention():
    """An attention implementation for `PlainProducts`, through transformers and past the package."""

    def forward(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):  # noqa: ARG001
        return module.products(query, key, value, mask, scaling, dropout)

    AttentionInterface.register("plain", forward)
    yield "plain"
    del AttentionInterface._global_mapping["plain"]


def to_plain(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """An independent copy of a quantized model; what `to_reference` is for layers, and for attention products too."""
    reference = to_reference(model)
    for name, products in all_products(reference).items():
        attention = reference.get_submodule(name.rpartition(".")[0])
        attention._forward_pre_hooks.clear()
        attention.products = PlainProducts(products)
    reference.set_attn_implementation(implementation)
    return reference


def name_in_package(name: str) -> str:
    if ".products." in name:
        return name.replace("_scale", "_quantizer.scale")
    return package_name(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_those_of_the_formula(name: str, plain_attention):
    model = build(name)
    batch = {key: value.double() for key, value in batch_of(model, name).items()}
    calibrate(quantize(model.double(), ONLY_ATTENTION), [batch]).double()
    reference = to_plain(model, plain_attention)
    found, expected = logits_of(model(**batch)), logits_of(reference(**batch))
    assert_close(found, expected, rtol=0, atol=1e-9)
    for logits in (found, expected):
        logits.square().sum().backward()
    ours = dict(model.named_parameters())
    scales = 0
    for parameter_name, parameter in reference.named_parameters():
        own = ours[name_in_package(parameter_name)].grad
        if parameter.grad is None:
            assert own is None, parameter_name
            continue
        assert_close(own, parameter.grad, rtol=1e-7, atol=1e-9, msg=lambda m, n=parameter_name: f"{n}: {m}")
        if ".products." in parameter_name:
            scales += 1
            assert parameter.grad.abs().sum() > 0, parameter_name
    assert scales == 4 * len(all_products(model)) > 0


@pytest.mark.parametrize("case", [None, 3])
def test_steps_of_the_trainer_are_those_of_a_plain_loop(tmp_path, case: int | None, plain_attention):
    model = calibrate(quantize(vit(), W4A4), [images(8)]).double()
    reference, before = to_plain(model, plain_attention), copy.deepcopy(model)
    data = Images(8)
    trainer = InOrder(
        model,
        arguments(tmp_path, max_steps=2),
        saq_config=SAQConfig(rho=0.2, schedule="full", case=case, scale_lr_ratio=SCALE_LR_RATIO),
        train_dataset=data,
    )
    trainer.train()
    of_scales = [group for group in trainer.optimizer.param_groups if group["lr"] == LEARNING_RATE * SCALE_LR_RATIO]
    own = {p for products in all_products(model).values() for p in products.parameters()}
    assert len(own) == 8 and own <= set(of_scales[0]["params"]) and of_scales[0]["weight_decay"] == 0

    scales = [p for name, p in reference.named_parameters() if name.endswith("_scale")]
    others = [p for name, p in reference.named_parameters() if not name.endswith("_scale")]
    groups = [{"params": others}, {"params": scales, "lr": LEARNING_RATE * SCALE_LR_RATIO}]
    optimizer = torch.optim.SGD(groups, lr=LEARNING_RATE)
    steps = [[[batch]] for batch in zip(data.pixel_values.split(4), data.labels.split(4), strict=True)]
    train_reference(reference, loss_of, steps, optimizer, case=case, rho=0.2, sync="local")
    state, start = model.state_dict(), before.state_dict()
    for name, parameter in reference.named_parameters():
        assert_close(state[name_in_package(name)], parameter, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
        assert not torch.equal(parameter, start[name_in_package(name)]) or "mask_token" in name, name


def test_both_passes_drop_the_same_probabilities(tmp_path):
    """With `rho=0` the two-pass step is plain training, bit for bit, if the random numbers are put back."""

    def run(saq_config: SAQConfig) -> PreTrainedModel:
        model = vit()
        for attention in (m for m in model.modules() if uses_interface(m)):
            attention.attention_dropout = 0.4
        calibrate(quantize(model, W4A4), [images(8)])
        data = Images(8, torch.float32)
        InOrder(model, arguments(tmp_path, max_steps=2, seed=3), saq_config=saq_config, train_dataset=data).train()
        return model

    assert_same_state(run(SAQConfig(rho=0.0, schedule="full")), run(SAQConfig(case=None)))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_quantizer(kind: str):
    model = calibrate(quantize(vit(), W4A4.replace(quantizer=kind)), [images()])
    for products in all_products(model).values():
        assert all(type(q) is QUANTIZERS[kind] and q.initialized for q in products.own_quantizers())
        assert not products.probability_quantizer.signed and not products.probability_quantizer.has_offset
        assert products.query_quantizer.has_offset or products.query_quantizer.signed
        assert all(q.path.endswith(".products." + n) for n, q in products.named_children())
    learned = {n: p for n, p in model.named_parameters() if ".products." in n and p.requires_grad}
    for parameter in learned.values():
        parameter.data *= 0.5  # some learn from clipped values only
    model.train()(images()).logits.square().sum().backward()
    assert learned or kind == "dorefa"
    for name, parameter in learned.items():
        assert parameter.grad.abs().sum() > 0, name


def test_probabilities_that_the_model_returns_are_quantized():
    model = quantized_vit()
    found = model(images(), output_attentions=True).attentions
    for probabilities, products in zip(found, all_products(model).values(), strict=True):
        codes = probabilities / products.probability_quantizer.scale
        assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert 2 < len(codes.round().unique()) <= 16


# What the configuration says ---------------------------------------------------------------------------------------


def test_overrides_and_exclusions_by_the_name_of_the_attention_or_of_its_products():
    overrides = {
        "*.1.attention": {"activation_bits": 2, "weight_bits": 8},
        "*.0.attention.products": {"quantizer": "pact"},
    }
    layers = {layer.name: layer for layer in plan(vit(), W4A4.replace(overrides=overrides))}
    first, second = (layers[f"vit.layers.{i}.attention.products"] for i in (0, 1))
    common = {"activation_mode": "auto", "scale_init": "mse"}
    assert first.settings == {"activation_bits": 4, "quantizer": "pact", **common}
    assert second.settings == {"activation_bits": 2, "quantizer": "lsq", **common}
    assert layers["vit.layers.1.attention.q_proj"].settings["weight_bits"] == 4  # the glob ends with the attention

    excluded = ["vit.layers.0.attention.products", "*.1.attention"]
    config = W4A4.replace(modules_to_not_convert=excluded)
    layers = {layer.name: layer for layer in plan(vit(), config)}
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


# Saved and loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "storage"), [("vit", "float"), ("beit", "float"), ("swin", "packed"), ("dinov2", "packed")]
)
def test_saved_and_loaded(name: str, storage: str, tmp_path: Path):
    model = build(name)
    batch = batch_of(model, name)
    jitter(calibrate(quantize(model, W4A4), [batch])).eval()
    saved = pack(model) if storage == "packed" else model
    assert torch.equal(logits_of(saved(**batch)), logits_of(model(**batch)))
    saved.save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()
    model_class = type(model)
    loaded = model_class.from_pretrained(tmp_path)
    assert_same_state(loaded, saved)
    for tensor in [*loaded.parameters(), *loaded.buffers()]:
        tensor.data = tensor.data.clone()  # see `load`
    assert loaded.config._attn_implementation == "saq" and loaded.config.quantization_config.quantize_attention
    assert len(all_products(loaded)) == len(all_products(model)) and is_packed(loaded) == (storage == "packed")
    assert torch.equal(logits_of(loaded(**batch)), logits_of(model(**batch)))
    if storage == "float":
        assert "signed, probabilities unsigned" in str(loaded.quantization_report)


def test_loaded_in_a_fresh_process(tmp_path: Path):
    model = pack(quantized_vit())
    model.save_pretrained(tmp_path / "model")
    torch.save((images(), model(images()).logits), tmp_path / "expected.pt")
    code = (
        "import sys, torch, hf_saq\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1] + '/model')\n"
        "for t in [*model.parameters(), *model.buffers()]: t.data = t.data.clone()\n"
        "x, y = torch.load(sys.argv[1] + '/expected.pt')\n"
        "print(model.config._attn_implementation, torch.equal(model(x).logits, y))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert found.stdout == "saq True\n", found.stderr


def test_a_float_checkpoint_becomes_what_quantize_makes_of_it(tmp_path: Path):
    vit().save_pretrained(tmp_path)
    loaded, info = load(tmp_path, quantization_config=W4A4, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = quantize(vit(), W4A4)
    assert_same_state(loaded, expected)
    for model in (loaded, expected):
        calibrate(model, [images()])
    assert torch.equal(loaded(images()).logits, expected(images()).logits)


@pytest.mark.parametrize("stored", ["float model", "quantized model"])
def test_another_implementation_is_replaced_with_a_warning(stored: str, tmp_path: Path):
    (vit() if stored == "float model" else quantized_vit()).save_pretrained(tmp_path)
    config = {"quantization_config": W4A4} if stored == "float model" else {}
    for asked in ("sdpa", {"": "flex_attention"}):
        with pytest.warns(
            UserWarning, match="^attn_implementation='(sdpa|flex_attention)' is replaced by 'saq': with"
        ):
            model = load(tmp_path, attn_implementation=asked, **config)
        assert model.config._attn_implementation == "saq" and len(all_products(model)) == 2
    for asked in ("eager", "saq"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(tmp_path, attn_implementation=asked, **config).config._attn_implementation == "saq"


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


def test_resume_with_an_attention_that_is_never_called(tmp_path: Path):
    """Its products go back to float, and the checkpoint of such a model resumes with the same ones."""

    def trainer(max_steps: int) -> SAQTrainer:
        model = vit()
        attention = model.vit.layers[1].attention
        attention.forward = lambda hidden_states, *args, **kwargs: (attention.o_proj(hidden_states), None)
        args = arguments(tmp_path, max_steps=max_steps, save_steps=1, save_strategy="steps")
        data = Images(16, torch.float32)
        return SAQTrainer(
            model, args, saq_config=SAQConfig(rho=0.1, schedule="full"), quantization_config=W4A4, train_dataset=data
        )

    first = trainer(1)
    with pytest.warns(UserWarning, match="^calibrate: 4 of 16 layers stay in float, because the model never calls"):
        first.train()
    second = trainer(2)
    second.train(resume_from_checkpoint=True)
    for model in (first.model, second.model):
        idle = {layer.name for layer in model.quantization_report.skipped if layer.reason == NEVER_RUN}
        assert idle == {f"vit.layers.1.attention.{name}" for name in ("products", "q_proj", "k_proj", "v_proj")}
        assert idle == set(model.config.quantization_config.modules_to_not_convert)
        assert not all_products(model)["vit.layers.1.attention.products"].own_quantizers()
    loaded = load(tmp_path / "checkpoint-2")
    assert loaded.state_dict().keys() == second.model.state_dict().keys()
    assert list(all_products(loaded)) == ["vit.layers.0.attention.products"]


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


def test_loading_a_model_without_the_interface_is_refused(tmp_path: Path):
    convnext().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^ConvNextForImageClassification: quantize_attention=True, but no attention"):
        load(tmp_path, quantization_config=W4A4)
    with pytest.raises(ValueError, match="^Sequential: quantize_attention=True, but no attention of this model"):
        quantize(linear_net(), W4A4)


def test_an_attention_that_does_more_is_left_in_float():
    model = vit()
    namespace = {
        **inspect.unwrap(ViTAttention.forward).__globals__,
        "eager_attention_forward": eager_attention_forward,
    }
    code = inspect.unwrap(ViTAttention.forward).__code__
    WithSinks.forward = type(eager_attention_forward)(code, namespace, "forward", (None,))
    model.vit.layers[1].attention.__class__ = WithSinks
    layers = {layer.name: layer for layer in plan(model, W4A4)}
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

"""Quantized attention products in whole models against their formula: logits, gradients, training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from architectures import logits_of
from attention_models import ONLY_ATTENTION, W4A4, all_products, batch_of, build, quantized_vit
from quantized_models import assert_same_state
from reference import lsq, package_name, to_reference, train_reference
from tiny_models import images, vit
from torch import Tensor, nn
from torch.testing import assert_close
from training import LEARNING_RATE, SCALE_LR_RATIO, Images, InOrder, arguments, loss_of
from transformers import AttentionInterface, PreTrainedModel

from hf_saq import SAQConfig, calibrate, quantize
from hf_saq.conversion.attention_interface import uses_interface
from hf_saq.layers import QuantAttentionProducts
from hf_saq.quantizers import QUANTIZERS

OPERANDS = ("query", "key", "probability", "value")
FAMILIES = ("vit", "swin", "beit", "dinov2", "DeiTForImageClassificationWithTeacher")


class PlainProducts(nn.Module):
    """Attention with each operand by the formula of LSQ; shares no code with the package."""

    def __init__(self, products: QuantAttentionProducts):
        super().__init__()
        self.ranges = {}
        for operand in OPERANDS:
            quantizer = getattr(products, f"{operand}_quantizer")
            self.register_parameter(f"{operand}_scale", nn.Parameter(quantizer.scale.detach().clone()))
            signed = quantizer.signed
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

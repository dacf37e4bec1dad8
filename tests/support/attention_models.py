"""Tiny models of transformers whose attention products can be quantized."""

from __future__ import annotations

import copy

import torch
from architectures import ARCHITECTURES, inputs
from tiny_models import images, jitter, vit
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.layers import QuantAttentionProducts

W4A4 = SAQQuantizationConfig(quantize_attention=True)
ONLY_ATTENTION = SAQQuantizationConfig(
    weight_bits=None,
    activation_bits=3,
    quantize_attention=True,
    overrides={"*": {"activation_bits": None}, "*.products": {"activation_bits": 3}},
)


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

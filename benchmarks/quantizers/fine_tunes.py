"""What one run computes: the adapted float model, quantized, calibrated, fine-tuned and scored."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.layers import QuantizedLayer
from hf_saq.quantizers import Quantizer

from ..shared.cifar_resnet import CifarResNet
from ..shared.cifar_training import accuracy, calibration_batches, train
from ..shared.images import Images
from .page import FLOAT


@dataclass(frozen=True)
class Material:
    """What every run starts from: the images, and the adapted float model as a state dict."""

    training: Images
    validation: Images
    test: Images
    float_state: dict[str, torch.Tensor]


def trial(material: Material, arguments: dict[str, Any]) -> dict[str, Any]:
    model = start(material, arguments)
    loss = fine_tune(model, material, arguments)
    return {"validation": accuracy(model, material.validation), "training_loss": loss}


def table_run(material: Material, arguments: dict[str, Any]) -> dict[str, Any]:
    model = start(material, arguments)
    calibrated = accuracy(model, material.test[slice(0, arguments["calibrated_images"])])
    first = learned_values(model)
    loss = fine_tune(model, material, arguments)
    return {
        "test_calibrated": calibrated,
        "test": accuracy(model, material.test[slice(0, arguments["test_images"])]),
        "training_loss": loss,
        "learned_values": {name: [first[name], value] for name, value in learned_values(model).items()},
    }


def first_weight_grids(material: Material, arguments: dict[str, Any]) -> dict[str, Any]:
    """How well each quantizer's first grids fit the weights: medians over the layers that have these bits.

    `error` is `||Q(w) - w||^2 / ||w||^2`; `outermost` is the share of weights on the first and last of the levels in
    use. By quantizer and bits, under names such as `lsq-2`.
    """
    found = {}
    for quantizer, bits in itertools.product(arguments["quantizers"], arguments["bits"]):
        model = CifarResNet(20)
        model.load_state_dict(copy.deepcopy(material.float_state))
        quantize(model, SAQQuantizationConfig(weight_bits=bits, activation_bits=None, quantizer=quantizer))
        errors, shares = [], []
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer) and layer.weight_quantizer is not None:
                if layer.weight_quantizer.bits == bits:
                    w, w_q = layer.weight.detach(), layer.quantized_weight().detach()
                    errors.append(((w_q - w).square().sum() / w.square().sum()).item())
                    shares.append(((w_q == w_q.min()) | (w_q == w_q.max())).float().mean().item())
        found[f"{quantizer}-{bits}"] = {"error": median(errors), "outermost": median(shares)}
    return found


def start(material: Material, arguments: dict[str, Any]) -> nn.Module:
    """The adapted float model, quantized and calibrated."""
    model = CifarResNet(20)
    model.load_state_dict(copy.deepcopy(material.float_state))
    if arguments["quantizer"] != FLOAT:
        bits = arguments["bits"]
        config = SAQQuantizationConfig(weight_bits=bits, activation_bits=bits, quantizer=arguments["quantizer"])
        calibrate(quantize(model, config), calibration_batches(material.training))
    return model


def fine_tune(model: nn.Module, material: Material, arguments: dict[str, Any]) -> float:
    settings = {key: arguments[key] for key in ("steps", "batch_size", "lr", "weight_decay", "seed")}
    return train(model, material.training, **settings)


def learned_values(model: nn.Module) -> dict[str, float]:
    """Step sizes, clips and offsets (one per tensor each), by name."""
    return {
        f"{quantizer.path}.{name}": parameter.item()
        for quantizer in model.modules()
        if isinstance(quantizer, Quantizer)
        for name, parameter in quantizer.named_parameters(recurse=False)
    }

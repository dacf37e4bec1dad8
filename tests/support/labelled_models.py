"""Quantized models with labelled batches, and a check that an analysis leaves a model as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tiny_models import NUM_LABELS, images, linear_net, vectors, vit
from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.quantizers import Quantizer


def labelled_vectors(count: int = 8, batches: int = 2, dtype: torch.dtype = torch.float32) -> list:
    """Pairs for [`tiny_models.linear_net`]; the last batch has half the examples of the others."""
    generator = torch.Generator().manual_seed(7)
    sizes = [count] * (batches - 1) + [count // 2]
    return [
        (vectors(size, seed=k).to(dtype), torch.randint(3, (size,), generator=generator))
        for k, size in enumerate(sizes)
    ]


def labelled_images(count: int = 4) -> list[dict[str, Tensor]]:
    """Batches for models of transformers."""
    return [
        {"pixel_values": images(count, seed=k), "labels": (torch.arange(count) + k) % NUM_LABELS} for k in range(2)
    ]


def quantized_linear_net(weight_bits: int | None = 3, activation_bits: int | None = 4, **fields) -> nn.Module:
    config = SAQQuantizationConfig(
        weight_bits=weight_bits, activation_bits=activation_bits, first_last_bits=None, **fields
    )
    return calibrate(quantize(linear_net(), config), [vectors(64, seed=5)])


def quantized_vit(**fields) -> nn.Module:
    config = SAQQuantizationConfig(**{"weight_bits": 4, "activation_bits": 4, **fields})
    return calibrate(quantize(vit(), config), [images(8)])


@contextmanager
def nothing_changes(model: nn.Module) -> Iterator[None]:
    """Check that parameters, buffers, gradients, modes, hooks, observers and random states are as before the block."""
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    next(iter(model.children())).train()  # a mode of its own
    before = _all_of(model)
    yield
    after = _all_of(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, name


def _all_of(model: nn.Module) -> dict:
    found: dict = {f"state {k}": v.clone() for k, v in model.state_dict().items()}
    found |= {f"gradient of {k}": p.grad.clone() for k, p in model.named_parameters()}
    found |= {f"{k} asks for a gradient": p.requires_grad for k, p in model.named_parameters()}
    for name, module in model.named_modules():
        found[f"mode of {name}"] = module.training
        found[f"type of {name}"] = type(module)
        found[f"hooks of {name}"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        if isinstance(module, Quantizer):
            found[f"observer of {name}"] = module.observer
    found["torch's generator"] = torch.get_rng_state()
    found["numpy's generator"] = copy.deepcopy(np.random.get_state()[1]).tolist()
    found["python's generator"] = random.getstate()
    return found

"""Refuse what FSDP2 cannot do with a quantized model, and gather the whole model from its shards."""

from __future__ import annotations

import copy
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from ..config import SAQConfig


def check_fsdp(accelerator: Accelerator, args: TrainingArguments, config: SAQConfig) -> None:
    """Raise `ValueError` where FSDP cannot do what is asked for, before it shards anything."""
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 and config.case is not None:
        raise ValueError(
            "SAQTrainer: FSDP version 1 hides the parameters of a layer in one flat tensor. Set fsdp_version: 2 "
            'in the accelerate config, or "version": 2 in fsdp_config.'
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "SAQTrainer: FSDP's cpu_ram_efficient_loading leaves quantizers uncalibrated on all processes but the "
            "first, and accelerate cannot broadcast their buffers. Set fsdp_cpu_ram_efficient_loading: false."
        )
    if args.save_on_each_node:
        raise ValueError("SAQTrainer: under FSDP only the first process holds the model; unset save_on_each_node.")
    if config.case is None:
        return
    schedule = config.perturbation_schedule()
    if schedule.rule.needs_whole_gradients:
        raise ValueError(
            f"SAQTrainer: SAQConfig({schedule.kind}) under FSDP2, where gradients exist only averaged over processes "
            'and in shards. Use interval, ascent_fraction or reuse="stale".'
        )
    if config.case in (1, 2) and config.sync == "local":
        raise ValueError(
            f'SAQTrainer: SAQConfig(case={config.case}, sync="local") under FSDP2, where gradients of latent weights '
            'exist only averaged over processes. Set sync="global", or case=3.'
        )


def skeleton_of(model: nn.Module) -> nn.Module:
    """Copy `model` with parameters on the meta device, where they take no memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def gathered(accelerator: Accelerator, model: nn.Module, skeleton: nn.Module) -> nn.Module:
    """Build an unsharded copy of `model` in CPU memory, with values on the main process only."""
    whole = copy.deepcopy(skeleton)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        whole.load_state_dict(state, strict=True, assign=True)
    return whole

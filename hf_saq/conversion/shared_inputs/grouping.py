"""Decide which layers are to quantize their input once: those that read the same tensor, with the same settings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from ...config import SAQQuantizationConfig
from ..module_names import ModuleNames
from .finding import find_shared_inputs

SETTINGS_OF_INPUT = ("activation_bits", "quantizer", "activation_mode", "scale_init")


def groups_to_share(
    model: nn.Module,
    config: SAQQuantizationConfig,
    names: ModuleNames,
    settings: Mapping[str, Mapping[str, Any]],
    stored: bool,
) -> list[list[str]]:
    """Name the layers of each group, the one that is to hold the quantizer first.

    Args:
        settings: Name of a layer that is to be quantized -> its settings.
        stored: Whether `config` was stored with a model, of which `model` may be the base or a part.

    Raises:
        ValueError: If the configuration names groups that are none in this model.
    """
    if not config.share_inputs:
        return []
    able = {
        name: fields
        for name, fields in settings.items()
        if fields.get("weight_bits") is not None and fields["activation_bits"] is not None
    }
    if config.shared_input_modules is None:
        found = find_shared_inputs(model, list(able))
        if not found.groups:
            warnings.warn(
                f"share_inputs=True: nothing is shared in this {type(model).__name__}: {found.why_none}. If layers of "
                "it do read the same tensor, name them in shared_input_modules.",
                stacklevel=2,
            )
        return [alike for group in found.groups for alike in _alike(group, able) if len(alike) > 1]
    groups = []
    for given in config.shared_input_modules:
        group = list(given)
        if stored:  # pass over what the model at hand lacks, and what was left in float since
            in_float = config.modules_to_not_convert or []
            group = [entry for entry in given if names.has(entry) and not names.any_matches(in_float, entry)]
        else:
            names.check("shared_input_modules", group)
        own = [next((name for name in able if names.are_the_same(entry, name)), "") for entry in group]
        present = [name for name in own if name]
        if len(present) < len(group) or len(_alike(present, able)) > 1:
            raise ValueError(
                f"shared_input_modules: {group} cannot share the quantizer of their input. Expected full names of "
                "layers of which weights and inputs are quantized, with the same "
                f"{', '.join(SETTINGS_OF_INPUT)}; found "
                + ", ".join(f"{entry} ({_told(able.get(name))})" for entry, name in zip(group, own, strict=True))
                + "."
            )
        if len(present) > 1:
            groups.append(present)
    return groups


def _alike(group: list[str], settings: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Split a group where settings differ."""
    parts: dict[tuple[Any, ...], list[str]] = {}
    for name in group:
        parts.setdefault(tuple(settings[name][field] for field in SETTINGS_OF_INPUT), []).append(name)
    return list(parts.values())


def _told(fields: Mapping[str, Any] | None) -> str:
    return "not quantized" if fields is None else ", ".join(str(fields[field]) for field in SETTINGS_OF_INPUT)

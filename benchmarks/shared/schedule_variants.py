"""The ways to train that the benchmarks of schedules compare, as fields of `SAQConfig` besides `rho`."""

from __future__ import annotations

from typing import Any

from hf_saq import SAQConfig
from hf_saq.sharpness.schedules import KNOBS

QAT, FULL, ECHOED = "qat", "full", "qat, echoed batches"

VARIANTS: dict[str, dict[str, Any]] = {
    QAT: {"case": None},
    FULL: {},
    "interval 2": {"interval": 2},
    "interval 5": {"interval": 5},
    "interval 20": {"interval": 20},
    "interval 5, ascent 1/4": {"interval": 5, "ascent_fraction": 0.25},
    "start 0.5": {"start": 0.5},
    "ascent 1/4": {"ascent_fraction": 0.25},
    "ascent 1/8": {"ascent_fraction": 0.125},
    "ascent 1/16": {"ascent_fraction": 0.0625},
    "last eighth": {"ascent_depth": 0.125},
    "interval 2, ascent 1/4": {"interval": 2, "ascent_fraction": 0.25},
    "interval 2, ascent 1/8": {"interval": 2, "ascent_fraction": 0.125},
    "interval 5, ascent 1/8": {"interval": 5, "ascent_fraction": 0.125},
    "stale 5": {"reuse": "stale", "interval": 5},
    "previous": {"reuse": "previous"},
    "echo 2": {"reuse": "echo", "interval": 2},
    "echo 3": {"reuse": "echo", "interval": 3},
    ECHOED: {"reuse": "echo", "interval": 2},
    "look 5": {"reuse": "look", "interval": 5},
    "trigger": {"trigger": True},
    "case 1": {"case": 1},
    "case 2": {"case": 2},
    "adaptive": {"adaptive": True},
}


def saq_config(rho: float | None, fields: dict[str, Any]) -> SAQConfig:
    """The configuration of one way to train: whole batches perturb every step unless `fields` say otherwise."""
    said = {"schedule", *KNOBS} & set(fields)
    return SAQConfig(rho=rho, **fields) if said else SAQConfig(rho=rho, schedule="full", **fields)

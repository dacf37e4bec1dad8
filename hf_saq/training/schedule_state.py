"""Store what a schedule must remember when a run is interrupted: in `checkpoint-N`, one file for each process.

And one file for all of them with the settings that decide a step, so that a run that goes on with others can say so.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import SAQConfig
from ..sharpness.schedules import ScheduledStep
from ..storage.saved_directory import read_json_object

FILE_PREFIX = "perturbation_state"
SETTINGS_FILE = "perturbation_settings.json"


def save_schedule(step: ScheduledStep, checkpoint: str | Path, process: int, processes: int) -> None:
    """Write the state of this process as safetensors; write nothing if the schedule has no state."""
    if not step.schedule.has_state:
        return
    tensors, values = step.state()
    metadata = {"schedule": step.schedule.kind, "processes": processes, "values": values}
    save_file(
        _apart(tensors),
        _file(checkpoint, process),
        metadata={name: json.dumps(value) for name, value in metadata.items()},
    )


def load_schedule(step: ScheduledStep, checkpoint: str | Path, process: int, processes: int) -> None:
    """Load what [`save_schedule`] wrote.

    Raises:
        ValueError: If the schedule needs a file that is not there, or the file is of another schedule, number of
            processes or model.
    """
    if not step.schedule.has_state:
        return
    file, kind = _file(checkpoint, process), step.schedule.kind
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: a run with {kind} cannot go on exactly without it. Resume with the schedule and the "
            "number of processes that wrote the checkpoint, or start a new run from its weights."
        )
    with safe_open(file, framework="pt") as stored:
        metadata = {name: json.loads(value) for name, value in stored.metadata().items()}
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    for name, here in (("schedule", kind), ("processes", processes)):
        if metadata[name] != here:
            raise ValueError(
                f"{file} was written with {name} {metadata[name]!r}, but this run has {here!r}. Resume with the same, "
                "or start a new run from the weights of the checkpoint."
            )
    step.load_state(tensors, metadata["values"])


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with one before them, which safetensors refuses.

    Case 1 adds one tensor behind all quantizers of a weight that several layers have.
    """
    found: dict[str, Tensor] = {}
    seen: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        memory = tensor.device, tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone().contiguous() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return found


def _file(checkpoint: str | Path, process: int) -> Path:
    return Path(checkpoint) / f"{FILE_PREFIX}_{process}.safetensors"


def save_settings(config: SAQConfig, step: ScheduledStep | None, checkpoint: str | Path) -> None:
    """Write the settings that decide a step under `config`."""
    text = json.dumps(_settings(config, step), indent=2) + "\n"
    (Path(checkpoint) / SETTINGS_FILE).write_text(text, encoding="utf-8")


def tell_of_other_settings(config: SAQConfig, step: ScheduledStep | None, checkpoint: str | Path) -> None:
    """Warn if the steps of `checkpoint` were decided by other settings than those under `config`.

    Checkpoints of older versions do not have the settings; nothing is said of these.
    """
    file = Path(checkpoint) / SETTINGS_FILE
    if not file.is_file():
        return
    stored, here = read_json_object(file), _settings(config, step)
    others = [name for name in here if name in stored and stored[name] != here[name]]
    if others:
        before, now = (", ".join(f"{name}={some[name]!r}" for name in others) for some in (stored, here))
        warnings.warn(
            f"SAQTrainer: {checkpoint} was trained with {before}, but this run goes on with {now}. If that is not "
            "meant, resume with the SAQConfig that wrote the checkpoint.",
            stacklevel=2,
        )


def _settings(config: SAQConfig, step: ScheduledStep | None) -> dict[str, Any]:
    """Return what decides a step, JSON-plain; a radius and knobs that were not given are those used in their place.

    What has no effect beside the others is left out.
    """
    if step is None:
        return {"case": None}
    radius = step.minimizer.rho if config.rho is None else config.rho
    found: dict[str, Any] = {"rho": radius, "case": config.case, "adaptive": config.adaptive, "eta": config.eta}
    found |= {"perturb": sorted(config.perturb), "sync": config.sync, **asdict(step.schedule)}
    idle = [("eta", config.adaptive), ("look_alpha", step.schedule.reuse == "look")]
    return {name: value for name, value in found.items() if (name, False) not in idle}

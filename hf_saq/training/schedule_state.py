"""Store what a schedule must remember when a run is interrupted: in `checkpoint-N`, one file for each process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..sharpness.schedules import ScheduledStep

FILE_PREFIX = "perturbation_state"


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

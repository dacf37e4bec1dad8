"""Save every random generator that a forward pass may draw from, so that two passes see the same masks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class RNGState:
    """Holds the states of python's, numpy's, torch's and the accelerator's generators at the moment it is made."""

    python: Any = field(default_factory=random.getstate)
    numpy: Any = field(default_factory=np.random.get_state)
    cpu: torch.Tensor = field(default_factory=torch.get_rng_state)
    device: Any = field(default_factory=lambda: _accelerator_rng_state())

    def restore(self) -> None:
        """Set all generators back to these states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            module = _device_module()
            (module.set_rng_state_all if isinstance(self.device, list) else module.set_rng_state)(self.device)


def _accelerator_rng_state() -> torch.Tensor | list[torch.Tensor] | None:
    """Return the states of all devices, where there may be several: a model need not be on the current one."""
    module = _device_module()
    if module is None:
        return None
    return module.get_rng_state_all() if hasattr(module, "set_rng_state_all") else module.get_rng_state()


def _device_module() -> Any:
    """Return `torch.cuda`, `torch.xpu`, ... of the accelerator in use, or `None` on a CPU-only machine."""
    return torch.get_device_module() if torch.accelerator.is_available() else None

"""Observe the inputs that quantizers see, and keep what calibration needs of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...quantizers import Observer

SAMPLES_PER_BATCH = 2**17
"""Values kept of each activation tensor. Rare large values decide a clipping point: 131,072 draws see those that make
up a ten-thousandth of an activation, and are still small enough for any model."""
SAMPLES = 2**20
"""Values kept of one quantizer, 4 MB: of more, each has the same chance to be among them."""


class ActivationObserver(Observer):
    """Keeps the smallest value and a random sample of all values of a quantizer's input."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.ran = False
        self.minimum, self.maximum = float("inf"), -float("inf")
        self.offered = 0
        self.samples: list[Tensor] = []
        self.generator = torch.Generator("cpu").manual_seed(0)

    def update(self, x: Tensor) -> None:
        self.ran = True
        if not x.is_floating_point():
            raise ValueError(
                f"{self.path}: its input is of {x.dtype}, and indices have no grid; expected floating point. Leave it "
                f"as it is: overrides={{{self.path.rpartition('.')[0]!r}: {{'activation_bits': None}}}}."
            )
        flat = x.detach().reshape(-1)
        if flat.numel():
            smallest, largest = (bound.item() for bound in flat.aminmax())
            if not math.isfinite(smallest) or not math.isfinite(largest):
                raise ValueError(
                    f"{self.path}: calibration found infinite or NaN values, so there is no range to fit; check the "
                    "batches, and the weights of the layers before it."
                )
            self.minimum, self.maximum = min(self.minimum, smallest), max(self.maximum, largest)
            if flat.numel() > SAMPLES_PER_BATCH:
                # Draw at random: with an even stride all draws may miss the same channel or place of the layout.
                # The generator has a seed of its own, so that every process draws alike.
                # On the CPU whatever torch's default device is, as its generator is.
                draw = torch.randint(flat.numel(), (SAMPLES_PER_BATCH,), generator=self.generator, device="cpu")
                flat = flat[draw.to(flat.device)]
            self._keep(flat.float())

    @property
    def is_constant(self) -> bool:
        """Tell whether all values are equal except for rounding, so that no range can be read from them."""
        largest = max(abs(self.minimum), abs(self.maximum))
        return self.maximum - self.minimum <= 1e-6 * largest

    def _keep(self, values: Tensor) -> None:
        """Add to the sample; once that is full, replace some of it (reservoir sampling)."""
        space = max(SAMPLES - self.offered, 0)
        if space:
            self.samples.append(values[:space])
        late = values[space:]
        self.offered += min(space, len(values))
        if not len(late):
            return
        if len(self.samples) > 1:
            self.samples = [torch.cat(self.samples)]
        of_cpu: Any = {"dtype": torch.float64, "device": "cpu"}
        counts = torch.arange(self.offered + 1, self.offered + len(late) + 1, **of_cpu)
        places = (torch.rand(len(late), generator=self.generator, **of_cpu) * counts).long()
        taken = (places < SAMPLES).nonzero().flatten()
        # Of several values for one place the last stays, on every device.
        last = dict(zip(places[taken].tolist(), taken.tolist(), strict=True))
        if last:
            where, what = (torch.tensor(list(i), device=late.device) for i in (last.keys(), last.values()))
            self.samples[0][where] = late[what]
        self.offered += len(late)


class PassThrough(Observer):
    """Lets the float weight through while activations are observed."""

    ran = False

    def update(self, x: Tensor) -> None:  # noqa: ARG002
        self.ran = True

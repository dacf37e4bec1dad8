"""The random numbers of both passes: every generator that a forward may draw from."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_saq.sharpness import RNGState, random_state


class TwoDevices:
    """Stands for `torch.cuda` on a machine with two devices, of which the first is the current one."""

    def __init__(self):
        self.generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    def get_rng_state(self) -> Tensor:
        return self.generators[0].get_state()

    def set_rng_state(self, state: Tensor) -> None:
        self.generators[0].set_state(state)

    def get_rng_state_all(self) -> list[Tensor]:
        return [generator.get_state() for generator in self.generators]

    def set_rng_state_all(self, states: list[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


def test_generators_of_devices_other_than_the_current_one_are_restored(monkeypatch):
    """A user trains on `cuda:1` and never calls `set_device`: dropout drew another mask in the second pass."""
    devices = TwoDevices()
    monkeypatch.setattr(random_state, "_device_module", lambda: devices)
    before = RNGState()
    first = [torch.rand(3, generator=generator) for generator in devices.generators]
    before.restore()
    second = [torch.rand(3, generator=generator) for generator in devices.generators]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

"""Store, besides the learned values of a quantizer, whether it is calibrated, and its sign.

Whoever averages models (EMA, SWA, model soups) may average these too, and must not end with a model that passes for
calibrated and is not. Two things see to that:

- The learned values are NaN until calibration. So is every average that they ever were a part of.
- The state is a float, which no average cuts off to an integer, and only the exact codes count. An average of
  different codes is none of them: between two there is no third but "not calibrated", whose values are NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

NOT_CALIBRATED, UNSIGNED, SIGNED = 35, 50, 100
"""Whole numbers of bfloat16 and float16 too."""
FORMER_CODES = {-1: NOT_CALIBRATED, 0: UNSIGNED, 1: SIGNED}
"""What the first version of the format stored. No average of the codes above becomes one of these."""
ROUNDING = 1e-3
"""How far from a code the average of equal states may be: a few times what rounding does in float32. To be taken for
equal, one model of an average must be one of 50,000."""


def has_no_values(tensor: Tensor) -> bool:
    """Tell whether nothing can be read from `tensor`: it is on the meta device, or a fake one of the compiler."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


class HasRangeState(nn.Module):
    """Keeps "calibrated" and the sign in one buffer, and reads them from nowhere else.

    Whoever writes to the buffer (loading, an average of models, DDP when it wraps a model) is obeyed from the next
    forward on. Reading a value waits for the device, so it is read anew only if the buffer is another tensor than the
    one read last or if its version has changed. Every write changes it, except those through `.data` and those that
    DDP makes in a forward: there it copies the buffers of rank 0 and takes care that no version shows it.

    The value that was read last serves where a tensor has no value to read: on the meta device, for fake tensors, in
    an export and for the many states of an ensemble under `vmap`, which must equal it. `torch.compile` reads when it
    traces; its code is made anew when the value read last has changed.

    Attributes:
        range_state: `NOT_CALIBRATED`, `UNSIGNED` or `SIGNED`; float32, a scalar. Older checkpoints have int8.
        path (`str`): Dotted name of this quantizer inside its model, for error messages.
    """

    range_state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.path = ""
        self.register_buffer("range_state", torch.tensor(NOT_CALIBRATED, dtype=torch.float32))
        self._last_value = NOT_CALIBRATED
        self._read_from: tuple[Tensor, int] | None = None  # the tensor that it was read from, and its version then

    @property
    def initialized(self) -> bool:
        """Tell whether the quantizer has a range."""
        return self._state() != NOT_CALIBRATED

    @torch.no_grad()
    def take_state(self, signed: bool) -> None:
        """Make the quantizer calibrated from here on, with codes of this sign."""
        self._write_state(SIGNED if signed else UNSIGNED)

    @torch.no_grad()
    def check_state(self, is_whole: bool = True) -> None:
        """Raise `ValueError` if the stored state is none of the three, or if a learned value is not finite although it
        says "calibrated"; bring what older checkpoints hold up to date.

        Args:
            is_whole: Whether state and values belong together already. If not, what is still to come may be loaded
                later, and the next forward looks at all of it.
        """
        stored = self.range_state
        value = self._read_state(stored, is_whole)
        if has_no_values(stored):
            return
        if not stored.dtype.is_floating_point or stored.dtype.itemsize < 4:
            self.range_state = stored.float()
        if stored.item() != value:
            self._write_state(value)
        if value == NOT_CALIBRATED and is_whole:
            self._fill(torch.nan)

    @torch.no_grad()
    def _fill(self, value: float) -> None:
        """Set all learned values: to NaN while there is no range, so that no average of them passes for one."""
        for parameter in self.parameters(recurse=False):
            parameter.fill_(value)

    def _state(self) -> int:
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling():
                self._look()
            return self._last_value
        return self._look()

    def _look(self) -> int:
        """Return the value of the buffer; read it only if it may be another than the one read last."""
        stored = self._buffers["range_state"]  # what `functional_call` puts in its place too
        assert stored is not None
        if self._read_from is not None and self._read_from[0] is stored and self._read_from[1] == stored._version:
            return self._last_value
        return self._read_state(stored)

    # What `torch.compiler.assume_constant_result` says, without importing the compiler: do not trace it, run it.
    _look._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _read_state(self, stored: Tensor, is_whole: bool = True) -> int:
        if has_no_values(stored):
            return self._last_value
        self._read_from = None
        if torch._C._functorch.is_batchedtensor(stored):
            self._check_alike(stored)
            return self._last_value
        # Read among fake tensors what is real itself: there results of operations on it are fake, too.
        with _disable_current_modes() if detect_fake_mode() is not None else nullcontext():
            value = _with_nan_of(self.parameters(recurse=False), stored).item()
            are_finite = value == value
            if not are_finite:
                value = stored.item()
        value = FORMER_CODES.get(value, value)  # type: ignore[arg-type]
        found = next((code for code in FORMER_CODES.values() if abs(value - code) < ROUNDING), None)
        if found is None:
            raise self._wrong_state(value)
        if found == NOT_CALIBRATED or are_finite:
            self._remember(found, stored)
        elif is_whole:
            raise self._wrong_values()
        return found

    def _check_alike(self, states: Tensor) -> None:
        """Raise `ValueError` unless all models of an ensemble, which `vmap` runs as one, have the state read last."""
        while torch._C._functorch.is_batchedtensor(states):
            states = torch._C._functorch.get_unwrapped(states)
        found = sorted({int(value) if value == int(value) else value for value in states.flatten().tolist()})
        if found != [self._last_value]:
            raise ValueError(
                f"{self.path}: the models that vmap runs as one have the range states {found} ({NOT_CALIBRATED} not "
                f"calibrated, {UNSIGNED} unsigned, {SIGNED} signed), and the one they run in {self._last_value}; "
                "expected one state for all. Quantize with activation_mode='signed', and calibrate all of them."
            )

    def _write_state(self, value: int) -> None:
        self.range_state.fill_(value)
        self._remember(value, self.range_state)

    def _remember(self, value: int, stored: Tensor) -> None:
        self._last_value = value
        # Tensors made in inference mode have no version. "Not calibrated" is never taken for granted: a forward stops
        # there anyway, and the state may have arrived through `.data`.
        keep = value != NOT_CALIBRATED and not stored.is_inference()
        self._read_from = (stored, stored._version) if keep else None

    def _wrong_state(self, value: float) -> ValueError:
        if NOT_CALIBRATED < value < SIGNED or value != value or value != int(value):
            cause = (
                "This looks like an average of state dicts (EMA, SWA, a model soup), and a sign has no average: "
                "average the parameters of calibrated models and copy their buffers, as torch's AveragedModel does by "
                "default."
            )
        else:
            cause = "The checkpoint is damaged or was written by something else."
        return ValueError(
            f"{self.path}.range_state is {value:g}; expected {NOT_CALIBRATED} (not calibrated), {UNSIGNED} (unsigned) "
            f"or {SIGNED} (signed), or one of the older codes -1, 0 and 1. {cause}"
        )

    def _wrong_values(self) -> ValueError:
        names = [name for name, p in self.named_parameters(recurse=False) if not torch.isfinite(p).all()]
        return ValueError(
            f"{self.path}.{' and '.join(names)}: NaN or infinite, although this quantizer counts as calibrated. "
            "Either this is an average (EMA, SWA, a model soup) that was begun before calibration, whose values from "
            "then weigh in it: begin it with the calibrated model. Or training diverged: go back to an earlier "
            "checkpoint."
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        own = ("range_state", *(name for name, _ in self.named_parameters(recurse=False)))
        is_whole = all(f"{prefix}{name}" in state_dict for name in own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.check_state(is_whole)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: a copy, or what is unpickled, has another buffer and reads it by itself."""
        return {**self.__dict__, "_read_from": None}


def _with_nan_of(parameters: Iterable[Tensor], state: Tensor) -> Tensor:
    """Return the value of `state`, or NaN if a parameter that can be read has a value that is not finite.

    One tensor, so that it is fetched at once. Parameters that FSDP shards are passed over: which process reads, and
    when, need not be the same everywhere.
    """
    for parameter in parameters:
        is_of_an_ensemble = torch._C._functorch.is_batchedtensor(parameter)
        if not (has_no_values(parameter) or is_of_an_ensemble or hasattr(parameter, "device_mesh")):
            state = state + parameter.detach().sum() * 0
    return state

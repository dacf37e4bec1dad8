"""What a checkpoint holds of a quantizer besides its learned values: whether it is calibrated, and its sign.

Whoever averages state dicts (EMA, SWA, model soups) without leaving out the buffers averages this one too, and the
result is cut off to an integer. So the three codes lie apart, "not calibrated" lowest: an average of different states,
also one that is cut off after each of many small steps, is an error sooner or later and does not come to rest at
another state. (Were "not calibrated" in the middle, cutting off would carry it down to the lowest code.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

NOT_CALIBRATED, UNSIGNED, SIGNED = 35, 50, 100
"""Rounding does not move them: `decay * code + (1 - decay) * code` in float32 is `code` for the decays in use. Simple
averages (a half, a third) of the outer two are not the middle one."""
FORMER_CODES = {-1: NOT_CALIBRATED, 0: UNSIGNED, 1: SIGNED}
"""What the first version of the format stored. No average of the codes above becomes one of these."""
ROUNDING = 1e-3
"""How far from an integer the average of equal states may be."""


def has_no_values(tensor: Tensor) -> bool:
    """Whether nothing can be read from `tensor`: it is on the meta device, or a fake one of the compiler."""
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
        range_state: `NOT_CALIBRATED`, `UNSIGNED` or `SIGNED`; int8, a scalar.
        path (`str`): Dotted name of this quantizer inside its model, for error messages.
    """

    range_state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.path = ""
        self.register_buffer("range_state", torch.tensor(NOT_CALIBRATED, dtype=torch.int8))
        self._last_value = NOT_CALIBRATED
        self._read_from: tuple[Tensor, int] | None = None  # the tensor that it was read from, and its version then

    @property
    def initialized(self) -> bool:
        """Whether the quantizer has a range."""
        return self._state() != NOT_CALIBRATED

    @torch.no_grad()
    def take_state(self, signed: bool) -> None:
        """Make the quantizer calibrated from here on, with codes of this sign."""
        self._write_state(SIGNED if signed else UNSIGNED)

    @torch.no_grad()
    def check_state(self) -> None:
        """Raise `ValueError` if the stored state is none of the three; codes of older checkpoints are brought up to
        date."""
        value, stored = self._state(), self.range_state
        if not has_no_values(stored) and stored.item() != value:
            self._write_state(value)

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

    def _read_state(self, stored: Tensor) -> int:
        if has_no_values(stored):
            return self._last_value
        self._read_from = None
        if torch._C._functorch.is_batchedtensor(stored):
            self._check_alike(stored)
            return self._last_value
        value = stored.item()
        value = FORMER_CODES.get(value, value)  # type: ignore[arg-type]
        if value not in FORMER_CODES.values():
            raise self._wrong_state(value)
        self._remember(int(value), stored)
        return self._last_value

    def _check_alike(self, states: Tensor) -> None:
        """Raise `ValueError` unless all models of an ensemble, which `vmap` runs as one, have the state read last."""
        while torch._C._functorch.is_batchedtensor(states):
            states = torch._C._functorch.get_unwrapped(states)
        found = sorted(set(states.flatten().tolist()))
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
        if NOT_CALIBRATED < value < SIGNED or value != int(value):
            cause = (
                "This looks like an average of state dicts (EMA, SWA, a model soup), and a sign has no average: "
                "average the parameters of calibrated models and copy their buffers, as torch's AveragedModel does by "
                "default."
            )
        else:
            cause = "The checkpoint is damaged or was written by something else."
        return ValueError(
            f"{self.path}.range_state is {value}; expected {NOT_CALIBRATED} (not calibrated), {UNSIGNED} (unsigned) "
            f"or {SIGNED} (signed), or one of the older codes -1, 0 and 1. {cause}"
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = f"{prefix}range_state"
        arriving = state_dict.get(key)
        if isinstance(arriving, Tensor) and arriving.is_floating_point() and not arriving.is_meta:
            value = arriving.item()
            if not abs(value - round(value)) < ROUNDING:  # copying it into int8 would cut it off without a word
                raise self._wrong_state(value)
            state_dict[key] = arriving.round().to(torch.int8)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.check_state()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: a copy, or what is unpickled, has another buffer and reads it by itself."""
        return {**self.__dict__, "_read_from": None}

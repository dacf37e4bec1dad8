"""What a checkpoint holds of a quantizer besides its learned values: whether it is calibrated, and its sign."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

NOT_CALIBRATED, UNSIGNED, SIGNED = -1, 0, 1


class HasRangeState(nn.Module):
    """Keeps "calibrated" and the sign in one buffer, and reads them from nowhere else.

    Whoever writes to the buffer (loading, an average of models, DDP when it wraps a model) is obeyed from the next
    forward on. Reading a value waits for the device, so it is read anew only if the buffer is another tensor than the
    one read last or if its version has changed. Every write changes it, except those through `.data` and those that
    DDP makes in a forward: there it copies the buffers of rank 0 and takes care that no version shows it.

    The value that was read last serves where a tensor has no value to read: on the meta device, for fake tensors and
    in an export. `torch.compile` reads when it traces; its code is made anew when the value read last has changed.

    Attributes:
        range_state: -1 not calibrated, 0 unsigned, 1 signed; int8, a scalar.
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

    def check_state(self) -> None:
        """Raise `ValueError` if the stored state is none of the three."""
        self._state()

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
        if stored.is_meta or isinstance(stored, FakeTensor):
            return self._last_value
        self._read_from = None
        value = stored.item()
        if value not in (NOT_CALIBRATED, UNSIGNED, SIGNED):
            raise ValueError(
                f"{self.path}.range_state is {value}; expected -1 (not calibrated), 0 (unsigned) or 1 (signed). "
                "The checkpoint is damaged or was written by something else."
            )
        self._remember(int(value), stored)
        return self._last_value

    def _write_state(self, value: int) -> None:
        self.range_state.fill_(value)
        self._remember(value, self.range_state)

    def _remember(self, value: int, stored: Tensor) -> None:
        self._last_value = value
        # Tensors made in inference mode have no version. "Not calibrated" is never taken for granted: a forward stops
        # there anyway, and the state may have arrived through `.data`.
        keep = value != NOT_CALIBRATED and not stored.is_inference()
        self._read_from = (stored, stored._version) if keep else None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.check_state()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was read: a copy, or what is unpickled, has another buffer and reads it by itself."""
        return {**self.__dict__, "_read_from": None}

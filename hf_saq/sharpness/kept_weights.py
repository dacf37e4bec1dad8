"""Quantized weights of a first pass, for the second: between the two nothing moves, so `Q(w)` is computed once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..quantizers import Quantizer
from .perturbed_tensors import QuantizedWeight

_Versions = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Kept:
    w_q: Tensor
    versions: _Versions


class KeptWeights:
    """`Q(w)` of quantizers that can be given their output, as long as nothing was written to `w` or its grid."""

    def __init__(self) -> None:
        self._kept: dict[QuantizedWeight, _Kept] = {}

    def keep(self, entry: QuantizedWeight, read: Tensor, w_q: Tensor) -> None:
        """Remember `w_q`, what `entry.quantizer` has just made of `read`, if it can be used again."""
        plain = type(w_q) is Tensor and w_q.dtype == entry.weight.dtype
        if entry.quantizer.output_can_be_given and read is entry.weight and plain:
            self._kept[entry] = _Kept(w_q.detach(), _versions(entry))

    def clear(self) -> None:
        self._kept.clear()

    def give(self, eps: Mapping[Quantizer, Tensor]) -> set[Quantizer]:
        """Have quantizers return `Q(w) + eps` in their next forward without computing `Q(w)`. Forgets what was kept.

        Returns:
            The quantizers that will, whose outputs have `eps` in them already.
        """
        given = set()
        while self._kept:  # one after the other: at no time are there two copies of all weights
            entry, kept = self._kept.popitem()
            if entry.quantizer in eps and kept.versions == _versions(entry):
                entry.quantizer.given_output = (entry.weight, kept.w_q + eps[entry.quantizer])
                given.add(entry.quantizer)
        return given


def _versions(entry: QuantizedWeight) -> _Versions:
    """Changes with every write, in place or not, to what `Q(w)` depends on."""
    tensors = (entry.weight, *entry.quantizer.parameters(), *entry.quantizer.buffers())
    return tuple((id(t), t._version) for t in tensors)

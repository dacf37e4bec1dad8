"""Quantize once what several layers read: query, key and value of an attention, for example."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer
from .recompute import active_hooks

QUANTIZER = "activation_quantizer"


class SharedInput:
    """Remembers what became of a tensor until all layers that read it have asked.

    All of its readers have the same `activation_quantizer`. It is a child of the first of them, where its values are
    stored; the others refer to it. If a reader does not ask, the quantized tensor lives until another one comes.

    Args:
        count: Number of layers that read the tensor.
    """

    def __init__(self, count: int):
        self.count = count
        self._kept: _Kept | None = None

    def once(
        self,
        reader: nn.Module,
        x: Tensor,
        quantize: Callable[[Tensor], Tensor],
        values: Iterable[Tensor | None] = (),
    ) -> Tensor:
        """Return `quantize(x)`, computed for the first reader and handed to the others.

        Args:
            reader: The layer that asks. If it asks again, another forward has begun, and `x` is quantized anew.
            x: What is quantized. Another tensor, or one that was written to since, is quantized anew.
            values: Further tensors that `quantize` depends on, such as a scale.
        """
        # A compiler finds equal computations itself, and nothing counts writes to tensors of inference mode.
        if torch.compiler.is_dynamo_compiling() or x.is_inference():
            return quantize(x)
        versions = tuple(version_of(tensor) for tensor in (x, *values) if tensor is not None)
        # Tensors saved inside of a checkpointed region belong to it, so that another region may not use them.
        state = (torch.is_grad_enabled(), active_hooks(), versions)
        kept = self._kept
        if kept is not None and kept.x() is x and kept.state == state and id(reader) not in kept.asked:
            asked = kept.asked | {id(reader)}
            self._kept = kept._replace(asked=asked) if len(asked) < self.count else None
            return kept.x_q
        x_q = quantize(x)
        self._kept = _Kept(weakref.ref(x), state, x_q, frozenset([id(reader)]))
        return x_q

    def __getstate__(self) -> dict[str, Any]:
        """Leave tensors of a forward out of copies and pickles."""
        return {**vars(self), "_kept": None}


class _Kept(NamedTuple):
    x: weakref.ref[Tensor]
    state: tuple[Any, ...]
    x_q: Tensor
    asked: frozenset[int]


def version_of(tensor: Tensor) -> tuple[int, int]:
    """Return what changes if another tensor comes, or if this one is written to."""
    return id(tensor), -1 if tensor.is_inference() else tensor._version


class QuantizesInput:
    """Quantizes the input of a layer: the mixin of all layers that do.

    Attributes:
        activation_quantizer: `None` keeps the input in float.
        shared_input: What layers have in common that read the same tensor; `None` where the layer reads it alone.
    """

    activation_quantizer: Quantizer | None
    shared_input: SharedInput | None = None

    def quantized_input(self, x: Tensor) -> Tensor:
        quantizer = self.activation_quantizer
        if quantizer is None:
            return x
        if self.shared_input is None:
            return quantizer(x)
        return self.shared_input.once(self, x, quantizer, quantizer._parameters.values())  # type: ignore[arg-type]

    def _replicate_for_data_parallel(self) -> Any:
        if self.shared_input is not None:
            path = getattr(self.activation_quantizer, "path", type(self).__name__)
            raise ValueError(
                f"{path}: nn.DataParallel copies layers one by one, and a quantizer that several of them share would "
                "stay on the first device. Use DistributedDataParallel (accelerate launch), or share_inputs=False."
            )
        return super()._replicate_for_data_parallel()  # type: ignore[misc]


def share_input(layers: Sequence[nn.Module]) -> None:
    """Let all `layers` quantize their input with the quantizer of the first, in place; those of the others go."""
    shared = SharedInput(len(layers))
    for layer in layers:
        layer.shared_input = shared  # type: ignore[assignment]
    give_readers(layers, getattr(layers[0], QUANTIZER))


def give_readers(layers: Sequence[nn.Module], quantizer: nn.Module) -> None:
    """Make `quantizer` the one of all `layers`, which share an input; a child of the first alone."""
    first, *others = layers
    setattr(first, QUANTIZER, quantizer)
    for layer in others:
        layer._modules.pop(QUANTIZER, None)
        vars(layer)[QUANTIZER] = quantizer  # not as a child: its values would be stored twice


def take_over_input(new: nn.Module, old: nn.Module) -> None:
    """Give `new`, which takes the place of `old`, the same quantizer of its input, shared as it is there."""
    new.shared_input = old.shared_input
    if refers_to_anothers_quantizer(old):
        new._modules.pop(QUANTIZER, None)
        vars(new)[QUANTIZER] = vars(old)[QUANTIZER]
    else:
        setattr(new, QUANTIZER, getattr(old, QUANTIZER))


def refers_to_anothers_quantizer(layer: nn.Module) -> bool:
    """Tell whether the quantizer of the input of `layer` belongs to another layer."""
    return isinstance(vars(layer).get(QUANTIZER), nn.Module)


def let_go_of_shared_input(layer: nn.Module, others: Sequence[nn.Module]) -> None:
    """Leave the input of `layer` in float; `others`, the layers that share it, go on without, the first one first."""
    quantizer = getattr(layer, QUANTIZER)
    held = not refers_to_anothers_quantizer(layer)
    layer.shared_input = None  # type: ignore[assignment]
    vars(layer).pop(QUANTIZER, None)
    layer._modules[QUANTIZER] = None
    if held and others:
        give_readers(others, quantizer)
    for other in others:
        shared: Any = other.shared_input
        shared.count = len(others)
        if len(others) == 1:
            other.shared_input = None  # type: ignore[assignment]


def refuse_orphaned_inputs(model: nn.Module) -> None:
    """Raise `ValueError` if a layer uses a quantizer that no layer of `model` holds any more: its values would be
    lost."""
    held = set(model.modules())
    for name, layer in model.named_modules():
        if refers_to_anothers_quantizer(layer) and vars(layer)[QUANTIZER] not in held:
            raise ValueError(
                f"{name}: its input is quantized with the quantizer of a layer that is no part of this "
                f"{type(model).__name__} any more. Put the layer back, or quantize the model as it is now."
            )

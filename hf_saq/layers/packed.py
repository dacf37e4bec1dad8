"""Keep the weight of a layer as packed integers, and run inference from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import QuantizerSettings
from ..quantizers.precision import without_narrowing
from .float_form import FloatForm, take_over_hooks
from .packing import pack_codes, packed_size, unpack_as_float, unpack_codes
from .quantized import QuantizedLayer
from .shared_input import QuantizesInput, take_over_input
from .tracing import call_in_graph, is_symbol

GRID_TOLERANCE = 64
"""How far a weight may move when a layer is unpacked, in rounding errors of the layer's largest weight."""


class PackedLayer(QuantizesInput, nn.Module):
    """Runs inference with a weight of `ceil(numel * bits / 8)` bytes of codes plus a scale; it cannot be trained.

    Args:
        functional: A quantized layer on the meta device: its hyperparameters, `compute` and weight quantizer, without
            memory.
        bias: `(out,)` or `None`.
        dtype: Floating point type that the weight is decoded to.

    Buffers: `packed_weight` uint8 `(bytes,)`; `weight_scale` and, if the grid has one, `weight_offset`, float32 of the
    quantizer's `scale_shape`. The Parameter `weight` is empty and has three jobs: code that asks for
    `layer.weight.dtype` or `.device` gets a sensible answer; so does code that asks the first Parameter of a model for
    its type, as transformers does before it saves (a step size would answer float32); and a loader that does not know
    this format stops at a shape mismatch instead of leaving the weight at random values.
    """

    weight: nn.Parameter
    packed_weight: Tensor
    weight_scale: Tensor
    weight_offset: Tensor | None
    float_form: FloatForm
    _functional: QuantizedLayer
    keeps_decoded = False
    _decoded: tuple[list[tuple[Tensor, int, int, torch.dtype]], Tensor] | None = None
    """The decoded weight, with the tensors that it was decoded from and how often they had been written to."""

    def __init__(self, functional: QuantizedLayer, bias: nn.Parameter | None, dtype: torch.dtype):
        super().__init__()
        self.weight_shape = tuple(functional.weight.shape)
        self.path = ""
        # Keep it out of the submodules: it has no state of its own.
        object.__setattr__(self, "_functional", functional)
        assert functional.weight_quantizer is not None
        has_offset, scale_shape = functional.weight_quantizer.has_offset, self.settings.scale_shape
        size = packed_size(functional.weight.numel(), self.bits)
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self.register_buffer("packed_weight", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones(scale_shape, dtype=torch.float32))
        self.register_buffer("weight_offset", torch.zeros(scale_shape, dtype=torch.float32) if has_offset else None)
        self.bias = bias
        self.activation_quantizer = None

    @property
    def settings(self) -> QuantizerSettings:
        """Return the settings of the weight quantizer."""
        assert self._functional.weight_quantizer is not None
        return self._functional.weight_quantizer.settings

    @property
    def bits(self) -> int:
        return self.settings.bits

    @classmethod
    def skeleton(cls, layer: QuantizedLayer) -> PackedLayer:
        """Make a packed layer of the shape of `layer`, still without its codes."""
        assert layer.weight_quantizer is not None
        quantizer = layer.weight_quantizer
        with torch.device("meta"):
            functional = type(layer)(**layer.constructor_arguments(layer))
            functional.weight_quantizer = quantizer.blank_copy()
        packed = cls(functional, layer.bias, layer.weight.dtype).to(layer.weight.device)
        for name, value in layer.constructor_arguments(layer).items():
            if name != "bias":
                setattr(packed, name, value)  # models read `stride`, `in_features` and the like of their layers
        packed.path = quantizer.path.removesuffix(".weight_quantizer")
        packed.float_form = layer.float_form
        take_over_input(packed, layer)
        take_over_hooks(packed, layer)
        return packed.train(layer.training)

    @classmethod
    def from_quantized(cls, layer: QuantizedLayer) -> PackedLayer:
        """Pack a trained `layer`."""
        assert layer.weight_quantizer is not None
        packed = cls.skeleton(layer)
        quantizer = layer.weight_quantizer
        if not quantizer.initialized:
            raise RuntimeError(f"{quantizer.path}: cannot pack a weight quantizer that has no range yet.")
        scale, offset = quantizer.grid(layer.weight)
        packed.packed_weight.copy_(pack_codes(layer.codes(), quantizer.bits, signed=True))
        packed.weight_scale.copy_(scale)
        if packed.weight_offset is not None:
            packed.weight_offset.copy_(offset)
        return packed

    @torch.no_grad()
    def to_quantized(self) -> QuantizedLayer:
        """Make the trainable form: a latent weight that quantizes to the same codes on the same grid.

        Raises:
            ValueError: If the quantizer cannot be brought to that grid.
        """
        kind = type(self._functional)
        assert self._functional.weight_quantizer is not None
        with torch.device("meta"):
            layer = kind(**kind.constructor_arguments(self._functional))
        with self.weight.device:
            quantizer = self._functional.weight_quantizer.blank_copy()
        codes = self.codes()
        scale, offset = self.weight_scale, self.weight_offset
        latent = quantizer.take_over(codes, scale, torch.zeros_like(scale) if offset is None else offset)
        layer.weight = nn.Parameter(latent.to(self.weight.dtype))
        layer.register_parameter("bias", self.bias)
        layer.weight_quantizer = quantizer
        take_over_input(layer, self)
        layer.float_form = self.float_form
        wrong = int((quantizer.quantize(layer.weight) != codes).sum())
        expected = self.quantized_weight()
        moved = (layer.quantized_weight() - expected).abs().max()
        if wrong or not moved <= GRID_TOLERANCE * torch.finfo(expected.dtype).eps * expected.abs().max():
            raise ValueError(
                f"{self.path}: {type(quantizer).__name__} cannot be brought back to this grid of {self.bits} bits: "
                f"{wrong} of {codes.numel()} codes would change, weights by up to {moved:.1e}. Load the checkpoint in "
                "float storage that was packed."
            )
        take_over_hooks(layer, self)
        return layer.train(self.training)

    def check_size(self) -> None:
        """Raise `ValueError` if there are not as many bytes of codes as bits and shape ask for."""
        size = packed_size(torch.Size(self.weight_shape).numel(), self.bits)
        if self.packed_weight.shape != (size,):
            raise ValueError(
                f"{self.path}.packed_weight: found shape {tuple(self.packed_weight.shape)}, expected ({size},): "
                f"{self.bits} bits for each element of a weight of shape {self.weight_shape}. The checkpoint's "
                "tensors and its quantization_config do not belong together."
            )

    def codes(self) -> Tensor:
        """Unpack the integer codes of the weight, int16, in the weight's shape."""
        self.check_size()
        return unpack_codes(self.packed_weight, self.bits, self.weight_shape, signed=True)

    def quantized_weight(self) -> Tensor:
        """Decode `Q(w)` from the codes, in the layer's dtype."""
        self.check_size()
        weight = unpack_as_float(self.packed_weight, self.bits, self.weight_shape).mul_(self.weight_scale)
        if self.weight_offset is not None:
            weight = weight.add_(self.weight_offset)
        return weight.to(self.weight.dtype)  # not before: fake quantization computes in float32 too

    def _weight_to_compute_with(self) -> Tensor:
        """Return what [`quantized_weight`] does: the tensor of an earlier call if the layer keeps it and it holds."""
        if not self.keeps_decoded or torch.compiler.is_compiling():  # a compiler sees no values
            return self.quantized_weight()
        sources = (self.packed_weight, self.weight_scale, self.weight_offset, self.weight)
        tensors = [tensor for tensor in sources if tensor is not None]
        if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference() for tensor in tensors):
            return self.quantized_weight()  # nothing counts how often these are written to
        made_of = [(tensor, tensor._version, tensor.data_ptr(), tensor.dtype) for tensor in tensors]
        if self._decoded is None or not _same(self._decoded[0], made_of):
            with torch.inference_mode(False), torch.no_grad():  # so that any later call can use it
                self._decoded = made_of, self.quantized_weight()
        return self._decoded[1]

    def forward(self, x: Tensor) -> Tensor:
        if is_symbol(x):
            return call_in_graph(self, x)
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                f"{self.path}: packed weights cannot be trained. Load a checkpoint in float storage to train, or call "
                "`model.eval()` for inference."
            )
        return self._functional.compute(self.quantized_input(x), self._weight_to_compute_with(), self.bias)

    def keep_decoded(self, keep: bool = True) -> None:
        """Decode the weight at the next call alone and keep it in memory, or do so no more.

        It is decoded again when codes, scale, device or type have changed. It belongs to no state: `state_dict`,
        copies and files have the codes alone.
        """
        self.keeps_decoded, self._decoded = keep, None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the decoded weight out of copies and pickles, which decode their own."""
        return {**vars(self), "_decoded": None}

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module; refuses a weight that has elements, or dimensions, beside the codes."""
        if name == "weight" and param is not None and param.shape != (0,):
            raise ValueError(
                f"{self.path}: its weight is packed integers, which a weight of shape {tuple(param.shape)} cannot "
                "replace. To fuse a BatchNorm into a layer (fuse_conv_bn_eval), do so in the float model, then "
                "quantize and pack."
            )
        super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):
        """Move and convert like any module, but let `.to(torch.bfloat16)` and the like leave codes and grid alone."""
        self._decoded = None  # it may be on another device
        kept = list(self._buffers.values())
        keeping = without_narrowing(fn)
        return super()._apply(lambda t: keeping(t) if any(t is one for one in kept) else fn(t), recurse)

    def extra_repr(self) -> str:
        kind = type(self._functional).__name__.removeprefix("Quant")
        return f"{kind}, weight_shape={self.weight_shape}, bits={self.bits}"


def _same(before: list[tuple[Tensor, int, int, torch.dtype]], now: list[tuple[Tensor, int, int, torch.dtype]]) -> bool:
    """Tell whether two lists are of the same tensors, unchanged."""
    return len(before) == len(now) and all(
        old[0] is new[0] and old[1:] == new[1:] for old, new in zip(before, now, strict=True)
    )

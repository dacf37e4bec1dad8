"""Define what quantized layers have in common: two quantizers as submodules. Layers know nothing of sharpness."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer
from ..quantizers.range_state import has_no_values
from .float_form import FloatForm, take_over_hooks
from .recompute import in_autocast_type, operand_recomputed
from .shared_input import QuantizesInput
from .tracing import call_in_graph, is_symbol


class HoldsQuantizers(nn.Module):
    """Holds quantizers among its children, any of which may be `None`."""

    def own_quantizers(self) -> list[Quantizer]:
        return [child for child in self.children() if isinstance(child, Quantizer)]

    def leave_in_float(self) -> None:
        """Give up all quantizers of this module, for good."""
        for name, child in list(self.named_children()):
            if isinstance(child, Quantizer):
                setattr(self, name, None)


class QuantizedLayer(QuantizesInput, HoldsQuantizers, ABC):
    """Makes a layer train with fake-quantized weights and inputs: the mixin of all quantized layers.

    Attributes:
        weight (`nn.Parameter`): The latent float weight, the same Parameter object the float layer had.
        weight_quantizer: `None` keeps the weight in float.
        float_form: What the layer was before it was quantized.
    """

    channel_axis = 0
    """Dimension of `weight` that counts the output channels."""
    output_channel_axis = -1
    """The same of an output."""

    weight: Any  # nn.Parameter; the float type that a subclass mixes in declares it
    bias: Any
    weight_quantizer: Quantizer | None
    float_form: FloatForm
    _is_loading = False
    _came_first: frozenset[str] = frozenset()
    """Quantizers whose values were loaded without the weight, which then is in another part of the checkpoint."""
    _awaited: frozenset[str] = frozenset()
    """Quantizers whose values did not come with the weight; those that come later belong to it."""

    @classmethod
    def from_float(
        cls, layer: nn.Module, weight_quantizer: Quantizer | None, activation_quantizer: Quantizer | None
    ) -> QuantizedLayer:
        """Make a quantized layer that shares the parameters of the float `layer`."""
        with torch.device("meta"):  # the fresh weights are replaced at once
            new = cls(**cls.constructor_arguments(layer))
        new.weight = layer.weight
        new.register_parameter("bias", getattr(layer, "bias", None))  # embeddings and the like know none
        new.weight_quantizer = weight_quantizer
        new.activation_quantizer = activation_quantizer
        new.float_form = FloatForm.of(layer)
        take_over_hooks(new, layer)
        new.train(layer.training)
        return new

    @staticmethod
    @abstractmethod
    def constructor_arguments(layer: Any) -> dict[str, Any]:
        """List the arguments that rebuild a layer of the same shape as the float `layer`."""

    @abstractmethod
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute what the float layer does, with these operands in place of its own."""

    def forward(self, x: Tensor) -> Tensor:
        if is_symbol(x):
            return call_in_graph(self, x)
        if self._came_first:
            self._warn_of_another_weight()
        x_q, w_q = self.quantized_input(x), self.quantized_weight()
        operand = in_autocast_type(x_q)
        with operand_recomputed(x_q, operand):
            return self.compute(operand, w_q, self.bias)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As for any module; a weight of other values, as fusing a BatchNorm makes one, gets a scale of its own. Where
        none can be found, as for NaN, it raises `ValueError`, and the weight stays."""
        before = vars(self).get("_parameters", {}).get("weight") if name == "weight" else None
        if not self._is_loading and type(before) is type(param) is nn.Parameter:
            self._check_new_weight(before, param)
        super().register_parameter(name, param)
        quantizer = getattr(self, "weight_quantizer", None)
        if self._is_loading or not (type(before) is type(param) is nn.Parameter) or quantizer is None:
            return
        if has_no_values(before) or has_no_values(param) or not quantizer.initialized or torch.equal(before, param):
            return
        try:
            quantizer.initialize(param)
        except BaseException:
            super().register_parameter(name, before)  # the quantizer goes on with the one that it was fitted to
            raise
        warnings.warn(
            f"{quantizer.path}: the weight of this layer was replaced by another one, as fuse_conv_bn_eval does; the "
            "weight quantizer was fitted to it anew. Fuse before `quantize`, so that calibration and training see it.",
            stacklevel=4,
        )

    def _check_new_weight(self, before: nn.Parameter, new: nn.Parameter) -> None:
        """Raise `ValueError` if a quantizer that has been fitted to the weight `before` cannot go on with `new`."""
        quantizer = getattr(self, "weight_quantizer", None)
        if quantizer is None or has_no_values(before) or has_no_values(new) or not quantizer.initialized:
            return
        scales = quantizer.scale_shape
        fits = scales == (1,) or (
            len(scales) == new.ndim and all(n in (1, size) for n, size in zip(scales, new.shape, strict=True))
        )
        if fits and new.device == before.device:
            return
        raise ValueError(
            f"{quantizer.path.removesuffix('.weight_quantizer')}: its weight was to be replaced by one of shape "
            f"{tuple(new.shape)} on {new.device}; expected {tuple(before.shape)} on {before.device}, for which its "
            "quantizers were made. Move the whole layer (`layer.to(device)`); for another shape put a float layer in "
            "its place, or change the float model and quantize it anew."
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load as any module does, and reset quantizers if the weight arrives without their values.

        Such a weight is another one than they were made for. So the weight quantizer is fitted to it, and the
        activations wait for `calibrate` again.
        """
        self._is_loading = True  # with `assign=True` the weight is replaced, and its scale still to arrive
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            self._is_loading = False
        for child, quantizer in self.named_children():
            if not isinstance(quantizer, Quantizer):
                continue
            has_values = any(f"{prefix}{child}.{name}" in state_dict for name, _ in quantizer.named_parameters())
            if f"{prefix}weight" not in state_dict:
                self._came_first |= {child} - self._awaited if has_values else set()
            elif child in self._came_first:
                self._came_first -= {child}
            elif has_values:
                self._awaited -= {child}
            else:
                self._awaited |= {child}
                quantizer.reset()
                if quantizer is self.weight_quantizer:
                    self._fit_weight_quantizer()

    def _warn_of_another_weight(self) -> None:
        self._came_first = frozenset()
        path = next((quantizer.path for quantizer in self.own_quantizers()), "").rpartition(".")[0]
        warnings.warn(
            f"{path}: the values of its quantizers were loaded and its weight was not. If that is a new one, as in a "
            f'head for other classes, leave out what begins with "{path}." altogether, or give it scales of its own: '
            "`layer.weight_quantizer.initialize(layer.weight)`, then `calibrate`.",
            stacklevel=4,
        )

    def reset_parameters(self) -> None:
        """Draw new weights as the float layer does; activations then wait for `calibrate` again."""
        if "float_form" not in vars(self):  # in the constructor
            super().reset_parameters()  # type: ignore[misc]
        elif hasattr(self.float_form.kind, "reset_parameters"):
            self.float_form.kind.reset_parameters(self)
            for quantizer in self.own_quantizers():
                quantizer.reset()
                if quantizer is self.weight_quantizer:
                    self._fit_weight_quantizer()

    def _fit_weight_quantizer(self) -> None:
        """Fit it to the whole weight; to shards of one nothing is fitted, and it raises when it is used."""
        if type(self.weight) is nn.Parameter and not self.weight.is_meta:
            self.weight_quantizer.initialize(self.weight)  # type: ignore[union-attr]

    def quantized_weight(self) -> Tensor:
        """Compute `Q(w)`, same shape as `weight`."""
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)

    def codes(self) -> Tensor:
        """Compute the integer codes of the weight, int16, in its shape.

        Raises:
            ValueError: If the weight has NaN, which no code stands for, or infinite values that leave it no grid.
        """
        quantizer = self.weight_quantizer
        assert quantizer is not None
        has_nan = bool(torch.isnan(self.weight).any())
        if has_nan or not all(torch.isfinite(part).all() for part in quantizer.grid(self.weight)):
            found = "NaN," if has_nan else "infinite values, which leave its quantizer no grid, and"
            raise ValueError(
                f"{quantizer.path.removesuffix('.weight_quantizer')}: its weight has {found} which no integer stands "
                "for, so that what is made of it would be another model. If training diverged, go back to an earlier "
                "checkpoint."
            )
        return quantizer.quantize(self.weight)

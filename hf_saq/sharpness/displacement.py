"""Hold `eps` for a whole model, put it in place and take it back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer
from . import sharding


@dataclass(frozen=True, eq=False)
class Displacement:
    """Holds the tensors that are added to a model while it trains at a perturbed point. An empty one adds nothing.

    Attributes:
        outputs: Quantizer -> tensor that is added to its output `Q(w)`, in the shape of `w`.
        in_place: Parameter -> tensor that is added to it, in its shape.
    """

    outputs: dict[Quantizer, Tensor] = field(default_factory=dict)
    in_place: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.outputs or self.in_place)

    def without_frozen(self) -> Displacement:
        """Leave out parameters that have been frozen since; quantizers of frozen weights have no hook that adds."""
        return Displacement(self.outputs, {p: eps for p, eps in self.in_place.items() if p.requires_grad})

    @contextmanager
    def shifted(self) -> Iterator[None]:
        """Add `in_place` inside the block; afterwards put the parameters back bit for bit, from copies."""
        if not self.in_place:
            yield
            return
        with torch.no_grad():
            parameters = [sharding.local(p) for p in self.in_place]
            saved = [p.clone() for p in parameters]
            torch._foreach_add_(parameters, [sharding.local(eps) for eps in self.in_place.values()])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([sharding.local(p) for p in self.in_place], saved)

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of this process by the names of quantizers and parameters in `model`, to be stored.

        Those of what is no part of `model` any more, such as a replaced head, are left out: they move nothing.
        """
        modules = {module: name for name, module in model.named_modules()}
        parameters = {p: name for name, p in model.named_parameters()}
        outputs = {modules[quantizer]: eps for quantizer, eps in self.outputs.items() if quantizer in modules}
        return outputs | {parameters[p]: sharding.local(eps) for p, eps in self.in_place.items() if p in parameters}

    @classmethod
    def from_named(cls, tensors: Mapping[str, Tensor], model: nn.Module) -> Displacement:
        """Rebuild the displacement from what [`named`] returned, on the devices of `model`.

        Raises:
            ValueError: If a name belongs to no quantizer and no parameter of `model`.
        """
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        outputs: dict[Quantizer, Tensor] = {}
        in_place: dict[nn.Parameter, Tensor] = {}
        for name, tensor in tensors.items():
            module, parameter = modules.get(name), parameters.get(name)
            if isinstance(module, Quantizer):
                outputs[module] = tensor.to(module.range_state.device)
            elif parameter is not None:
                in_place[parameter] = sharding.with_local(parameter, tensor)
            else:
                raise ValueError(
                    f"{name}: a stored perturbation is for this tensor, but {type(model).__name__} has no quantizer "
                    "and no parameter of that name. Resume with the model and the configuration of the checkpoint."
                )
        return cls(outputs, in_place)

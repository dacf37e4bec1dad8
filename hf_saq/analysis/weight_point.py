"""Stand at the quantized weights of a model: gradients, products with the Hessian, and losses beside that point.

The point is `Q(w)`, what the weight quantizers return, together with the other tensors in scope. Derivatives are those
with respect to the OUTPUT of the quantizers; latent weights and their clip masks play no part. Activation quantizers
stay in the function, rounding passed straight through, which is the function that training descends.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..layers import PackedLayer
from ..quantizers import Quantizer, in_double
from ..sharpness import Displacement, PerturbedTensors, QuantizedWeight, kinds_of_parameters
from ..sharpness.perturbed_tensors import as_kinds
from ..sharpness.sharding import is_sharded
from ..sharpness.three_cases import Climb, climb, place
from .batch_losses import LabelledBatches

Vector = list[Tensor]
"""One tensor for each of the keys of a [`WeightPoint`], in their order and shapes."""


class WeightPoint:
    """Stands at the quantized weights of a model that is in evaluation mode.

    Args:
        where: Name of the function that asks, for messages.
        perturb: Kinds of tensors that belong to the point, as `SharpnessAwareMinimizer` takes them. In a model without
            weight quantizers `weight` means its float weights.
        only: Names of parameters. Of these tensors those with such a name belong to the point, in this order.

    Attributes:
        keys: The tensors of the point: quantized weights, then parameters.
        names: The names of their parameters in the model.

    Raises:
        ValueError: If `perturb` selects no trainable tensor, or the model is packed or sharded.
    """

    def __init__(
        self, where: str, model: nn.Module, perturb: str | Collection[str], only: Sequence[str] | None = None
    ):
        if any(isinstance(module, PackedLayer) for module in model.modules()):
            raise ValueError(
                f"{where}: {type(model).__name__} is packed, and integers have no gradient; expected a trainable "
                "model. Pass `hf_saq.unpack(model)`."
            )
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise ValueError(
                f"{where}: {type(model).__name__} is sharded (FSDP2 or tensor parallelism); expected whole "
                "parameters. Save it, load it on one process, and analyse that."
            )
        quantized = any(isinstance(m, Quantizer) and m.role == "weight" for m in model.modules())
        perturb = as_kinds(perturb)
        float_weights = () if quantized or "weight" not in perturb else ("other",)
        self.model = model
        self.tensors = PerturbedTensors(model, {*perturb, *float_weights}, only)
        self.keys: list[QuantizedWeight | nn.Parameter] = [*self.tensors.weights, *self.tensors.in_place]
        called = {parameter: name for name, parameter in model.named_parameters()}
        if only is not None:
            self.keys.sort(key=lambda key: only.index(called[_parameter(key)]))
        self.names = [called[_parameter(key)] for key in self.keys]
        if not self.keys:
            raise ValueError(
                f"{where}: perturb={list(perturb)} selects no trainable tensor of {type(model).__name__}. Add kinds "
                "to `perturb`, or set requires_grad of the parameters that are meant."
            )

    def values(self) -> Vector:
        """Return copies of the tensors of the point, detached; of quantized weights `Q(w)`."""
        with torch.no_grad():
            return [k.quantizer(k.weight).clone() if isinstance(k, QuantizedWeight) else k.clone() for k in self.keys]

    def zeros(self) -> Vector:
        return [torch.zeros_like(_parameter(key)) for key in self.keys]

    def displacement(self, vector: Vector) -> Displacement:
        """Say where each part of `vector` is added: behind a quantizer, or to the parameter."""
        return place(dict(zip(self.keys, vector, strict=True)), self.tensors, case=3)

    def climb(self, gradient: Vector, rho: float, adaptive: bool = False, eta: float = 0.01) -> Displacement:
        """Return the step of length `rho` along `gradient`, which is kept; an empty one if that is zero."""
        copies = {key: part.clone() for key, part in zip(self.keys, gradient, strict=True)}
        return climb(copies, self.tensors, Climb(rho, 3, adaptive, eta))[0]

    def gradient(self, data: LabelledBatches, number: int) -> tuple[float, Vector]:
        """Compute the loss of one batch and its gradient."""
        with torch.enable_grad(), self._leaves() as leaves:
            loss = data.loss(self.model, number)
            return loss.item(), _gradients(loss, leaves)

    def hessian_products(self, data: LabelledBatches, vectors: Sequence[Vector]) -> Iterator[list[Vector]]:
        """Yield, for each batch, the products of the Hessian of its loss with every one of `vectors`.

        Each batch costs one forward pass, one backward pass with a graph for all vectors, and one backward pass
        through both of them for each vector.
        """
        for number in range(len(data)):
            # The fused kernels of attention have no second derivative.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), self._leaves() as leaves:
                gradient = _gradients(data.loss(self.model, number), leaves, create=True)
                products = []
                for vector in vectors:
                    along = [(g * v).sum() for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
                    # A loss that is linear in all of them has a gradient without a graph.
                    products.append(_gradients(torch.stack(along).sum(), leaves, keep=True) if along else self.zeros())
                yield [[part.detach() for part in product] for product in products]

    def hessian_product(self, data: LabelledBatches, vector: Vector) -> Vector:
        """Compute the product of the Hessian of the mean loss over all examples with `vector`."""
        total = self.zeros()
        for weight, (product,) in zip(data.weights, self.hessian_products(data, [vector]), strict=True):
            torch._foreach_add_(total, product, alpha=weight)
        return total

    def losses(self, data: LabelledBatches, displacement: Displacement) -> list[float]:
        """Compute the loss of every batch at the point moved by `displacement`, without gradients."""
        with self.moved(displacement):
            return data.each_loss(self.model)

    def loss(self, data: LabelledBatches, number: int, displacement: Displacement) -> float:
        """Compute the loss of one batch at the point moved by `displacement`, without gradients."""
        with torch.no_grad(), self.moved(displacement):
            return data.loss(self.model, number).item()

    @contextmanager
    def moved(self, displacement: Displacement) -> Iterator[None]:
        """Add `displacement` inside the block; afterwards everything is back bit for bit."""
        with displacement.shifted(), _added(displacement.outputs):
            yield

    @contextmanager
    def _leaves(self) -> Iterator[Vector]:
        """Put a zero leaf behind every weight quantizer; yield what gradients are asked of, in the order of `keys`."""
        leaves = {e.quantizer: torch.zeros_like(e.weight).requires_grad_() for e in self.tensors.weights}
        with _added(leaves):
            yield [leaves[k.quantizer] if isinstance(k, QuantizedWeight) else k for k in self.keys]


@contextmanager
def _added(tensors: dict[Quantizer, Tensor]) -> Iterator[None]:
    """Let quantizers return their output, cut off from the latent weight, plus these tensors."""

    def add(quantizer: nn.Module, args: tuple, w_q: Tensor) -> Tensor:  # noqa: ARG001 (a forward hook)
        return w_q.detach() + tensors[quantizer].to(w_q.dtype)  # type: ignore[index]

    handles = [quantizer.register_forward_hook(add) for quantizer in tensors]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gradients(value: Tensor, leaves: Vector, create: bool = False, keep: bool = False) -> Vector:
    keep = keep or create
    found = torch.autograd.grad(value, leaves, allow_unused=True, create_graph=create, retain_graph=keep)
    return [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(found, leaves, strict=True)]


def shapes_of_parameters(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of all parameters by name, without the values of quantizers."""
    kinds = kinds_of_parameters(model)
    return {name: parameter.shape for name, parameter in model.named_parameters() if kinds[parameter] != "scale"}


def _parameter(key: QuantizedWeight | nn.Parameter) -> nn.Parameter:
    return key.weight if isinstance(key, QuantizedWeight) else key


def dot(a: Vector, b: Vector) -> float:
    """Compute the inner product, in float64."""
    return sum((in_double(x) * in_double(y)).sum() for x, y in zip(a, b, strict=True)).item()  # type: ignore[union-attr]


def norm(a: Vector) -> float:
    return dot(a, a) ** 0.5

"""The sharpness-aware step on quantized networks: SAQ, arXiv:2111.12273.

With `Q` the quantizer, `w` the latent weight, `w_q = Q(w)`, `L` the loss, `g_w = dL/dw` (straight-through),
`g_q = dL/dw_q`, and `norm` one global L2 norm over everything that is perturbed:

    case 1   min L(Q(w) + eps)   eps = rho * g_w / norm   (g_w is masked by clipping: not steepest ascent at Q(w))
    case 2   min L(Q(w + eps))   eps = rho * g_w / norm   (rounding swallows a small eps; SAM on a quantized model)
    case 3   min L(Q(w) + eps)   eps = rho * g_q / norm   (SAQ)

The gradient at the perturbed point is what the optimizer applies to `w`. Adaptive (ASAM, arXiv:2102.11600), with
`T = |p| + eta` elementwise (1 for biases): `eps = rho * T^2 g / ||T g||`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from . import sharding
from .norm_statistics import frozen_norm_statistics
from .quantizers import Quantizer
from .rng import RNGState
from .scope import QuantizedWeight, in_place_parameters, quantized_weights

Case = Literal[1, 2, 3]


class _CatchGradient(torch.autograd.Function):
    """`w_q + eps` for `eps = 0`, without the addition: the backward hands the gradient to both."""

    @staticmethod
    def forward(ctx, w_q: Tensor, eps: Tensor) -> Tensor:  # noqa: ARG004 (autograd's signature)
        return w_q.view_as(w_q)

    @staticmethod
    def backward(ctx, grad: Tensor):  # noqa: ARG004
        return grad, grad


class SharpnessAwareMinimizer:
    """Adds the second pass of SAQ to any training loop; the optimizer stays what it is.

    ```python
    minimizer = SharpnessAwareMinimizer(model, rho=0.05, case=3)

    with minimizer.ascent():          # first pass: gradients at w_q, on the way to eps
        loss_of(batch).backward()
    with minimizer.perturbed():       # second pass: gradients at w_q + eps
        loss_of(batch).backward()
    optimizer.step()
    ```

    `ascent` sets gradients of earlier micro-batches aside and skips gradients that are not needed. Without gradient
    accumulation and on one process it may be left out: a plain `backward()` then serves as the first pass.

    A layer is reached through a hook on its weight quantizer's output, where a zero leaf `eps` is added: after the
    first backward `eps.grad` is `g_q`, and scaled in place that same memory is the `eps` of the second pass: one
    buffer of the size of the quantized weights. It exists on each process and is not part of any state dict.

    Under FSDP2 (`fully_shard`, before or after this is built) that buffer is whole on each process, not sharded. What
    is perturbed in place is sharded, so all processes share one `eps` for it, made of the average gradient. `no_sync`
    has no effect inside the two contexts: each backward reduces its gradients.

    Args:
        model: A model with quantized layers, not wrapped by DDP or the like.
        rho: Radius of the perturbation, >= 0.
        case: 1, 2 or 3, see above.
        adaptive: ASAM's scaling by the size of each weight.
        eta: Added to that size.
        perturb: Kinds of tensors to perturb, of `weight` (quantized), `bias`, `norm` (affine parameters of
            normalization layers), `scale` (of quantizers) and `other` (embeddings, unquantized weights).
        sync: `"local"`: each process perturbs with its own gradient (m-sharpness, no communication). `"global"`:
            gradients are averaged over all processes before the perturbation is made. Under FSDP2 `"local"` is for
            case 3: own `g_q` and norm for quantized weights, average gradient and root mean square of these norms
            for what is perturbed in place.

    Attributes:
        armed (`bool`): Whether a training forward outside of both contexts may serve as a first pass. Set it to
            `False` for steps that will not be perturbed, to save the gradient buffer.
        ascent_norm (`float`): `norm` of the last perturbation.
        skipped (`int`): How often `norm` was zero or not finite, so that `eps` was 0 (plain training on that step).

    Raises:
        ValueError: If an argument is out of range or `perturb` selects no tensor of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        rho: float,
        case: Case = 3,
        adaptive: bool = False,
        eta: float = 0.01,
        perturb: Collection[str] = ("weight", "bias", "norm"),
        sync: Literal["local", "global"] = "local",
    ):
        if not 0 <= rho < float("inf"):
            raise ValueError(f"rho={rho}; expected a finite number >= 0.")
        if case not in (1, 2, 3):
            raise ValueError(f"case={case}; expected 1, 2 or 3. For plain training use no minimizer.")
        self.model = model
        self.rho, self.case, self.adaptive, self.eta, self.sync = rho, case, adaptive, eta, sync
        self._perturb = tuple(perturb)
        self._find_parameters()
        if not self._weights and not any(p.requires_grad for p in self._others):
            raise ValueError(
                f"perturb={list(perturb)} selects no trainable tensor of {type(model).__name__}. Quantize the model "
                'first, or add "other" to perturb weights that are not quantized.'
            )
        self._leaf: dict[Quantizer, Tensor] = {}  # collects g_q in its .grad during a first pass
        self._eps: dict[Quantizer, Tensor] = {}  # added to w_q in a second pass
        self._shift: dict[nn.Parameter, Tensor] = {}  # added to parameters in a second pass
        self._grads: dict[nn.Parameter, Tensor] | None = None  # what `ascent` collected from parameters
        self._rng: list[RNGState] = []  # one per first pass, oldest first
        self._climbed = False  # whether the gradients of the first pass have been turned into eps
        self._found_grads = False  # whether gradients lay there when a first pass outside of `ascent` began
        self._phase: Literal["idle", "ascent", "perturbed"] = "idle"
        self.armed = True
        self.ascent_norm = 0.0
        self.skipped = 0
        self._handles = [quantizer.register_forward_hook(self._hook) for quantizer in self._by_quantizer]
        self._handles.append(model.register_forward_pre_hook(self._before_forward))

    def _find_parameters(self) -> None:
        """Look up what is perturbed; done again when parameters were replaced, as `fully_shard` does."""
        sharding.check_parallelism(self.model, self.case, self.sync)
        self._parameters = list(self.model.parameters())
        self._weights = quantized_weights(self.model) if "weight" in self._perturb else []
        others = in_place_parameters(self.model, self._perturb)
        self._others = [p for _, p in others]
        self._unscaled = {p for name, p in others if name.endswith("bias")}
        self._by_quantizer = {entry.quantizer: entry for entry in self._weights}
        self._by_weight = {entry.weight: entry for entry in self._weights}

    def __deepcopy__(self, memo: dict) -> SharpnessAwareMinimizer:
        return self  # copying a model copies its hooks; they must not drag a second minimizer along

    def detach(self) -> None:
        """Remove the hooks; the model is as if the minimizer had never been there."""
        for handle in self._handles:
            handle.remove()
        self.reset()

    def reset(self) -> None:
        """Forget a perturbation that is under way, for example after a step was abandoned."""
        self._leaf, self._eps, self._shift = {}, {}, {}
        self._grads = None
        self._rng = []
        self._climbed = self._found_grads = False

    # The seam ----------------------------------------------------------------------------------------------------

    def _hook(self, quantizer: nn.Module, args: tuple, w_q: Tensor) -> Tensor | None:  # noqa: ARG002
        assert isinstance(quantizer, Quantizer)
        if self._phase == "perturbed":
            eps = self._eps.get(quantizer)
            return None if eps is None else w_q + eps.to(w_q.dtype)  # FSDP2 may hand out weights in half precision
        leaf = self._leaf.get(quantizer)
        if leaf is None or not self._is_first_pass():
            return None
        # Inside `ascent` the weight's own gradient is not wanted, so autograd need not compute it.
        return _CatchGradient.apply(w_q.detach() if self._phase == "ascent" else w_q, leaf)

    def _place_leaves(self) -> None:
        """A zero leaf behind every quantizer: made before the forward, so that compiled code finds it ready."""
        for entry in self._weights if self.case == 3 else []:
            # Expanded from one element: a zero of the weight's shape that takes no memory. Its gradient does.
            zero = torch.zeros((), dtype=entry.weight.dtype, device=entry.weight.device)
            self._leaf.setdefault(entry.quantizer, zero.expand(entry.weight.shape).requires_grad_())

    def _is_first_pass(self) -> bool:
        return self._phase == "ascent" or (self.armed and self.model.training)

    def _before_forward(self, module: nn.Module, args: tuple) -> None:  # noqa: ARG002
        """Note where the random generators stand when a first pass outside of `ascent` begins."""
        if module is not self.model:
            return  # a copy of the model, which has copies of the hooks
        if self._phase != "idle":
            sharding.reduce_gradients(self.model)
        if self._phase != "idle" or not self._is_first_pass() or not torch.is_grad_enabled():
            return
        finished = not self._rng or any(leaf.grad is not None for leaf in self._leaf.values())
        if finished:  # otherwise this is another forward of the same pass
            self.reset()
            self._rng = [RNGState()]
            self._place_leaves()
            self._found_grads = any(p.grad is not None and bool(p.grad.any()) for p in self.model.parameters())

    # First pass --------------------------------------------------------------------------------------------------

    @contextmanager
    def ascent(self) -> Iterator[None]:
        """The first pass: gradients go to the perturbation and leave `p.grad` as it was.

        Under DDP enter `accelerator.no_sync(model)` as well: this backward is not to be communicated.
        May be entered several times before `perturbed`: the gradients add up to one perturbation, and `perturbed`
        is then entered as often, in the same order.
        """
        sharding.reshard(self.model)
        sharding.check_gradients_are_reduced(self.model)
        parameters = list(self.model.parameters())
        if self._grads is None:
            self.reset()
            if [*map(id, parameters)] != [*map(id, self._parameters)]:
                self._find_parameters()
            self._grads = {}
            self._place_leaves()
        earlier = {p: p.grad for p in parameters}
        for p in earlier:
            p.grad = None
        self._rng.append(RNGState())
        self._phase = "ascent"
        completed = False
        try:
            yield
            for p in self._first_pass_parameters():
                if p.grad is not None:
                    collected = self._grads.get(p)
                    self._grads[p] = p.grad if collected is None else collected.add_(p.grad)
            completed = True
        finally:
            self._phase = "idle"
            for p, grad in earlier.items():
                p.grad = grad
            if not completed:
                self.reset()

    def _first_pass_parameters(self) -> list[nn.Parameter]:
        """Parameters whose own first-pass gradient enters `eps`."""
        latent = [] if self.case == 3 else list(self._by_weight)
        return [*latent, *self._others]

    # From gradients to eps -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _climb(self) -> None:
        """Turn the gradients of the first pass into `eps`, in their own memory."""
        if self._grads is None:
            self._take_ordinary_gradients()
        grads: dict[QuantizedWeight | nn.Parameter, Tensor] = {p: g for p, g in (self._grads or {}).items()}
        for quantizer, leaf in self._leaf.items():
            if leaf.grad is not None:
                grads[self._by_quantizer[quantizer]] = leaf.grad
        if self.sync == "global":
            sharding.average_over_processes([g for g in grads.values() if not sharding.is_sharded(g)])
        if self.case == 1:  # added at the quantizers' outputs, which are whole
            grads = {key: sharding.full(g) if key in self._by_weight else g for key, g in grads.items()}
        self._grads, self._leaf, self._climbed = None, {}, True
        sizes = {key: self._size(key) for key in grads} if self.adaptive else {}
        for key, t in sizes.items():
            if t is not None:
                grads[key].mul_(t)  # T g
        plain = [g for g in grads.values() if not sharding.is_sharded(g)]
        sharded = [g for g in grads.values() if sharding.is_sharded(g)]
        self.ascent_norm, shared_norm = sharding.global_norms(plain, sharded)
        if not (0 < self.ascent_norm < float("inf") and 0 < shared_norm < float("inf")):
            self.skipped += 1
            return
        for tensors, norm in ((plain, self.ascent_norm), (sharded, shared_norm)):
            if tensors:
                torch._foreach_mul_(tensors, self.rho / norm)
        for key, t in sizes.items():
            if t is not None:
                grads[key].mul_(t)  # T^2 g
        for key, eps in grads.items():
            if isinstance(key, QuantizedWeight):
                self._eps[key.quantizer] = eps
            elif self.case == 1 and key in self._by_weight:
                # Made from the latent gradient, but added behind every quantizer that reads this weight.
                self._eps.update({e.quantizer: eps for e in self._weights if e.weight is key})
            else:
                self._shift[key] = eps

    def _take_ordinary_gradients(self) -> None:
        sharding.reshard(self.model)
        if any(sharding.is_sharded(p) for p in self.model.parameters()):
            raise RuntimeError("Under FSDP2, run the first pass in `with minimizer.ascent():`.")
        if self._found_grads:
            raise RuntimeError(
                "perturbed() after a plain backward found gradients that were there before it, as gradient "
                "accumulation leaves them. Run the first pass in `with minimizer.ascent():`, which sets them aside, "
                "or call `optimizer.zero_grad()` first."
            )
        self._grads = {p: p.grad for p in self._first_pass_parameters() if p.grad is not None}
        for p in self.model.parameters():
            p.grad = None

    def _size(self, key: QuantizedWeight | nn.Parameter) -> Tensor | None:
        """ASAM's `T = |p| + eta`, of the quantized weight where `eps` is added to that; `None` stands for 1."""
        if key in self._unscaled:
            return None
        if not isinstance(key, QuantizedWeight) and (self.case == 2 or key not in self._by_weight):
            return key.abs().add_(self.eta)
        entry = key if isinstance(key, QuantizedWeight) else self._by_weight[key]
        return sharding.quantized(entry).abs_().add_(self.eta)

    # Second pass -------------------------------------------------------------------------------------------------

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """The second pass: `eps` is in place, normalization statistics are frozen, random numbers are those of the
        first pass. On the way out, also by an exception, everything is back, bit for bit, from saved copies."""
        if not self._rng:
            raise RuntimeError(
                "perturbed() without a first pass: run forward and backward in training mode before it, either in "
                "`with minimizer.ascent():` or with `minimizer.armed = True`."
            )
        sharding.reshard(self.model)
        if not self._climbed:
            self._climb()
        saved = {p: p.detach().clone() for p in self._shift}
        after = RNGState()
        self._rng.pop(0).restore()
        torch.clear_autocast_cache()  # it may hold low-precision copies of the unperturbed parameters
        self._phase = "perturbed"
        completed = False
        try:
            with torch.no_grad():
                for p, shift in self._shift.items():
                    p.add_(shift)
            with frozen_norm_statistics(self.model):
                yield
            completed = True
        finally:
            self._phase = "idle"
            sharding.reshard(self.model)
            with torch.no_grad():
                for p, value in saved.items():
                    p.copy_(value)
            if not completed:
                after.restore()
            if not completed or not self._rng:
                self.reset()

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
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer
from . import sharding
from .displacement import Displacement
from .kept_weights import KeptWeights
from .norm_statistics import frozen_norm_statistics
from .parameter_gradients import recorded_gradients, without_gradients
from .perturbed_tensors import QuantizedWeight, in_place_parameters, kinds_of_parameters, quantized_weights
from .random_state import RNGState

Case = Literal[1, 2, 3]


class _CatchGradient(torch.autograd.Function):
    """`w_q + eps` for `eps = 0`, without the addition: the backward hands the gradient to both."""

    @staticmethod
    def forward(ctx, w_q: Tensor, eps: Tensor) -> Tensor:  # noqa: ARG004 (autograd's signature)
        return w_q.view_as(w_q)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad if ctx.needs_input_grad[0] else None, grad


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
    accumulation and on one process it may be left out: a plain `backward()` then serves as the first pass. Steps of
    one pass are made of [`displaced`], [`recorded`] and [`climb`]; [`ScheduledStep`] does so.

    A layer is reached through a hook on its weight quantizer's output, where a zero leaf `eps` is added: after the
    first backward `eps.grad` is `g_q`, and scaled in place that same memory is the `eps` of the second pass: one
    buffer of the size of the quantized weights. It exists on each process and is not part of any state dict. (In cases
    1 and 2 that buffer is the gradient of the latent weights, and case 2 saves a copy of them while they are moved.)
    With LSQ and LSQ+ in case 3, the `w_q` of the first pass live on until the second has begun, which need not then
    quantize weights again; at that time there are no activations and no gradients, and the peak stays where it was.

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
        self._grads: dict[nn.Parameter, Tensor] | None = None  # what a first pass collected from parameters
        self._kept = KeptWeights()  # what a first pass quantized
        self._rng: list[RNGState] = []  # one per first pass, oldest first
        self._eps: Displacement | None = None  # what the first passes were turned into
        self._found_grads = False  # whether gradients lay there when a first pass outside of `ascent` began
        self._phase: Literal["idle", "ascent", "recorded", "displaced"] = "idle"
        self._added: Displacement | None = None  # while `displaced`
        self._given: set[Quantizer] = set()  # whose next output has `eps` in it already
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
        # Gradients that a first pass can save: of scales, embeddings, and latent weights in case 3. Those of biases
        # and norms cost next to nothing, and with them the graph begins as early as in a plain pass: reentrant
        # checkpointing drops the gradients of a block none of whose inputs requires one.
        self._costly = [p for p, kind in kinds_of_parameters(self.model).items() if kind not in ("bias", "norm")]

    def __deepcopy__(self, memo: dict) -> SharpnessAwareMinimizer:
        return self  # copying a model copies its hooks; they must not drag a second minimizer along

    def detach(self) -> None:
        """Remove the hooks; the model is as if the minimizer had never been there."""
        for handle in self._handles:
            handle.remove()
        self.reset()

    def reset(self) -> None:
        """Forget a perturbation that is under way, for example after a step was abandoned."""
        self._leaf, self._grads, self._rng, self._eps = {}, None, [], None
        self._found_grads = False
        self._kept.clear()

    # The seam ----------------------------------------------------------------------------------------------------

    def _hook(self, quantizer: nn.Module, args: tuple, w_q: Tensor) -> Tensor:
        assert isinstance(quantizer, Quantizer)
        eps = None if self._added is None else self._added.outputs.get(quantizer)
        if quantizer in self._given and quantizer.given_output is None:
            self._given.remove(quantizer)
        elif eps is not None:
            w_q = w_q + eps.to(w_q.dtype)  # FSDP2 may hand out weights in half precision
        leaf = self._leaf.get(quantizer)
        if leaf is not None and self._is_first_pass():
            if self._phase != "recorded" and not torch.compiler.is_compiling():
                self._kept.keep(self._by_quantizer[quantizer], args[0], w_q)
            # Inside `ascent` gradients behind `w_q` are not wanted, so autograd need not compute them.
            unwanted = self._phase == "ascent" and "scale" not in self._perturb
            w_q = _CatchGradient.apply(w_q.detach() if unwanted else w_q, leaf)
        return w_q

    def _place_leaves(self) -> None:
        """A zero leaf behind every quantizer: made before the forward, so that compiled code finds it ready."""
        for entry in self._weights if self.case == 3 else []:
            # Expanded from one element: a zero of the weight's shape that takes no memory. Its gradient does.
            zero = torch.zeros((), dtype=entry.weight.dtype, device=entry.weight.device)
            self._leaf.setdefault(entry.quantizer, zero.expand(entry.weight.shape).requires_grad_())

    def _is_first_pass(self) -> bool:
        if self._phase == "idle":
            return self.armed and self.model.training
        return self._phase in ("ascent", "recorded")

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
    def ascent(self, clean: dict[nn.Parameter, Tensor] | None = None) -> Iterator[None]:
        """The first pass: gradients go to the perturbation and leave `p.grad` as it was.

        Under DDP enter `accelerator.no_sync(model)` as well: this backward is not to be communicated.
        May be entered several times before `perturbed`: the gradients add up to one perturbation, and `perturbed`
        is then entered as often, in the same order.

        Args:
            clean: If given, the gradients of all that is perturbed, of latent weights too, are added up here as well.
        """
        sharding.reshard(self.model)
        sharding.check_gradients_are_reduced(self.model)
        grads = self._begin_first_pass()
        earlier = {p: p.grad for p in self._parameters}
        for p in earlier:
            p.grad = None
        wanted = {*self._first_pass_parameters(), *(self._by_weight if clean is not None else ())}
        self._phase = "ascent" if clean is None else "recorded"
        completed = False
        try:
            with without_gradients(self._costly, but=wanted):
                yield
            for p in self._first_pass_parameters():
                if p.grad is not None:
                    grads[p] = p.grad if p not in grads else grads[p].add_(p.grad)
            if clean is not None:
                for p in [*self._by_weight, *self._others]:
                    if p.grad is not None:
                        own = p.grad.clone() if grads.get(p) is p.grad else p.grad  # `grads` become eps, in place
                        clean[p] = own if p not in clean else clean[p].add_(own)
            completed = True
        finally:
            self._phase = "idle"
            for p, grad in earlier.items():
                p.grad = grad
            if not completed:
                self.reset()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A first pass that is an ordinary one too: gradients add up in `p.grad`, communicated as ever, and those of
        this process alone go to the perturbation. May be entered inside of [`displaced`].

        Raises:
            ValueError: Under FSDP2.
        """
        sharding.check_whole(self.model, "A step that uses and records the same gradients")
        grads = self._begin_first_pass()
        outer, self._phase = self._phase, "recorded"
        completed = False
        try:
            with recorded_gradients(self._first_pass_parameters(), grads):
                yield
            completed = True
        finally:
            self._phase = outer
            if not completed:
                self.reset()

    def _begin_first_pass(self) -> dict[nn.Parameter, Tensor]:
        """Returns where the gradients of parameters are to go."""
        if self._grads is None:
            self.reset()
            if [*map(id, self.model.parameters())] != [*map(id, self._parameters)]:
                self._find_parameters()
            self._place_leaves()
            self._grads = {}
        self._rng.append(RNGState())
        return self._grads

    def _first_pass_parameters(self) -> list[nn.Parameter]:
        """Parameters whose own first-pass gradient enters `eps`."""
        latent = [] if self.case == 3 else list(self._by_weight)
        return [*latent, *self._others]

    # From gradients to eps -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def climb(self) -> Displacement:
        """Turn the gradients of the first passes into `eps`, in their own memory."""
        if self._grads is None:
            self._take_ordinary_gradients()
        found = self._grads or {}
        grads: dict[QuantizedWeight | nn.Parameter, Tensor] = {
            p: found[p]
            for p in self._first_pass_parameters()
            if p in found  # in one order on all processes
        }
        for quantizer, leaf in self._leaf.items():
            if leaf.grad is not None:
                grads[self._by_quantizer[quantizer]] = leaf.grad
        self._grads, self._leaf = None, {}
        if self.sync == "global":
            sharding.average_over_processes([g for g in grads.values() if not sharding.is_sharded(g)])
        if self.case == 1:  # added at the quantizers' outputs, which are whole
            grads = {key: sharding.full(g) if key in self._by_weight else g for key, g in grads.items()}
        if self.adaptive:
            self._scale_by_size(grads)  # T g
        plain = [g for g in grads.values() if not sharding.is_sharded(g)]
        sharded = [g for g in grads.values() if sharding.is_sharded(g)]
        self.ascent_norm, shared_norm = sharding.global_norms(plain, sharded)
        if not (0 < self.ascent_norm < float("inf") and 0 < shared_norm < float("inf")):
            self.skipped += 1
            return Displacement()
        for tensors, norm in ((plain, self.ascent_norm), (sharded, shared_norm)):
            if tensors:
                torch._foreach_mul_(tensors, self.rho / norm)
        if self.adaptive:
            self._scale_by_size(grads)  # T^2 g
        eps = Displacement()
        for key, value in grads.items():
            if isinstance(key, QuantizedWeight):
                eps.outputs[key.quantizer] = value
            elif self.case == 1 and key in self._by_weight:
                # Made from the latent gradient, but added behind every quantizer that reads this weight.
                eps.outputs.update({e.quantizer: value for e in self._weights if e.weight is key})
            else:
                eps.in_place[key] = value
        return eps

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

    def _scale_by_size(self, grads: dict[QuantizedWeight | nn.Parameter, Tensor]) -> None:
        """Multiply by ASAM's `T = |p| + eta`, of the quantized weight where `eps` is added to that; one at a time,
        since together they would be as large as all weights."""
        for key, grad in grads.items():
            if key in self._unscaled:
                continue
            if not isinstance(key, QuantizedWeight) and (self.case == 2 or key not in self._by_weight):
                size = key.abs()
            else:
                entry = key if isinstance(key, QuantizedWeight) else self._by_weight[key]
                size = sharding.quantized(entry).abs_()
            grad.mul_(size.add_(self.eta))

    # Second pass -------------------------------------------------------------------------------------------------

    @contextmanager
    def perturbed(self, update_statistics: bool = False) -> Iterator[Displacement]:
        """The second pass: `eps` is in place, normalization statistics are frozen, random numbers are those of the
        first pass. On the way out, also by an exception, everything is back, bit for bit, from saved copies.

        Args:
            update_statistics: Let this pass update the running statistics of normalization after all, for a first
                pass that did not because it saw only a part of the batch.

        Yields:
            The `eps`, which may be kept for [`displaced`].
        """
        if not self._rng:
            raise RuntimeError(
                "perturbed() without a first pass: run forward and backward in training mode before it, either in "
                "`with minimizer.ascent():` or with `minimizer.armed = True`."
            )
        if self._eps is None:
            sharding.reshard(self.model)
            self._eps = self.climb()
        after = RNGState()
        self._rng.pop(0).restore()
        completed = False
        try:
            kept = nullcontext() if update_statistics else frozen_norm_statistics(self.model)
            with self.displaced(self._eps), self._quantized_once(self._eps), kept:
                yield self._eps
            completed = True
        finally:
            if not completed:
                after.restore()
            if not completed or not self._rng:
                self.reset()

    @contextmanager
    def _quantized_once(self, eps: Displacement) -> Iterator[None]:
        """Let the first forward of a block at `Q(w) + eps` use `Q(w)` of the first pass."""
        self._given = self._kept.give(eps.outputs)
        given = list(self._given)
        try:
            yield
        finally:
            self._given = set()
            for quantizer in given:  # that were not asked
                quantizer.given_output = None

    @contextmanager
    def displaced(self, eps: Displacement) -> Iterator[None]:
        """Run a block at the perturbed point, and nothing else: normalization statistics are updated there."""
        sharding.reshard(self.model)
        torch.clear_autocast_cache()  # it may hold low-precision copies of the unperturbed parameters
        with eps.shifted():
            self._phase, self._added = "displaced", eps
            try:
                yield
            finally:
                self._phase, self._added = "idle", None
                sharding.reshard(self.model)

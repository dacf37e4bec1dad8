"""Add the second pass of SAQ to any training loop; `three_cases.py` has the three cases and their equations."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from . import sharding
from .displacement import Displacement
from .norm_statistics import frozen_norm_statistics
from .parameter_gradients import (
    Mark,
    add_gradients,
    check_nothing_steps_inside_backward,
    recorded_gradients,
    set_aside,
    without_gradients,
)
from .perturbed_tensors import PerturbedTensors
from .random_state import RNGState
from .seam import Seam
from .three_cases import Case, Climb, Gradients, climb, latent_weights_are_asked


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

    This is the one way to take a full step. Steps of one pass are made of [`displaced`], [`recorded`] and [`climb`];
    [`ScheduledStep`] does so.

    One buffer of the size of the quantized weights is needed: `g_q`, which becomes `eps` in place. It exists on each
    process and is not part of any state dict. (In cases 1 and 2 that buffer is the gradient of the latent weights, and
    case 2 saves a copy of them while they are moved.)

    Parameters may be replaced, frozen or unfrozen between steps; each step perturbs what is trainable then.

    Under FSDP2 (`fully_shard`, before or after this is built) that buffer is whole on each process, not sharded. What
    is perturbed in place is sharded, so all processes share one `eps` for it, made of the average gradient. `no_sync`
    has no effect inside the two contexts: each backward reduces its gradients.

    Args:
        model: A model with quantized layers, not wrapped by DDP or the like.
        rho: Radius of the perturbation, >= 0.
        case: 1, 2 or 3, see `three_cases.py`.
        adaptive: Scale the perturbation by the size of each weight (ASAM).
        eta: Added to that size.
        perturb: Kinds of tensors to perturb, of `weight` (quantized), `bias`, `norm` (affine parameters of
            normalization layers), `scale` (of quantizers) and `other` (embeddings, unquantized weights).
        sync: `"local"`: each process perturbs with its own gradient (m-sharpness, no communication). `"global"`:
            gradients are averaged over all processes before the perturbation is made. Under FSDP2 `"local"` is for
            case 3: own `g_q` and norm for quantized weights, average gradient and root mean square of these norms
            for what is perturbed in place.

    Attributes:
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
        self.perturb = tuple(perturb)
        self.ascent_norm = 0.0
        self.skipped = 0
        self._seam = Seam()
        self._grads: dict[nn.Parameter, Tensor] | None = None  # what first passes collected from parameters
        self._rng: list[RNGState] = []  # one per first pass, oldest first
        self._eps: Displacement | None = None  # what the first passes were turned into
        self._seam.watch(model)
        self._find_tensors()
        if not self._tensors:
            self.detach()
            raise ValueError(
                f"perturb={list(perturb)} selects no trainable tensor of {type(model).__name__}. Quantize the model "
                'first, or add "other" to perturb weights that are not quantized.'
            )

    def __deepcopy__(self, memo: dict) -> SharpnessAwareMinimizer:
        return self  # copying a model copies its hooks; they must not drag a second minimizer along

    def detach(self) -> None:
        """Remove the hooks; the model is as if the minimizer had never been there."""
        self._seam.let_go()
        self.reset()

    def reset(self) -> None:
        """Forget a perturbation that is under way, for example after a step was abandoned."""
        self._seam.leaves, self._grads, self._rng, self._eps = {}, None, [], None

    def _find_tensors(self) -> None:
        sharding.check_parallelism(self.model, self.case, self.sync)
        self._tensors = PerturbedTensors(self.model, self.perturb)
        self._seam.attach(self._tensors.by_quantizer)

    # First pass --------------------------------------------------------------------------------------------------

    @contextmanager
    def ascent(self, clean: dict[nn.Parameter, Tensor] | None = None) -> Iterator[None]:
        """Run the first pass: gradients go to the perturbation and leave `p.grad` as it was.

        Under DDP enter `accelerator.no_sync(model)` as well: this backward is not to be communicated.
        May be entered several times before `perturbed`: the gradients add up to one perturbation, and `perturbed`
        is then entered as often, in the same order.

        Args:
            clean: If given, the gradients of all that is perturbed, of latent weights too, are added up here as well.
        """
        sharding.reshard(self.model)
        sharding.check_gradients_are_reduced(self.model)
        grads = self._begin_first_pass()
        wanted = {*self._asked_of_parameters(), *(self._tensors.latent if clean is not None else ())}
        with self._pass(), set_aside(self._tensors.parameters):
            with self._seam.catching(pass_on=clean is not None or "scale" in self.perturb):
                with without_gradients(self._tensors.costly, but=wanted) as idle:
                    with self._seam.clearing_with(Mark(idle)):
                        yield
            add_gradients(self._asked_of_parameters(), to=grads)
            if clean is not None:  # `grads` become eps in place, so these are copies where the two overlap
                add_gradients([*self._tensors.latent, *self._tensors.in_place], to=clean, apart_from=grads)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Run a first pass that is an ordinary one too: gradients add up in `p.grad`, communicated as ever, and those
        of this process alone go to the perturbation. May be entered inside of [`displaced`].

        Raises:
            ValueError: Under FSDP2.
        """
        sharding.check_whole(self.model, "A step that uses and records the same gradients")
        grads = self._begin_first_pass()
        with self._pass(), self._seam.catching(pass_on=True):
            with recorded_gradients(self._asked_of_parameters(), grads) as recorder:
                with self._seam.clearing_with(recorder):
                    yield

    def _begin_first_pass(self) -> dict[nn.Parameter, Tensor]:
        """Place the leaves and note the random state; returns where the gradients of parameters are to go."""
        if self._grads is None:
            self.reset()
            if not self._tensors.is_current(self.model):
                self._find_tensors()
            check_nothing_steps_inside_backward(self._tensors.parameters)
            self._seam.place_leaves([] if latent_weights_are_asked(self.case) else self._tensors.weights)
            self._grads = {}
        self._rng.append(RNGState())
        return self._grads

    def _asked_of_parameters(self) -> list[nn.Parameter]:
        """List the parameters whose own gradient enters `eps`."""
        latent = list(self._tensors.latent) if latent_weights_are_asked(self.case) else []
        return [*latent, *self._tensors.in_place]

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """Forget what was collected if the block does not come to its end."""
        before, self._seam.is_in_a_pass = self._seam.is_in_a_pass, True
        completed = False
        try:
            yield
            completed = True
        finally:
            self._seam.is_in_a_pass = before
            if not completed:
                self.reset()

    # From gradients to eps -----------------------------------------------------------------------------------------

    def climb(self) -> Displacement:
        """Turn the gradients of the first passes into `eps`, in their own memory."""
        found = self._grads or {}
        grads: Gradients = {p: found[p] for p in self._asked_of_parameters() if p in found}  # alike on all processes
        for quantizer, leaf in self._seam.leaves.items():
            if leaf.grad is not None:
                grads[self._tensors.by_quantizer[quantizer]] = leaf.grad
        self._grads, self._seam.leaves = None, {}
        if self.sync == "global":
            sharding.average_over_processes([g for g in grads.values() if not sharding.is_sharded(g)])
        eps, self.ascent_norm = climb(grads, self._tensors, Climb(self.rho, self.case, self.adaptive, self.eta))
        self.skipped += not eps
        return eps

    # Second pass -------------------------------------------------------------------------------------------------

    @contextmanager
    def perturbed(self, update_statistics: bool = False) -> Iterator[Displacement]:
        """Run the second pass: `eps` is in place, normalization statistics are frozen, random numbers are those of the
        first pass. On the way out, also by an exception, everything is back, bit for bit, from saved copies.

        Args:
            update_statistics: Let this pass update the running statistics of normalization after all, for a first
                pass that did not because it saw only a part of the batch.

        Yields:
            The `eps`, which may be kept for [`displaced`].
        """
        if not self._rng:
            raise RuntimeError(
                "perturbed() without a first pass: run forward and backward in `with minimizer.ascent():` before it."
            )
        if self._eps is None:
            sharding.reshard(self.model)
            self._eps = self.climb()
        after = RNGState()
        self._rng.pop(0).restore()
        completed = False
        try:
            kept = nullcontext() if update_statistics else frozen_norm_statistics(self.model)
            with self.displaced(self._eps), kept:
                yield self._eps
            completed = True
        finally:
            if not completed:
                after.restore()
            if not completed or not self._rng:
                self.reset()

    @contextmanager
    def displaced(self, eps: Displacement) -> Iterator[None]:
        """Run a block at the perturbed point, and nothing else: normalization statistics are updated there."""
        sharding.reshard(self.model)
        before, self._seam.is_in_a_pass = self._seam.is_in_a_pass, True
        # Inside of one autocast block its cache would carry low-precision copies of parameters from one point to the
        # other.
        torch.clear_autocast_cache()
        try:
            with eps.shifted(), self._seam.adding(eps.outputs):
                try:
                    yield
                finally:
                    self._seam.is_in_a_pass = before
                    sharding.reshard(self.model)
            self._seam.rounding.conclude(self.rho)
        finally:
            torch.clear_autocast_cache()

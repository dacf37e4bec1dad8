"""Add the second pass of SAQ to any training loop; `three_cases.py` has the three cases and their equations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

from torch import Tensor, nn

from . import sharding
from .buffer_state import BufferState
from .depth import LateLayers, SharedPrefix, choose_late_layers
from .displacement import Displacement
from .frozen_batch_norm import frozen_norm_statistics
from .parameter_gradients import (
    Mark,
    add_gradients,
    check_nothing_steps_inside_backward,
    recorded_gradients,
    set_aside,
    without_gradients,
)
from .perturbed_tensors import PerturbedTensors, as_kinds, nothing_selected
from .random_state import RNGState
from .seam import Seam
from .three_cases import Case, Climb, Gradients, check_climb, climb, latent_weights_are_asked, tell_of_skipping


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

    This is the one way to take a full step; [`ScheduledStep`] makes others of [`displaced`], [`recorded`], [`climb`].

    One buffer of the size of the quantized weights is needed: `g_q`, which becomes `eps` in place; it is part of no
    state dict. (In cases 1 and 2 it is the gradient of the latent weights, of which case 2 also saves a copy.)
    Parameters may be replaced, frozen or unfrozen between steps; each step perturbs what is trainable at that time.

    Under FSDP2 (`fully_shard`, before or after this is built) that buffer is whole on each process, not sharded. What
    is perturbed in place is sharded, so all processes share one `eps` for it, made of the average gradient. `no_sync`
    has no effect inside the two contexts: each backward reduces its gradients.

    Args:
        model: A model with quantized layers, not wrapped by DDP or the like.
        rho: Radius of the perturbation, >= 0: its global L2 norm, where it is not adaptive.
        case: 1, 2 or 3, see `three_cases.py`.
        adaptive: Whether to scale the perturbation by the size of each weight (ASAM, arXiv:2102.11600).
        eta: Number that is added to that size, >= 0; 0.01 is that of ASAM.
        perturb: Kinds of tensors to perturb, one or more of `weight` (quantized), `bias`, `norm` (affine parameters
            of normalization layers), `scale` (of quantizers) and `other` (embeddings, unquantized weights).
        sync: `"local"`: each process perturbs with its own gradient (m-sharpness, no communication). `"global"`:
            gradients are averaged over all processes before the perturbation is made. Under FSDP2 `"local"` is for
            case 3: own `g_q` and norm for quantized weights, average gradient and root mean square of these norms
            for what is perturbed in place.

    Attributes:
        ascent_norm (`float`): `norm` of the gradients that the last perturbation was made from.
        radius_factor (`float`): Factor of `rho` in the next [`climb`]; a schedule may adapt it.
        late (`LateLayers`, *optional*): The layers that are perturbed, where not all are, see [`perturb_last_layers`].
        outside (`list`): Parameters that are trained though they are not in the model, such as those of a loss.
        skipped (`int`): How often `norm` was zero or not finite, so that `eps` was 0 (plain training on that step).

    Raises:
        ValueError: If an argument is none of its choices or `perturb` selects no tensor of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        rho: float,
        case: Case = 3,
        adaptive: bool = False,
        eta: float = 0.01,
        perturb: str | Collection[str] = ("weight", "bias", "norm"),
        sync: Literal["local", "global"] = "local",
    ):
        check_climb(rho, case, eta, sync)
        self.model, self.rho, self.case, self.adaptive = model, rho, case, adaptive
        self.eta, self.perturb, self.sync = eta, as_kinds(perturb), sync
        self.ascent_norm, self.radius_factor, self.skipped, self._in_a_row = 0.0, 1.0, 0, 0
        self.late: LateLayers | None = None
        self.outside: list[nn.Parameter] = []
        self._seam = Seam()
        self._grads: dict[nn.Parameter, Tensor] | None = None  # what first passes collected from parameters
        self._begun: list[tuple[RNGState, BufferState]] = []  # one per first pass, oldest first
        self._eps: Displacement | None = None  # made of the gradients of the first passes
        self._find_tensors()
        if not self._tensors:
            self.detach()
            raise nothing_selected(model, self.perturb)

    def __getstate__(self) -> dict:
        """Copy as one of the copied model that has no step under way; its hooks come with its next step."""
        return {**vars(self), "_seam": Seam(), "_grads": None, "_begun": [], "_eps": None}

    def _look_again(self) -> None:
        """Find the tensors anew if parameters have changed, and put back hooks that were removed."""
        if not self._tensors.is_current(self.model):
            self._find_tensors()
        self._seam.attach(self._tensors.by_quantizer, self.model, owner=self)

    def _find_tensors(self) -> None:
        sharding.check_parallelism(self.model, self.case, self.sync)
        self._tensors = PerturbedTensors(self.model, self.perturb, None if self.late is None else self.late.parameters)
        self._seam.attach(self._tensors.by_quantizer, self.model, owner=self)
        self._prefix = SharedPrefix(self.model, self.late)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """List all that is trained with the model; a first pass leaves no gradient there."""
        return [*self.model.parameters(), *self.outside]

    def detach(self) -> None:
        """Remove the hooks; then the model is as it was before. A later step puts them back."""
        self._seam.let_go()
        self.reset()

    def reset(self) -> None:
        """Forget an unfinished perturbation, for example after a step was broken off."""
        self._seam.leaves, self._grads, self._begun, self._eps = {}, None, [], None
        self._prefix.forget()

    def perturb_last_layers(self, depth: float, run: Callable[[], object]) -> LateLayers:
        """Perturb only the last layers from now on, see [`find_late_layers`] for `depth` and `run`.

        The layers before them run once for both passes where they can, see `depth/shared_prefix.py`. The second pass
        must then have the batch of the first, and of all contexts only `ascent` and `perturbed` may be used.
        """
        sharding.reshard(self.model)
        self.perturb_all()
        with self._seam.a_pass(or_else=self.reset), set_aside(self.parameters):
            perturbed = {*self._tensors.latent, *self._tensors.in_place}
            self.late = choose_late_layers(self.model, depth, perturbed, run)
        self._find_tensors()
        return self.late

    def perturb_all(self) -> None:
        """Perturb all layers again."""
        self.late = None
        self._find_tensors()

    @contextmanager
    def all_perturbed(self) -> Iterator[None]:
        """Perturb all layers in steps that begin and end inside the block."""
        late, tensors, prefix = self.late, self._tensors, self._prefix
        self.perturb_all()
        try:
            yield
        finally:
            self.late, self._tensors, self._prefix = late, tensors, prefix
            self._seam.attach(self._tensors.by_quantizer, self.model, owner=self)

    @contextmanager
    def ascent(self, clean: dict[nn.Parameter, Tensor] | None = None) -> Iterator[None]:
        """Run the first pass: gradients go to the perturbation and leave `p.grad` as it was.

        Under DDP enter `accelerator.no_sync(model)` before the forward as well, so that no gradient is communicated.
        It may be entered several times before `perturbed`: the gradients then add up to one perturbation, and
        `perturbed` must be entered as often, in the same order.

        Args:
            clean: If given, the gradients of all that is perturbed, of latent weights too, are added up here as well.

        Raises:
            RuntimeError: If an optimizer steps inside of backward, or gradients wait for their reduction (FSDP2).
            ValueError: If parameters were replaced in a way that rules out the perturbation, for example sharded.
        """
        sharding.reshard(self.model)
        sharding.check_gradients_are_reduced(self.model)
        grads = self._begin_first_pass()
        wanted = {*self._asked_of_parameters(), *(self._tensors.latent if clean is not None else ())}
        wanted |= set(self._prefix.parameters)  # the second pass computes their gradients in the graph of this one
        with self._seam.a_pass(or_else=self.reset), set_aside(self.parameters), self._prefix.recording():
            with self._seam.catching(pass_on=clean is not None or "scale" in self.perturb):
                with without_gradients(self._tensors.costly, but=wanted) as idle:
                    with self._seam.clearing_with(Mark(idle)):
                        yield
            add_gradients(self._asked_of_parameters(), to=grads)
            if clean is not None:  # `grads` become eps in place, so these are copies where the two overlap
                add_gradients([*self._tensors.latent, *self._tensors.in_place], to=clean, apart_from=grads)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Run a first pass that is an ordinary pass too.

        Gradients add up in `p.grad` and are communicated as usual; the gradients of this process alone go to the
        perturbation. It may be entered inside of [`displaced`].

        Raises:
            ValueError: Under FSDP2.
            RuntimeError: If an optimizer steps inside of backward.
        """
        sharding.check_whole(self.model, "A step that uses and records the same gradients")
        grads = self._begin_first_pass()
        with self._seam.a_pass(or_else=self.reset), self._seam.catching(pass_on=True):
            with recorded_gradients(self._asked_of_parameters(), grads) as recorder:
                with self._seam.clearing_with(recorder):
                    yield

    def _begin_first_pass(self) -> dict[nn.Parameter, Tensor]:
        """Place the leaves and note the random state. Return the dict that collects the gradients of parameters."""
        if self._grads is None:
            self.reset()
            self._look_again()
            check_nothing_steps_inside_backward(self._tensors.parameters)
            self._seam.place_leaves([] if latent_weights_are_asked(self.case) else self._tensors.weights)
            self._grads = {}
        self._begun.append((RNGState(), BufferState(self.model)))
        return self._grads

    def _asked_of_parameters(self) -> list[nn.Parameter]:
        """List the parameters whose own gradient enters `eps`."""
        return [*(self._tensors.latent if latent_weights_are_asked(self.case) else ()), *self._tensors.in_place]

    # From gradients to eps -----------------------------------------------------------------------------------------

    def climb(self) -> Displacement:
        """Turn the gradients of the first passes into `eps`, in their own memory.

        Sets `ascent_norm`. Where that is zero or not finite, `eps` is empty and counted in `skipped`.
        """
        return self._climb()[0]

    def prepare(self, number: Tensor) -> float:
        """Make the `eps` of [`perturbed`] now, and read the 0-d `number` back from the device together with its norm.

        For what decides by `number` whether there is a second pass: the host waits once instead of twice.
        """
        self._eps, (read,) = self._climb(number)
        return read

    def _climb(self, *also: Tensor) -> tuple[Displacement, list[float]]:
        sharding.reshard(self.model)
        found = self._grads or {}
        grads: Gradients = {p: found[p] for p in self._asked_of_parameters() if p in found}  # one order everywhere
        for quantizer, leaf in self._seam.leaves.items():
            if leaf.grad is not None:
                grads[self._tensors.by_quantizer[quantizer]] = leaf.grad
        self._grads, self._seam.leaves = None, {}
        if self.sync == "global":
            sharding.average_over_processes([g for g in grads.values() if not sharding.is_sharded(g)])
        how = Climb(self.rho * self.radius_factor, self.case, self.adaptive, self.eta)
        eps, (self.ascent_norm, *numbers) = climb(grads, self._tensors, how, *also)
        self.skipped, self._in_a_row = self.skipped + (not eps), 0 if eps else self._in_a_row + 1
        tell_of_skipping(self._in_a_row, self.ascent_norm)
        return eps, numbers

    # Second pass -------------------------------------------------------------------------------------------------

    @contextmanager
    def perturbed(self, update_statistics: bool = False) -> Iterator[Displacement]:
        """Run the second pass at the perturbed point, otherwise like the first.

        Inside the block `eps` is added, running statistics are frozen, and random numbers and all other buffers are
        those of the first pass. At its end, also by an exception, all is put back bit for bit from saved copies.

        Args:
            update_statistics: Whether this pass updates the running statistics of normalization. That is right if the
                first pass did not, because it saw only a part of the batch.

        Yields:
            The `eps`, which may be kept for [`displaced`].

        Raises:
            RuntimeError: If there was no first pass.
        """
        if not self._begun:
            raise RuntimeError(
                "perturbed() without a first pass: run forward and backward in `with minimizer.ascent():` before it."
            )
        if self._eps is None:
            self._eps = self.climb()
        after, (random_numbers, buffers) = RNGState(), self._begun.pop(0)
        random_numbers.restore()
        completed = False
        try:
            kept = nullcontext() if update_statistics else frozen_norm_statistics(self.model, buffers)
            with self.displaced(self._eps), kept, self._prefix.replaying():
                yield self._eps
            completed = True
        finally:
            if not completed:
                after.restore()
            if not completed or not self._begun:
                self.reset()

    def displaced(self, eps: Displacement) -> AbstractContextManager[None]:
        """Run the block at the perturbed point and change nothing else: normalization statistics are updated there."""
        sharding.reshard(self.model)
        self._look_again()
        return self._seam.displaced(self.model, eps, self.rho)

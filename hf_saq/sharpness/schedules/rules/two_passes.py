"""Perturb in two passes, the reference: the first makes `eps`, the second the gradients. `interval` says how often."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...displacement import Displacement
from ...frozen_batch_norm import frozen_norm_statistics
from ..knobs import Knobs
from ..partial_batch import count_samples, first_samples, share_of_samples
from ..rule import Action, MicroBatch, Outcome, StepRule


class TwoPasses(StepRule):
    """Perturbs in two passes. Rules that renew something in such steps are subclasses.

    Where [`one_eps_for_a_step`] says so, as with `sync="global"`, one `eps` is made from all micro-batches: their
    second passes come after the first pass of the last one. Otherwise each micro-batch has its own `eps`.
    """

    has_state = False
    needs_whole_gradients = False
    _said = False

    def forget(self) -> None:
        self._clean_losses: list[Tensor] = []
        self._share = 1.0  # share of the samples that first passes of this step see

    @classmethod
    def action(cls, knobs: Knobs, step: int) -> Action:
        return "plain" if step % knobs.interval else "two passes"

    @classmethod
    def first_passes(cls, knobs: Knobs) -> float:
        return knobs.ascent_fraction * knobs.ascent_depth / knobs.interval

    @classmethod
    def can_match_radius(cls, knobs: Knobs) -> bool:
        return cls is TwoPasses and min(knobs.ascent_fraction, knobs.ascent_depth) < 1

    @classmethod
    def perturbs_statistics(cls, knobs: Knobs) -> bool:
        return knobs.ascent_fraction < 1

    def begin_step(self) -> None:
        self._clean_losses = []

    def micro_batch(self, micro: MicroBatch) -> Outcome:
        outcome, _ = self.two_passes(micro)
        return outcome

    @property
    def one_eps_for_a_step(self) -> bool:
        """Tell whether all micro-batches of a step share one `eps`."""
        return self.minimizer.sync == "global"

    def two_passes(
        self, micro: MicroBatch, clean: dict[nn.Parameter, Tensor] | None = None
    ) -> tuple[Outcome, Displacement]:
        """Run both passes of one micro-batch.

        Where all micro-batches of a step share one `eps`, run only the first pass; after the last micro-batch's first
        pass run the second passes of all.

        Args:
            clean: If given, the clean gradients are added up here.

        Returns:
            The outcome, and the `eps`, which is empty as long as there is none.
        """
        together = self.one_eps_for_a_step
        if micro.k == 0 or not together:
            self._share = self._share_of(micro.batches if together else [micro.batch])
        # Take running statistics from the one pass that sees the whole batch: those of a part would be noise.
        partial = self._share < 1
        with frozen_norm_statistics(self.minimizer.model) if partial else nullcontext(), self.minimizer.ascent(clean):
            self._clean_losses.append(self._first_backward(micro.batch, micro))
        outcome, eps = Outcome(self._clean_losses[-1]), Displacement()
        if partial:  # only second passes see whole batches, so theirs is the loss
            outcome = Outcome(torch.zeros_like(outcome.loss), is_clean=False)
        if together and not micro.is_last:
            return outcome, eps
        second = micro.batches if together else [micro.batch]
        for j, (batch, clean_loss) in enumerate(zip(second, self._clean_losses, strict=True), start=1):
            with self.minimizer.perturbed(update_statistics=partial) as eps:
                perturbed_loss = micro.backward(batch, reduce=j == len(second))
            if partial:
                outcome.loss = outcome.loss + perturbed_loss
            else:
                outcome.sharpness.append(perturbed_loss - clean_loss)
        self._clean_losses = []
        outcome.ascent_norm = self.norm_per_sample(len(micro.batches) / len(second))
        return outcome, eps

    def _first_backward(self, batch: Any, micro: MicroBatch) -> Tensor:
        if self._share == 1:
            return micro.backward(batch, reduce=False)
        self.share = self._share
        try:
            part = first_samples(batch, self.knobs.ascent_fraction, self.sample_names)
            return micro.backward(part, reduce=False)
        finally:
            self.share = 1.0

    def _share_of(self, batches: Sequence[Any]) -> float:
        """Compute the share of samples that the first passes on `batches` see; these batches have one `eps` together.

        It is one number for all of them: their losses have one divisor, even where they differ in size.
        """
        fraction = self.knobs.ascent_fraction
        if fraction == 1:
            return 1.0
        reasons = [found.reason for found in (count_samples(b, self.sample_names) for b in batches) if found.reason]
        if reasons and not self._said:
            self._said = True
            warnings.warn(
                f"ascent_fraction={fraction}: no part of a batch can be taken, because {reasons[0]}. The perturbation "
                "is made from whole batches, at the cost of a whole pass. Give every value of a batch one entry a "
                'sample (SAQTrainer.sample_names has the names of those that do), or choose schedule="full" to say '
                "that this is intended.",
                stacklevel=2,
            )
        return 1.0 if reasons else share_of_samples(batches, fraction, self.sample_names)

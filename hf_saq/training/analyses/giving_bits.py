"""Give layers bits for a budget from the training data, before training starts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ...analysis import Allocation, allocate_bits
from ...analysis.bits import change_bits
from ...config import SAQConfig, SAQQuantizationConfig
from ...config.bit_budget import read_bit_budget
from ...conversion import calibrate
from ...quantizers import Quantizer
from ...storage.same_quantization import stored_quantization, stored_quantizers
from ..calibrating import CALIBRATION_BATCHES, Calibrating, unchanged_rng

BUDGET_BATCHES = 16
"""Training batches that sensitivities are measured on."""


class GivesBits(Calibrating):
    """Gives layers bits for `SAQConfig.bit_budget`, for [`SAQTrainer`].

    Attributes:
        allocation: What each layer got and why; `None` without a budget, and in a run that goes on from a checkpoint,
            which takes the bits of that.
    """

    saq_config: SAQConfig
    model: nn.Module
    allocation: Allocation | None = None
    _given: tuple[nn.Module, str] | None = None
    """Model and budget of the allocation."""

    def check_bit_budget(self) -> None:
        """Raise `ValueError` if there is a budget, and a set-up that it does not go with."""
        if self.saq_config.bit_budget is None:
            return
        if self.is_fsdp_enabled:
            raise ValueError(
                "SAQTrainer: SAQConfig.bit_budget does not go with FSDP; find the bits on one process with "
                "hf_saq.analysis.allocate_bits, and quantize with allocation.applied_to(config)."
            )
        if self.optimizer is not None:
            raise ValueError(
                "SAQTrainer: SAQConfig.bit_budget gives layers new quantizers, whose values the optimizer that is "
                "there would not have; expected no optimizer, or no bit_budget."
            )

    def give_bits(self) -> None:
        """Give the layers of the calibrated model their bits, once, and calibrate it anew; alike on every process.

        Raises:
            ValueError: If they were given for another budget before, or there is nothing to measure losses on.
        """
        if self.saq_config.bit_budget is None:
            return
        if self._given is not None and self._given[0] is self.model:
            if self._given[1] != self.saq_config.bit_budget:
                raise ValueError(
                    "SAQTrainer: the bits of this model were given for "
                    f"SAQConfig.bit_budget={self._given[1]!r}, which is {self.saq_config.bit_budget!r} now; they are "
                    "given once. Build another trainer, with a model that has none yet."
                )
            return
        self.check_bit_budget()
        amount, unit = read_bit_budget("SAQConfig.bit_budget", self.saq_config.bit_budget)
        if not self.has_train_data():
            raise ValueError("SAQTrainer: SAQConfig.bit_budget needs a train_dataset, which losses are measured on.")
        with unchanged_rng():
            with self.fresh_loader() as loader:
                batches = list(itertools.islice(loader, BUDGET_BATCHES))
            found = allocate_bits(
                self.model,
                [self._prepare_inputs(batch) for batch in batches],
                amount,
                unit=unit,  # type: ignore[arg-type]
                loss=self._loss_of,
                progress=self.is_world_process_zero(),
            )
            (self.allocation,) = broadcast_object_list([found])  # each process has measured on batches of its own
            self._given = self.model, self.saq_config.bit_budget
            change_bits(self.model, self.allocation.overrides)
            calibrate(self.model, batches[:CALIBRATION_BATCHES], run=self.run_forward, only_missing=True)
            self._count_cost(batches[0])

    def take_bits_of(self, checkpoint: str) -> None:
        """Give layers the bits that those of a checkpoint have, whose run gave them for a budget."""
        config = getattr(getattr(self.model, "config", None), "quantization_config", None)
        found = stored_quantization(checkpoint)
        if self.saq_config.bit_budget is None:
            return
        if config is None:
            change_bits(self.model, _bits_of_quantizers(self.model, stored_quantizers(checkpoint)))
            return
        if not isinstance(config, SAQQuantizationConfig) or not found:
            return
        stored = SAQQuantizationConfig.from_dict(found).overrides
        own = {name: fields for name, fields in stored.items() if config.overrides.get(name) != fields}
        change_bits(self.model, own)

    def _loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        items = self._get_num_items_in_batch([batch], self.args.device)
        with self.aside():
            return self.compute_loss(model, dict(batch), num_items_in_batch=items)  # type: ignore[return-value]


def _bits_of_quantizers(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Turn bits by quantizer, as checkpoints of plain modules have them, into bits by layer."""
    found: dict[str, dict[str, int]] = {}
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, Quantizer) and name in stored and stored[name]["bits"] != quantizer.bits:
            found.setdefault(name.rpartition(".")[0], {})[f"{quantizer.role}_bits"] = stored[name]["bits"]
    return found

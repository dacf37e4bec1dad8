"""Remember what a `Trainer` measured and write it into the model card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..config import SAQConfig
from ..layers import QuantizedLayer
from .card import CARD, PICTURE, model_card
from .card_facts import ResultRow, measured
from .run_facts import facts_of_run
from .training_picture import draw_training_curve


class CardTrainer(Trainer):
    """Writes the card of a quantized model from what the run measured. Other models get the card of `Trainer`.

    Attributes:
        card_arguments (`dict`): Arguments of `create_model_card` for all cards of this trainer, also of those that
            are written by `save_model` and while training goes on. An argument passed to a call takes their place.
    """

    saq_config: SAQConfig
    model: nn.Module

    def __init__(self, *args: Any, **kwargs: Any):
        self._measured: dict[str, float] = {}  # metrics of `evaluate` on the present weights
        self._images_behind: dict[str, int] = {}  # metric -> number of images
        self._images_of_loop: int | None = None
        self.card_arguments: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    # What was measured -----------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `Trainer` does, and note for the model card what is measured under the prefix `eval`."""
        metrics = super().evaluate(*args, **kwargs)
        found, images = _of_evaluation(metrics), self._images_of_loop
        self._measured = {**self._measured, **found}
        if images is not None:  # for several data sets `Trainer` calls this once for each, and then returns all of it
            self._images_behind.update(dict.fromkeys(found, images))
        self._images_of_loop = None
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `Trainer` does, and note the number of images."""
        output = super().evaluation_loop(*args, **kwargs)
        self._images_of_loop = output.num_samples
        return output

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Take batches as `Trainer` does, and forget what was measured: the optimizer step will change the weights."""
        self._measured = {}
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def train(self, *args: Any, **kwargs: Any):
        """Train as `Trainer` does. If it loads the best model at the end, take the metrics of that from the log."""
        output = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            logs = [entry for entry in self.state.log_history if entry.get("step") == self.state.best_global_step]
            self._measured = {name: value for entry in logs for name, value in _of_evaluation(entry).items()}
        return output

    # The card --------------------------------------------------------------------------------------------------------

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        comparison: Sequence[ResultRow] | None = None,
    ) -> None:
        """Write `README.md`, and a picture of the training if matplotlib is installed, into `output_dir`.

        Metrics are those of the last `evaluate` if the weights did not change since; sizes are those of the files in
        `output_dir`. What was not measured is left out.

        Args:
            comparison: Results of other models that this run measured, for the table of results.
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args: As in
                [`transformers.Trainer.create_model_card`].
        """
        given: dict[str, Any] = dict(
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
            comparison=comparison,
        )
        given = {**self.card_arguments, **{name: value for name, value in given.items() if value is not None}}
        if not self._is_quantized():
            given.pop("comparison", None)
            super().create_model_card(**given)
        elif self.is_world_process_zero():
            directory = Path(str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            has_picture = draw_training_curve(self.state.log_history, directory / PICTURE)
            behind = {self._images_behind.get(name) for name in self._measured}
            about = {"evaluated_images": behind.pop() if len(behind) == 1 else None, **given}
            facts = facts_of_run(self, self.saq_config, self._measured, directory, has_picture, **about)
            model_card(facts).save(directory / CARD)

    def _is_quantized(self) -> bool:
        return any(isinstance(module, QuantizedLayer) for module in self.model.modules())


def _of_evaluation(metrics: dict[str, Any]) -> dict[str, float]:
    return measured({name: value for name, value in metrics.items() if name.startswith("eval_")})

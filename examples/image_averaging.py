"""An exponential moving average of the weights, by timm's `ModelEmaV3`: what training ends with is the average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from image_mixing import MixingTrainer
from timm.utils import ModelEmaV3
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STORED = "averaged_weights.pt"
"""In each `checkpoint-N`, so that a run that goes on averages the same weights."""


class AveragesWeights(TrainerCallback):
    """Averages the weights after each step. Step sizes of quantizers are averaged as the weights are.

    Args:
        decay: What an earlier average counts after one step, 0 to 1.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: ModelEmaV3 | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        self.average = ModelEmaV3(model, decay=self.decay)
        if state.global_step == 0:
            return
        file = self._file(args, state)
        if not file.is_file():
            raise ValueError(
                f"{file.parent} has no {STORED}: it is of a run without --ema_decay. Go on without it, or start anew."
            )
        found = torch.load(file, map_location=args.device, weights_only=True)
        self.average.module.load_state_dict(found)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:  # noqa: ARG002
        assert self.average is not None
        self.average.update(model, step=state.global_step)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        assert self.average is not None
        if args.should_save:
            torch.save(self.average.module.state_dict(), self._file(args, state))

    def put_into(self, model: torch.nn.Module) -> None:
        assert self.average is not None
        model.load_state_dict(self.average.module.state_dict())
        self.average = None

    @staticmethod
    def _file(args: TrainingArguments, state: Any) -> Path:
        return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / STORED


def check_averaging(is_sharded: bool, takes_best: bool) -> None:
    """Raise `ValueError` where weights cannot be averaged, or the average would be thrown away."""
    if is_sharded:
        raise ValueError("--ema_decay under FSDP: the weights to average lie in shards. Leave it out there.")
    if takes_best:
        raise ValueError(
            "--ema_decay with --load_best_model_at_end: training ends with the average or with the best "
            "checkpoint, not with both. Leave one of them out."
        )


class ImageTrainer(MixingTrainer):
    """A [`MixingTrainer`] whose model is the average of its weights once training is over.

    Evaluations during training see the weights themselves. With a decay of 0 nothing differs from `MixingTrainer`.
    """

    def __init__(self, *args: Any, ema_decay: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.averages = AveragesWeights(ema_decay) if ema_decay > 0 else None
        if self.averages is not None:
            check_averaging(self.is_fsdp_enabled, self.args.load_best_model_at_end)
            self.add_callback(self.averages)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # Do it first, so that statistics of batch norms are estimated anew for the average where the schedule asks.
        if self.averages is not None:
            self.averages.put_into(self.accelerator.unwrap_model(self.model))
        return super()._finalize_training(*args, **kwargs)

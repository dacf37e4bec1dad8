"""Save models for use, save checkpoints to resume from, and resume exactly."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import SAQConfig
from ..conversion.calibration import NEVER_RUN
from ..conversion.forms import pack
from ..conversion.swapping import leave_in_float
from ..layers import HoldsQuantizers, QuantizedLayer
from ..sharpness.schedules import ScheduledStep
from ..storage.exact_loading import load_exactly
from ..storage.same_quantization import check_same_quantization, store_quantizers, stored_quantization
from ..storage.staging import staged
from .checkpoints import STATE_FILE, last_complete_checkpoint, what_is_missing
from .fsdp import gathered
from .schedule_state import load_schedule, save_schedule, save_settings, tell_of_other_settings

logger = logging.getLogger(__name__)


class SavesAndResumes(Trainer):
    """Saves and resumes for [`SAQTrainer`].

    `save_model` writes packed integers; `checkpoint-N` holds the latent float weights and what a schedule remembers.
    """

    model: nn.Module
    saq_config: SAQConfig
    scheduled_step: ScheduledStep | None
    _skeleton: nn.Module
    """Copy without memory of a model under FSDP; a save fills it from the shards."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model for use: packed integers and scales. Checkpoints during training keep the latent weights, and
        those of a plain module how it is quantized."""
        is_checkpoint = _internal_call and output_dir is not None
        self._save_one(output_dir, _internal_call, is_checkpoint)
        if is_checkpoint and self.args.should_save:
            store_quantizers(self.accelerator.unwrap_model(self.model), str(output_dir))

    def _save_one(self, output_dir: str | None, _internal_call: bool, is_checkpoint: bool) -> None:
        quantized = any(isinstance(m, QuantizedLayer) and m.weight_quantizer for m in self.model.modules())
        # Leave a checkpoint in shards to `Trainer`: the shards are in files of their own, next to the optimizer's.
        in_shards = self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if is_checkpoint and (in_shards or not self.is_fsdp_enabled) or not (quantized or self.is_fsdp_enabled):
            super().save_model(output_dir, _internal_call)
            config: Any = getattr(self.model, "config", None)
            if in_shards and is_checkpoint and self.args.should_save and hasattr(config, "save_pretrained"):
                config.save_pretrained(output_dir)  # a run that goes on compares its settings with it
            return
        if self.is_fsdp_enabled:
            model = gathered(self.accelerator, self.model, self._skeleton)
        else:
            model = self.accelerator.unwrap_model(self.model)
        if quantized and not is_checkpoint and self.args.should_save:
            model = pack(model)
        with self._saving(model):
            super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:  # push after the model in training is back
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as `Trainer` does, but keep what was saved there before until all that replaces it is written."""
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with staged(output_dir or str(self.args.output_dir)) as directory:
            super()._save(str(directory), state_dict)

    @contextmanager
    def _saving(self, model: nn.Module) -> Iterator[None]:
        """Let `Trainer` save `model` inside the block, in place of the model in training."""
        trained, sharded = self.model, self.is_fsdp_enabled
        self.model, self.is_fsdp_enabled = model, False
        try:
            yield
        finally:
            self.model, self.is_fsdp_enabled = trained, sharded

    # Training checkpoints ----------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as `Trainer` does. First make an earlier checkpoint of the same step count as incomplete."""
        if self.args.should_save:
            directory = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (Path(self._get_output_dir(trial=trial)) / directory / STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save as `Trainer` does, and next to it what the schedule remembers and how it is set."""
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            save_settings(self.saq_config, self.scheduled_step, output_dir)
        if self.scheduled_step is not None:
            save_schedule(self.scheduled_step, output_dir, self.args.process_index, self.args.world_size)

    # Resuming ----------------------------------------------------------------------------------------------------

    def complete_checkpoint(self, asked: str | bool) -> str:
        """Return the checkpoint to resume from: the one that is named, or for `True` the newest complete one.

        Raises:
            ValueError: If it is not complete, or there is none.
        """
        if asked is True:
            found = last_complete_checkpoint(str(self.args.output_dir))
            if found is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir!r} holds no complete checkpoint. Name a "
                    "checkpoint directory, or train from the start."
                )
            return found
        missing = what_is_missing(str(asked))
        if missing is not None:
            raise ValueError(
                f"resume_from_checkpoint={str(asked)!r}: {missing}. Pass True to use the newest complete checkpoint."
            )
        return str(asked)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise ValueError(
                f"{checkpoint}: its optimizer has other groups of parameters than that of this run ({error}). Resume "
                "with the optimizer, the frozen parameters and the SAQConfig.scale_lr_ratio that wrote it: 1 makes no "
                "groups for step sizes of quantizers."
            ) from error
        if checkpoint is not None and self.scheduled_step is not None:
            load_schedule(self.scheduled_step, checkpoint, self.args.process_index, self.args.world_size)
        if checkpoint is not None and self.is_world_process_zero():
            tell_of_other_settings(self.saq_config, self.scheduled_step, checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load a checkpoint exactly, by the names on disk.

        `Trainer` takes the names on disk for names of the module and skips what does not match. That would drop the
        weights of ViT, Swin and others, whose names on disk differ.
        """
        target = self.model if model is None else model
        plain = self.accelerator.unwrap_model(target)
        if self._has_files_of_another_kind(plain):
            if self.is_fsdp_enabled and stored_quantization(resume_from_checkpoint):
                _check_same_layers(plain, resume_from_checkpoint)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        go_on_from(plain, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        plain = self.accelerator.unwrap_model(self.model)
        if self._has_files_of_another_kind(plain):
            super()._load_best_model()
            return
        logger.info("Loading best model from %s.", self.state.best_model_checkpoint)
        go_on_from(plain, str(self.state.best_model_checkpoint))

    def _has_files_of_another_kind(self, model: nn.Module) -> bool:
        """Tell whether checkpoints are shards or adapters, which `Trainer` and peft load themselves."""
        is_adapted = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
        return self.is_fsdp_enabled or is_adapted


def go_on_from(model: nn.Module, checkpoint: str) -> None:
    """Bring `model` to the state saved in `checkpoint`; raises `ValueError` where it is not a state of this model."""
    model = getattr(model, "_orig_mod", model)  # names on disk are those without `torch.compile`
    leave_in_float(model, _quantized_in_vain(model, checkpoint), NEVER_RUN)
    load_exactly(model, checkpoint)


def _quantized_in_vain(model: nn.Module, checkpoint: str) -> list[str]:
    """Name the layers of `model` that are in float in `checkpoint`; raise `ValueError` where anything else differs."""
    idle = check_same_quantization(model, checkpoint)
    quantized = {name for name, m in model.named_modules() if isinstance(m, HoldsQuantizers) and m.own_quantizers()}
    return [name for name in idle if name in quantized]


def _check_same_layers(model: nn.Module, checkpoint: str) -> None:
    """Raise `ValueError` unless `model`, which is in shards already, has the very layers of `checkpoint`."""
    names = _quantized_in_vain(model, checkpoint)
    if names:
        raise ValueError(
            f"{checkpoint} has {', '.join(names)} in float, because {NEVER_RUN}, but this {type(model).__name__} "
            "quantizes them, and FSDP has sharded it. Quantize it with them in modules_to_not_convert."
        )

"""`SAQTrainer`: `transformers.Trainer` with the sharpness-aware second pass."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..analysis.cost import cost
from ..config import SAQConfig, SAQQuantizationConfig
from ..conversion.calibration import NEVER_RUN, calibrate, needs_calibration
from ..conversion.forms import is_packed, pack
from ..conversion.swapping import leave_in_float, quantize
from ..hub.publishing_trainer import PublishingTrainer
from ..layers import HoldsQuantizers, QuantizedLayer
from ..sharpness.default_radius import default_rho
from ..sharpness.minimizer import SharpnessAwareMinimizer
from ..sharpness.random_state import RNGState
from ..sharpness.schedules.partial_batch import batch_size
from ..sharpness.schedules.step import ScheduledStep
from ..storage.staging import staged
from .checkpoints import STATE_FILE, last_complete_checkpoint, what_is_missing
from .parameter_groups import quantizer_parameters, split_off_scales
from .schedule_state import load_schedule, save_schedule

logger = logging.getLogger(__name__)

CALIBRATION_BATCHES = 4


class SAQTrainer(PublishingTrainer):
    """Trains a quantized image classifier with Sharpness-Aware Quantization (arXiv:2111.12273).

    Everything else is [`transformers.Trainer`]: the same arguments, callbacks, evaluation, checkpoints and Hub push.
    A step in full runs forward and backward twice, and the loss that is logged is the one of the first pass, at the
    quantized weights; with `ascent_fraction` of the samples that it saw. A step of one perturbed pass (`reuse` of
    "stale" or "previous") has the perturbed loss only, and logs that. Logs also carry `sharpness` (mean of perturbed
    minus clean loss since the last log, where both are of the same images), `ascent_norm` (mean norm of the gradients
    that perturbations were made from), `skipped_perturbations` (count so far) and, with `trigger`, `perturbed_share`
    (of the steps since the last log). The first line of a run that calibrates also has `bit_operations` (for one
    image) and `weight_bytes`, see [`cost`].

    Args:
        model: A quantized model, or a float one together with `quantization_config`. Activation ranges that are still
            missing are calibrated from the first training batches when `train` starts.
        args: Training arguments.
        saq_config: How to perturb. `SAQConfig(case=None)` is plain quantization-aware training. Default `SAQConfig()`.
        quantization_config: If given, `model` is float and is quantized in place.
        **kwargs: Those of [`transformers.Trainer`].

    Raises:
        ValueError: If the model is packed (it has no weights to train), if it has no quantized layer although a
            perturbation of weights is asked for, or if the training set-up cannot work with two passes.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        saq_config: SAQConfig | None = None,
        quantization_config: SAQQuantizationConfig | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("model_init") is not None:
            raise ValueError("SAQTrainer: model_init is not supported; pass a model, one trainer for each trial.")
        if model is None:
            raise ValueError("SAQTrainer: model is None; pass a quantized model, or a float one and a configuration.")
        if quantization_config is not None:
            model = quantize(model, quantization_config)
        if is_packed(model):
            raise ValueError(
                f"{type(model).__name__} holds packed integers, which cannot be trained. Load a checkpoint in float "
                "storage, as training leaves them in `checkpoint-N`."
            )
        self.saq_config = saq_config or SAQConfig()
        if self.saq_config.case is not None and not any(isinstance(m, QuantizedLayer) for m in model.modules()):
            if "other" not in self.saq_config.perturb:
                raise ValueError(
                    f"{type(model).__name__} has no quantized layer. Pass quantization_config="
                    "SAQQuantizationConfig(...), or load it with from_pretrained(..., quantization_config=...)."
                )
        super().__init__(model=model, args=args, **kwargs)
        self.args: TrainingArguments
        self.model: nn.Module
        if self.args.n_gpu > 1:
            raise ValueError(
                f"SAQTrainer: {self.args.n_gpu} GPUs in one process would use nn.DataParallel, which cannot take the "
                "second pass. Start one process for each GPU: `torchrun --nproc_per_node=N` or `accelerate launch`."
            )
        if self.is_deepspeed_enabled and self.saq_config.case is not None:
            raise ValueError(
                "SAQTrainer: DeepSpeed steps inside backward, so a second pass cannot be put before the step. Use DDP "
                "or FSDP2, or SAQConfig(case=None)."
            )
        if self.is_fsdp_enabled:
            self._check_fsdp()
            self._skeleton = _on_meta(self.model)
        self._mend_loss_scaling()
        self.minimizer: SharpnessAwareMinimizer | None = None
        self.scheduled_step: ScheduledStep | None = None
        if self.saq_config.case is not None:
            if self.saq_config.rho is None:
                self.saq_config = copy.copy(self.saq_config)
                self.saq_config.rho, family = default_rho(self.model)
                logger.warning(
                    "SAQConfig.rho is not set; using rho=%g, the default for %s models.", self.saq_config.rho, family
                )
            self.minimizer = SharpnessAwareMinimizer(
                self.model,
                rho=self.saq_config.rho,
                case=self.saq_config.case,  # type: ignore[arg-type]
                adaptive=self.saq_config.adaptive,
                eta=self.saq_config.eta,
                perturb=self.saq_config.perturb,
                sync=self.saq_config.sync,
            )
            schedule = self.saq_config.perturbation_schedule()
            self.scheduled_step = ScheduledStep(self.minimizer, schedule, self._loss_scale)
        self._step_batches: list[Any] = []
        self._micro_batch = 0  # how many of them are done
        self._sharpness: list[Tensor] = []
        self._ascent_norms: list[float] = []
        self._perturbed_steps: list[bool] = []  # which of the steps that the trigger decided on
        self._cost_logs: dict[str, float] = {}  # of a model calibrated here, for the first line of its log

    # The sharpness-aware step ----------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch: gradients at the perturbed quantized weights, as far as the schedule asks for them.

        Returns:
            The clean loss; of a step of one perturbed pass, the perturbed one.
        """
        plain_step = super().training_step
        if self.scheduled_step is None:
            return plain_step(model, inputs, num_items_in_batch)

        def backward(batch: dict[str, Any], reduce: bool = True) -> Tensor:
            items: Any = num_items_in_batch
            if items is not None and self.saq_config.ascent_fraction != 1:  # counted in the whole batch
                items = items * batch_size(batch) / batch_size(inputs)
            with nullcontext() if reduce else self.accelerator.no_sync(model=model):
                return plain_step(model, copy.copy(batch), items)

        batches, k = self._step_batches or [inputs], self._micro_batch
        self._micro_batch = (k + 1) % len(batches)
        outcome = self.scheduled_step.micro_batch(k, batches, backward, self.state.global_step, self.state.max_steps)
        # Losses come divided by the number of micro-batches; logs are per image.
        self._sharpness += [difference * len(batches) for difference in outcome.sharpness]
        if outcome.ascent_norm is not None:
            self._ascent_norms.append(outcome.ascent_norm)
        if self.saq_config.trigger and self._micro_batch == 0:
            self._perturbed_steps.append(outcome.ascent_norm is not None)
        return outcome.loss

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """All micro-batches of the coming optimizer step, kept: a schedule may need them together."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        # A callback may have stopped the previous step half-way.
        self._step_batches, self._micro_batch = list(batches) if self.scheduled_step is not None else [], 0
        return batches, num_items

    def _loss_scale(self) -> float:
        scaler = getattr(self.accelerator, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def _mend_loss_scaling(self) -> None:
        """`Trainer` takes a `**kwargs` in `forward` as a promise to use `num_items_in_batch` in the loss. Image
        classifiers do not keep it, and gradients come out `gradient_accumulation_steps` times too large."""
        if getattr(self.accelerator.unwrap_model(self.model), "accepts_loss_kwargs", None) is None:
            self.model_accepts_loss_kwargs = False

    def _check_fsdp(self) -> None:
        """Raise where FSDP cannot do what is asked for, before it shards anything."""
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2 and self.saq_config.case is not None:
            raise ValueError(
                "SAQTrainer: FSDP version 1 hides the parameters of a layer in one flat tensor. Set fsdp_version: 2 "
                'in the accelerate config, or "version": 2 in fsdp_config.'
            )
        if plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "SAQTrainer: FSDP's cpu_ram_efficient_loading leaves quantizers uncalibrated on all processes but the "
                "first, and accelerate cannot broadcast their buffers. Set fsdp_cpu_ram_efficient_loading: false."
            )
        if self.args.save_on_each_node:
            raise ValueError("SAQTrainer: under FSDP only the first process holds the model; unset save_on_each_node.")
        if self.saq_config.case is not None and (
            self.saq_config.trigger or self.saq_config.reuse in ("previous", "look")
        ):
            raise ValueError(
                f"SAQTrainer: SAQConfig({self.saq_config.perturbation_schedule().kind}) under FSDP2, where gradients "
                'exist only averaged over processes and in shards. Use interval, ascent_fraction or reuse="stale".'
            )
        if self.saq_config.case in (1, 2) and self.saq_config.sync == "local":
            raise ValueError(
                f'SAQTrainer: SAQConfig(case={self.saq_config.case}, sync="local") under FSDP2, where gradients of '
                'latent weights exist only averaged over processes. Set sync="global", or case=3.'
            )

    # Calibration -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Calibrate what is not calibrated yet, then train as [`transformers.Trainer.train`].

        Args:
            resume_from_checkpoint: A checkpoint directory, or `True` for the newest one in `output_dir` whose save was
                finished: one that a killed run left half-written is passed over.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = self._complete_checkpoint(resume_from_checkpoint)
        else:
            self.calibrate_if_needed()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _complete_checkpoint(self, asked: str | bool) -> str:
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

    def calibrate_if_needed(self) -> None:
        """Fit missing activation ranges to the first batches of the training data, alike on every process."""
        if not needs_calibration(self.model):
            return
        if self.train_dataset is None:
            raise ValueError("SAQTrainer: the model is not calibrated and there is no train_dataset to do it with.")
        with unchanged_rng():
            batches = list(self._calibration_batches())
            calibrate(self.model, batches)
            image = {name: value[:1] if isinstance(value, Tensor) else value for name, value in batches[0].items()}
            found = cost(self.model, image)
        logger.info("For the first training image:\n%s", found)
        self._cost_logs = {"bit_operations": found.bops, "weight_bytes": found.weight_bytes}

    def _calibration_batches(self) -> Iterator[dict[str, Any]]:
        """Plain, unsharded batches: every process must see the same ones."""
        dataset: Any = self.train_dataset
        generator = torch.Generator().manual_seed(self.args.data_seed or self.args.seed)
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            shuffle=not isinstance(dataset, IterableDataset),
            generator=generator,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="calibration"),
        )
        for batch in itertools.islice(loader, CALIBRATION_BATCHES):
            yield {name: value for name, value in self._prepare_inputs(batch).items() if name not in self.label_names}

    # Logs ------------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the quantities of the perturbation to training logs."""
        if "loss" in logs:
            logs = {**logs, **self._cost_logs, **self._perturbation_logs()}
            self._cost_logs = {}
        super().log(logs, start_time)

    def _perturbation_logs(self) -> dict[str, float]:
        """Means over processes; which quantities there are is alike on every process, as schedules are."""
        if self.minimizer is None:
            return {}
        found: dict[str, float | Tensor] = {}
        if self._sharpness:
            found["sharpness"] = torch.stack(self._sharpness).mean()
        if self._ascent_norms:
            found["ascent_norm"] = sum(self._ascent_norms) / len(self._ascent_norms)
            found["skipped_perturbations"] = float(self.minimizer.skipped)
        if self._perturbed_steps:
            found["perturbed_share"] = sum(self._perturbed_steps) / len(self._perturbed_steps)
        self._sharpness, self._ascent_norms, self._perturbed_steps = [], [], []
        if not found:
            return {}
        values = torch.stack(
            [torch.as_tensor(v, device=self.accelerator.device, dtype=torch.float32) for v in found.values()]
        )
        means = self.accelerator.gather(values[None]).mean(dim=0).tolist()
        return {name: round(mean, 6) for name, mean in zip(found, means, strict=True)}

    # Optimizer -------------------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As in `Trainer`, less the values of quantizers: decaying a step size would shrink the grid."""
        owned = quantizer_parameters(model)
        without_decay = {name for name, p in model.named_parameters() if p in owned}
        return [name for name in super().get_decay_parameter_names(model) if name not in without_decay]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `Trainer`, with the values of quantizers in a parameter group of their own learning rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.saq_config.scale_lr_ratio != 1:
            groups = split_off_scales(optimizer.param_groups, model or self.model, self.saq_config.scale_lr_ratio)
            for group in groups:
                optimizer.add_param_group(group)
        return optimizer

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model for use: packed integers and scales. Checkpoints during training keep the latent weights."""
        is_checkpoint = _internal_call and output_dir is not None
        quantized = any(isinstance(m, QuantizedLayer) and m.weight_quantizer for m in self.model.modules())
        # A checkpoint in shards has them in files of their own, next to the optimizer's.
        in_shards = self.is_fsdp_enabled and "FULL" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        if is_checkpoint and (in_shards or not self.is_fsdp_enabled) or not (quantized or self.is_fsdp_enabled):
            super().save_model(output_dir, _internal_call)
            return
        model = self._gathered_model() if self.is_fsdp_enabled else self.accelerator.unwrap_model(self.model)
        if quantized and not is_checkpoint and self.args.should_save:
            model = pack(model)
        with self._saving(model):
            super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:  # as `Trainer`, with the model in training put back
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in `Trainer`, but what was saved there before stays whole until all that replaces it is written."""
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with staged(output_dir or str(self.args.output_dir)) as directory:
            super()._save(str(directory), state_dict)

    def _gathered_model(self) -> nn.Module:
        """An unsharded copy of the model in CPU memory, with values on the main process only."""
        whole = copy.deepcopy(self._skeleton)
        state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            whole.load_state_dict(state, strict=True, assign=True)
        return whole

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in `Trainer`. If this step was saved before, its checkpoint stops counting as complete at once."""
        if self.args.should_save:
            directory = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (Path(self._get_output_dir(trial=trial)) / directory / STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """As in `Trainer`, and next to it what the schedule must remember."""
        super()._save_rng_state(output_dir)
        if self.scheduled_step is not None:
            save_schedule(self.scheduled_step, output_dir, self.args.process_index, self.args.world_size)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.scheduled_step is not None:
            load_schedule(self.scheduled_step, checkpoint, self.args.process_index, self.args.world_size)

    @contextmanager
    def _saving(self, model: nn.Module) -> Iterator[None]:
        """Let `Trainer` save another model than the one in training."""
        trained, sharded = self.model, self.is_fsdp_enabled
        self.model, self.is_fsdp_enabled = model, False
        try:
            yield
        finally:
            self.model, self.is_fsdp_enabled = trained, sharded

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Resume exactly. `Trainer` reads the file's names as the module's names and skips what does not match, which
        drops the weights of ViT, Swin and others whose names on disk differ; `from_pretrained` knows the mapping."""
        target = self.model if model is None else model
        plain = self.accelerator.unwrap_model(target)
        if self.is_fsdp_enabled or not isinstance(plain, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        _load_exactly(plain, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        plain = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled or not isinstance(plain, PreTrainedModel):
            super()._load_best_model()
            return
        logger.info("Loading best model from %s.", self.state.best_model_checkpoint)
        _load_exactly(plain, str(self.state.best_model_checkpoint))


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters take no memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _load_exactly(model: PreTrainedModel, directory: str) -> None:
    """Put the checkpoint's tensors into `model`; every one must be there and fit."""
    loaded = type(model).from_pretrained(directory, dtype=model.dtype)
    stored = getattr(loaded.config, "quantization_config", None)
    idle = set(getattr(stored, "modules_to_not_convert", None) or ())  # among them those that calibration found idle
    quantized = {name for name, m in model.named_modules() if isinstance(m, HoldsQuantizers) and name in idle}
    leave_in_float(model, sorted(quantized), NEVER_RUN)
    model.load_state_dict(loaded.state_dict(), strict=True)


@contextmanager
def unchanged_rng() -> Iterator[None]:
    """Leave the random generators as they were, so that calibrating does not change the training run."""
    state = RNGState()
    try:
        yield
    finally:
        state.restore()

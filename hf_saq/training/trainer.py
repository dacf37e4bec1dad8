"""Train with `SAQTrainer`: `transformers.Trainer` with the sharpness-aware second pass."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import find_executable_batch_size

from ..config import SAQConfig, SAQQuantizationConfig
from ..conversion.forms import is_packed
from ..conversion.swapping import note_replaced_layers, quantize
from ..hub.exporting_trainer import ExportingTrainer
from ..hub.image_processor import SavesImageProcessor
from ..hub.publishing_trainer import PublishingTrainer
from ..hub.run_in_words import TellsInWords
from ..layers import QuantizedLayer
from ..layers.wrapping import refuse_adapters, refuse_compiled_parts
from .analyses import GivesBits, MeasuresSharpness
from .columns import KeepsColumnsOfTransforms
from .distillation import LearnsFromTeacher, check_teacher
from .fsdp import check_fsdp, skeleton_of
from .parameter_groups import quantizer_parameters, split_off_scales, tell_of_another_rate
from .perturbed_steps import PerturbedSteps
from .reestimating_norms import ReestimatesNorms
from .replayed_stream import ReplayedStream
from .saving import SavesAndResumes


class SAQTrainer(
    TellsInWords,
    SavesImageProcessor,
    ExportingTrainer,
    LearnsFromTeacher,
    MeasuresSharpness,
    PerturbedSteps,
    GivesBits,
    ReestimatesNorms,
    SavesAndResumes,
    KeepsColumnsOfTransforms,
    PublishingTrainer,
):
    """Trains a quantized image classifier with Sharpness-Aware Quantization (arXiv:2111.12273).

    Everything else is [`transformers.Trainer`]: the same arguments, callbacks, evaluation, checkpoints and Hub push.
    A step in full runs forward and backward twice, and the `loss` that is logged is the one of the first pass, at the
    quantized weights. A step that sees a whole batch at perturbed weights only (`ascent_fraction`, or `reuse` of
    "stale", "previous" and "echo") logs that as `perturbed_loss`: it is no `loss` to compare with other trainings.
    The mean over a training with such steps is `train_perturbed_loss` in place of `train_loss`.
    Logs also carry `sharpness` (mean of perturbed minus clean loss since the last log, where both are of the same
    images), `ascent_norm` (mean norm of the gradients that perturbations were made from), `skipped_perturbations`
    (count so far), with `match_radius` `radius_factor` (mean factor of `rho`) and, with `trigger`, `perturbed_share`
    (of the steps since the last log). `measured_sharpness` means the same under every schedule and in plain training,
    see `SAQConfig.log_sharpness`. The first line of a run that calibrates also has `bit_operations` (for one image),
    `float_bit_operations` and `weight_bytes`, see [`cost`].

    Args:
        model: A quantized model, or a float one together with `quantization_config`. Activation ranges that are still
            missing are calibrated from the first training batches when `train` starts.
        args: Training arguments.
        saq_config: How to perturb. `SAQConfig(case=None)` is plain quantization-aware training. Default `SAQConfig()`.
        quantization_config: If given, `model` is float and is quantized in place.
        teacher: A float model with the same classes, from whose answers the model learns too (arXiv:1503.02531): one
            more forward pass for each batch. It is moved to the training device and put into evaluation mode; it is
            not changed, and not saved. It must not be the model in training: pass a copy.
        distill_alpha: Weight of the teacher's answers in the loss, 0 (none) to 1 (no labels).
        distill_temperature: Softens the answers of both models, above 0; 1 leaves them as they are.
        *more: Arguments of [`transformers.Trainer`] after `args`, in its order.
        **kwargs: The same arguments by name. Without `processing_class` the image processor of the base model is
            saved, if that is in a directory or in the cache and makes images of the size that the model takes.

    Raises:
        ValueError: If the model is packed (it has no weights to train) or has adapters of peft, if it has no quantized
            layer although a perturbation of weights is asked for, if the training set-up cannot work with two
            passes, or if the teacher is the model itself or has other classes.
        TypeError: If an argument is of another kind, or is given twice.
    """

    _knows_optimizer = False
    """Whether [`create_optimizer`] here has made or seen the optimizer."""
    _ratio_of_groups: float | None = None
    """The `scale_lr_ratio` that it has made the groups of that with."""

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: TrainingArguments | None = None,
        *more: Any,
        saq_config: SAQConfig | None = None,
        quantization_config: SAQQuantizationConfig | None = None,
        teacher: nn.Module | None = None,
        distill_alpha: float = 0.5,
        distill_temperature: float = 1.0,
        **kwargs: Any,
    ):
        kwargs |= _named(more, kwargs)
        _check_types(model, args, saq_config, quantization_config)
        if kwargs.get("model_init") is not None:
            raise ValueError("SAQTrainer: model_init is not supported; pass a model, one trainer for each trial.")
        if model is None:
            raise ValueError("SAQTrainer: model is None; pass a quantized model, or a float one and a configuration.")
        self.saq_config = saq_config or SAQConfig()
        if quantization_config is None:
            self._check_model(model)
        check_teacher(model, teacher, distill_alpha, distill_temperature, kwargs.get("compute_loss_func"))
        super().__init__(model=model, args=args, **kwargs)
        self.args: TrainingArguments
        self.model: nn.Module
        self._check_set_up()
        self.check_bit_budget()
        if quantization_config is not None:  # behind all that may be refused, so that the model is still in float then
            quantize(model, quantization_config)
            self._check_model(model)
        if self.is_fsdp_enabled:
            self._skeleton = skeleton_of(self.model)
        self.prepare_steps()
        self.find_processor()
        self.learn_from(teacher, distill_alpha, distill_temperature)

    def _check_model(self, model: nn.Module) -> None:
        quantized = any(isinstance(m, QuantizedLayer) for m in model.modules())
        if quantized:
            refuse_adapters(model, "SAQTrainer")
            refuse_compiled_parts(model, "SAQTrainer")
            note_replaced_layers(model)
        if is_packed(model):
            raise ValueError(
                f"{type(model).__name__} holds packed integers, which cannot be trained. Load a checkpoint in float "
                "storage, as training leaves them in `checkpoint-N`."
            )
        if self.saq_config.case is not None and not quantized and "other" not in self.saq_config.perturb:
            raise ValueError(
                f"{type(model).__name__} has no quantized layer. Pass quantization_config="
                "SAQQuantizationConfig(...), or load it with from_pretrained(..., quantization_config=...)."
            )

    def _check_set_up(self) -> None:
        """Raise `ValueError` if the way of training cannot work with two passes."""
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
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if self.saq_config.case is not None and (optim.endswith("lomo") or optim.endswith("layerwise")):
            raise ValueError(
                f"SAQTrainer: optim={optim!r} steps inside backward, so a second pass cannot be put before the step. "
                "Use another optimizer, or SAQConfig(case=None)."
            )
        if self.is_fsdp_enabled:
            check_fsdp(self.accelerator, self.args, self.saq_config)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Calibrate what is not calibrated yet, then train as [`transformers.Trainer.train`].

        What is trained, and how, is what `model` and `saq_config` of the trainer are now.

        Args:
            resume_from_checkpoint: A checkpoint directory, or `True` for the newest one in `output_dir` whose save was
                finished; checkpoints that a killed run left half-written do not count.

        Raises:
            ValueError: If that checkpoint is not complete or not of this model, if there are no data to calibrate, or
                if the model or the configuration was changed to what cannot be trained.
        """
        self._check_model(self.model)
        self._check_set_up()
        self.follow_changes()
        if resume_from_checkpoint:
            resume_from_checkpoint = self.complete_checkpoint(resume_from_checkpoint)
            self.take_bits_of(resume_from_checkpoint)
        else:
            # Calibration may meet the same lack of memory as training does, which starts with the size found here.
            prepare = find_executable_batch_size(
                self._calibrate_and_give_bits, self._train_batch_size, self.args.auto_find_batch_size
            )
            prepare()
        if isinstance(self.train_dataset, ReplayedStream):
            self.train_dataset.read_for_good()
        self.tell_before_training()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._step_batches = self._used_batches = []
            self._last_inputs = None  # it would stay on the device

    def _calibrate_and_give_bits(self, batch_size: int) -> None:
        self._train_batch_size = batch_size
        self.calibrate_if_needed()
        self.give_bits()

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Begin a training as `Trainer` does, and forget the steps of an earlier one.

        `Trainer` calls this also for a second `train()`, and when it starts anew because a batch was too large.
        """
        self.start_steps_again()
        return super()._init_training_state(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the parameters that decay, without values of quantizers: decaying a step size would shrink the grid."""
        owned = quantizer_parameters(model)
        without_decay = {name for name, p in model.named_parameters() if p in owned}
        return [name for name in super().get_decay_parameter_names(model) if name not in without_decay]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer as `Trainer` does, with a group for values of quantizers and their learning rate."""
        is_new, self._knows_optimizer = self.optimizer is None, True
        optimizer = super().create_optimizer(model)
        if is_new and self.saq_config.scale_lr_ratio != 1:
            groups = split_off_scales(optimizer.param_groups, model or self.model, self.saq_config.scale_lr_ratio)
            for group in groups:
                optimizer.add_param_group(group)
            self._ratio_of_groups = self.saq_config.scale_lr_ratio
        elif not is_new:
            self._check_own_optimizer(optimizer, model or self.model)
        return optimizer

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare as `Trainer` does, and look at an optimizer that a subclass has made without asking here."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        own: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # without the wrapper of accelerate
        if self.is_fsdp_enabled:  # which has put other parameters into both
            return prepared
        if not self._knows_optimizer:
            self._check_own_optimizer(own, self.model)
        elif self._ratio_of_groups is not None:
            tell_of_another_rate(own.param_groups, self.model, self._ratio_of_groups)
        if self.minimizer is not None:
            known = set(self.model.parameters())
            self.minimizer.outside = [p for group in own.param_groups for p in group["params"] if p not in known]
        return prepared

    def _check_own_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Warn if an optimizer of the caller lacks values of quantizers, or treats them as weights."""
        scales = {p for p in quantizer_parameters(model) if p.requires_grad}
        groups = optimizer.param_groups
        unseen = scales.difference(*(group["params"] for group in groups))
        decayed = [group for group in groups if group.get("weight_decay") and not scales.isdisjoint(group["params"])]
        mixed = [g for g in groups if not scales.isdisjoint(g["params"]) and not scales.issuperset(g["params"])]
        advice = "Build it after quantization from `hf_saq.parameter_groups(model, learning_rate, weight_decay)`."
        if unseen:
            warnings.warn(
                f"SAQTrainer: the caller's optimizer does not have {len(unseen)} of {len(scales)} step sizes, clips "
                f"and offsets of quantizers: they will stay as they are. {advice}",
                stacklevel=2,
            )
        if decayed or (mixed and self.saq_config.scale_lr_ratio != 1):
            warnings.warn(
                "SAQTrainer: the caller's optimizer treats step sizes of quantizers as weights: SAQConfig."
                f"scale_lr_ratio={self.saq_config.scale_lr_ratio:g} is not applied to it, and {len(decayed)} of its "
                f"groups decay them, which shrinks their grid. {advice}",
                stacklevel=2,
            )


def _check_types(model: Any, args: Any, saq_config: Any, quantization_config: Any) -> None:
    """Raise `TypeError` if one of these arguments is of another type."""
    expected = {
        "model": (model, nn.Module, "a model, for example of from_pretrained"),
        "args": (args, TrainingArguments, "TrainingArguments"),
        "saq_config": (saq_config, SAQConfig, "a SAQConfig, as in SAQConfig(rho=0.1)"),
        "quantization_config": (quantization_config, SAQQuantizationConfig, "a SAQQuantizationConfig"),
    }
    for name, (value, kind, what) in expected.items():
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"SAQTrainer: {name} is a {type(value).__name__}; expected {what}.")


def _named(more: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name arguments that were given by position, as `Trainer` takes them: a collator, data sets and so on."""
    names = list(inspect.signature(Trainer.__init__).parameters)[3:]
    named = dict(zip(names, more, strict=False))
    twice = sorted(named.keys() & kwargs.keys())
    if len(more) > len(names) or twice:
        found = f"{twice[0]} is given twice" if twice else f"{len(more) + 2} arguments are given by position"
        raise TypeError(f"SAQTrainer: {found}; expected model, args, then {', '.join(names)}, each once.")
    for argument, kind in (("saq_config", SAQConfig), ("quantization_config", SAQQuantizationConfig)):
        if misplaced := [name for name in kwargs if name not in names and name in {f.name for f in fields(kind)}]:
            raise TypeError(
                f"SAQTrainer: {misplaced[0]} is no argument of a trainer; expected it as "
                f"{argument}={kind.__name__}({misplaced[0]}=...)."
            )
    return named

"""Let a float model teach in `SAQTrainer`.

The teacher costs one forward pass for each micro-batch, whatever the schedule of perturbations: all passes of a
sharpness-aware step learn from the same answers, to the images as they are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from ...conversion.observing import check_keys
from .distillation_loss import check_distillation, check_labels, distillation_loss

TEACHER_LOGITS = "teacher_logits"
"""Key in a training batch. Schedules that take a part of a batch, or come back to it, take these rows along."""


class LearnsFromTeacher(Trainer):
    """Adds to [`SAQTrainer`] that the training loss is [`distillation_loss`]. Evaluation keeps that on labels alone.

    A DeiT with two heads is trained as its authors do (arXiv:2012.12877): the class head learns the labels, the
    distillation head learns the teacher. Their mean is evaluated.

    Attributes:
        teacher: The float model that is learnt from; `None` without distillation.
        distill_alpha, distill_temperature: As in [`distillation_loss`].
    """

    model: nn.Module
    sample_names: set[str]
    check_inputs: Callable[[Mapping[str, Any]], None]
    teacher: nn.Module | None = None
    distill_alpha: float
    distill_temperature: float
    _instead_of_step: Callable[[Any], None] | None
    _was_heard = False
    """Whether a loss had the teacher's answers in it."""
    _keys_of_teacher: frozenset[str] = frozenset()
    """Keys of the batch that was compared with the teacher last."""

    def learn_from(self, teacher: nn.Module | None, alpha: float, temperature: float) -> None:
        """Take a teacher that was checked, once device and steps are there; with an `alpha` of 0 it is left alone."""
        if teacher is None or alpha == 0:
            return
        self.teacher = teacher.to(self.args.device).eval()
        self.distill_alpha, self.distill_temperature = alpha, temperature
        self.sample_names.add(TEACHER_LOGITS)
        # The loss is a mean over the micro-batch, which `Trainer` is to divide by their number.
        self.model_accepts_loss_kwargs = False
        if self.args.label_names is None:
            self.label_names = ["labels"]  # `forward` of a DeiT with two heads does not name them

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch with the teacher's answers to what a subclass has made of it; all passes use them."""
        if self.teacher is None or self._instead_of_step is not None:
            return super().training_step(model, inputs, *args, **kwargs)
        loss = super().training_step(model, {**inputs, TEACHER_LOGITS: self.ask_teacher(inputs)}, *args, **kwargs)
        if not self._was_heard:
            raise RuntimeError(
                f"{type(self).__name__}.compute_loss did not call that of SAQTrainer, which has the teacher's answers "
                "in it: nothing is learned from the teacher. Call super().compute_loss(model, inputs, return_outputs, "
                "num_items_in_batch) in it, or leave teacher out."
            )
        return loss

    @torch.no_grad()
    def ask_teacher(self, batch: dict[str, Any]) -> Tensor:
        """Compute the teacher's logits, `(N, classes)`, for the same augmented images that the student sees."""
        assert self.teacher is not None
        inputs = {name: value for name, value in self._prepare_inputs(batch).items() if name not in self.label_names}
        if inputs.keys() != self._keys_of_teacher:
            check_keys(self.teacher, inputs, "SAQTrainer, for its teacher")
            self._keys_of_teacher = frozenset(inputs)
        self.teacher.eval()  # whoever has it as well may have trained it
        with self.accelerator.autocast():
            return _logits(self.teacher(**inputs))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute the mean over the images of one micro-batch.

        Raises:
            ValueError: If there is a teacher and the batch has no `labels`.
        """
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        if "labels" not in inputs:
            raise ValueError(
                f"SAQTrainer, learning from a teacher: the batch has {sorted(inputs)}; expected `labels` among them, "
                "the classes of the images. Give them this name in the data set or in the collator."
            )
        labels, teacher_logits = inputs.pop("labels"), inputs.pop(TEACHER_LOGITS, None)
        self.check_inputs(inputs)
        if model.training and teacher_logits is None:  # a step that somebody runs by hand
            teacher_logits = self.ask_teacher(inputs)
        outputs = model(**inputs)
        smoothing = self.args.label_smoothing_factor
        if teacher_logits is None:
            loss = F.cross_entropy(_logits(outputs), labels, label_smoothing=smoothing)
        else:
            if not self._was_heard:  # once: on a GPU the host waits for it
                check_labels(labels)
            self._was_heard = True
            class_logits, taught_logits = _heads(outputs)
            loss = distillation_loss(
                class_logits,
                teacher_logits,
                labels,
                self.distill_alpha,
                self.distill_temperature,
                smoothing,
                taught_logits,
            )
        # `Trainer` expects the loss first in a tuple.
        return (loss, outputs if isinstance(outputs, dict) else (loss, *outputs)) if return_outputs else loss


def check_teacher(student: nn.Module, teacher: Any, alpha: float, temperature: float, loss: Any) -> None:
    """Check what a trainer is given to learn from, before anything is changed.

    Args:
        student: The model in training, quantized or still in float.
        loss: The `compute_loss_func` of the trainer.

    Raises:
        ValueError: If a value is out of range, or the teacher is the student or classifies something else.
        TypeError: If the teacher is no module.
    """
    check_distillation(alpha, temperature)
    if teacher is None or alpha == 0:
        return
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"SAQTrainer: teacher is a {type(teacher).__name__}; expected a model.")
    if loss is not None:
        raise ValueError("SAQTrainer: a teacher has a loss of its own; leave compute_loss_func or teacher out.")
    shared = {id(p) for p in student.parameters()}
    if any(id(p) in shared for p in teacher.parameters()):
        raise ValueError("SAQTrainer: teacher and student share parameters; pass a copy of the model.")
    _check_classes(student, teacher)
    for who, model in (("model", student), ("teacher", teacher)):
        problem = getattr(getattr(model, "config", None), "problem_type", None)
        if problem not in (None, "single_label_classification"):
            raise ValueError(
                f"SAQTrainer: the {who} has problem_type={problem!r}, but what is learned from a teacher are its "
                "probabilities of classes that exclude each other. Leave the teacher out."
            )
        if getattr(getattr(model, "config", None), "num_labels", None) == 1:
            raise ValueError(
                f"SAQTrainer: the {who} has one class, for a regression, but what is learned from a teacher are its "
                "probabilities of classes that exclude each other: that of one class is 1. Leave the teacher out."
            )


def _check_classes(student: nn.Module, teacher: nn.Module) -> None:
    """Raise `ValueError` if the configurations tell that the two models do not classify the same, in one order."""
    mine, its = (getattr(model, "config", None) for model in (student, teacher))
    if mine is None or its is None:
        return
    counts = [getattr(config, "num_labels", None) for config in (mine, its)]
    if None in counts:
        return
    if counts[0] != counts[1]:
        raise ValueError(
            f"SAQTrainer: the model has {counts[0]} classes and its teacher {counts[1]}, so that their logits have "
            "other shapes; expected the same classes. Use a teacher that was trained on these labels."
        )
    names = [[str(config.id2label[k]) for k in sorted(config.id2label)] for config in (mine, its)]
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        raise ValueError(
            f"SAQTrainer: the classes of the teacher are those of the model in another order ({names[1][:3]}... and "
            f"{names[0][:3]}...). Use a teacher whose id2label is that of the model."
        )


def _logits(outputs: Any) -> Tensor:
    """Find the logits of a model that was given no labels; it may return them alone or in a tuple."""
    if isinstance(outputs, Tensor):
        return outputs
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


def _heads(outputs: Any) -> tuple[Tensor, Tensor]:
    """Find the logits that learn labels and those that learn from the teacher: the same unless there are two heads."""
    if isinstance(outputs, dict) and "distillation_logits" in outputs:
        return outputs["cls_logits"], outputs["distillation_logits"]
    return _logits(outputs), _logits(outputs)

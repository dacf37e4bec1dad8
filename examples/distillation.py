"""Knowledge distillation (Hinton et al., arXiv:1503.02531): a quantized model also learns what its float self answers.

The teacher is the float model that quantization starts from. It costs one forward pass for each micro-batch, whatever
the schedule of perturbations: both passes of a sharpness-aware step learn from the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_saq import SAQTrainer

TEACHER_LOGITS = "teacher_logits"
"""Key in a training batch. Schedules that take a part of a batch take these rows along."""


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    temperature: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`(1 - alpha) * cross entropy + alpha * T^2 * KL(teacher || student)`, mean over images.

    `T^2` keeps the gradient of the second term as large as it is at `T = 1` (section 2 of arXiv:1503.02531).

    Args:
        student_logits: `(N, classes)`; half precision is computed with in float32.
        teacher_logits: `(N, classes)`, taken as constant.
        labels: `(N,)` class indices, or `(N, classes)` probabilities.
        alpha: Weight of what the teacher says, 0 to 1; with 0 the teacher is not looked at.
        temperature: Above 0. Both distributions are softened by it in the second term.
        label_smoothing: Of the first term, 0 to 1.

    Returns:
        A scalar.
    """
    check_distillation(alpha, temperature)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student_logits = student_logits.to(dtype)
    hard = F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    if alpha == 0:
        return hard
    return (1 - alpha) * hard + alpha * soft_loss(student_logits, teacher_logits, temperature)


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """`T^2 * KL(softmax(teacher / T) || softmax(student / T))`, mean over images; logits are `(N, classes)`."""
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distillation: the student's logits are {tuple(student_logits.shape)} and the teacher's "
            f"{tuple(teacher_logits.shape)}; expected the same images and classes. Use a teacher with the same labels."
        )
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().to(student.dtype) / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def check_distillation(alpha: float, temperature: float) -> None:
    """Raise `ValueError` for values out of range."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"distill_alpha={alpha!r}; expected a number from 0 (no distillation) to 1 (teacher only).")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"distill_temperature={temperature!r}; expected a finite number above 0.")


class DistillationTrainer(SAQTrainer):
    """A [`SAQTrainer`] whose training loss is [`distillation_loss`]. Evaluation keeps the loss on labels alone.

    A DeiT with two heads is trained as its authors do (arXiv:2012.12877): the class head learns the labels, the
    distillation head learns the teacher. Their mean is evaluated.

    Args:
        teacher: Float model with the same labels. It is moved to the training device and put into evaluation mode;
            its values are never changed. Not the model in training: pass a copy.
        alpha: 0 trains exactly as `SAQTrainer`, and the teacher is not used.
        temperature: See [`distillation_loss`].
        **kwargs: Those of [`SAQTrainer`].
    """

    def __init__(self, *args: Any, teacher: nn.Module, alpha: float, temperature: float, **kwargs: Any):
        check_distillation(alpha, temperature)
        super().__init__(*args, **kwargs)
        self.alpha, self.temperature = alpha, temperature
        self.teacher: nn.Module | None = None
        if alpha == 0:
            return
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("DistillationTrainer: it has a loss of its own; leave compute_loss_func out.")
        shared = {id(p) for p in self.model.parameters()}
        if any(id(p) in shared for p in teacher.parameters()):
            raise ValueError("DistillationTrainer: teacher and student share parameters; pass a copy of the model.")
        self.teacher = teacher.to(self.args.device).eval()
        self.sample_names.add(TEACHER_LOGITS)
        # The loss is a mean over the micro-batch, which `Trainer` is to divide by their number.
        self.model_accepts_loss_kwargs = False
        if self.args.label_names is None:
            self.label_names = ["labels"]  # `forward` of a DeiT with two heads does not name them

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """All micro-batches of the coming optimizer step, each with the teacher's answers: asked once, used by every
        pass of the step."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.teacher is not None:
            for batch in batches:
                batch[TEACHER_LOGITS] = self.ask_teacher(batch)  # in place: SAQTrainer has kept these very batches
        return batches, num_items

    @torch.no_grad()
    def ask_teacher(self, batch: dict[str, Any]) -> Tensor:
        """`(N, classes)`, for the same augmented images that the student sees."""
        assert self.teacher is not None
        inputs = {name: value for name, value in self._prepare_inputs(batch).items() if name not in self.label_names}
        with self.accelerator.autocast():
            return _logits(self.teacher(**inputs))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean over the images of one micro-batch."""
        if self.teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels, teacher_logits = inputs.pop("labels"), inputs.pop(TEACHER_LOGITS, None)
        if model.training and teacher_logits is None:  # a step that somebody runs by hand
            teacher_logits = self.ask_teacher(inputs)
        outputs = model(**inputs)
        smoothing = self.args.label_smoothing_factor
        if teacher_logits is None:
            loss = F.cross_entropy(_logits(outputs), labels, label_smoothing=smoothing)
        else:
            class_logits, taught_logits = _heads(outputs)
            hard = F.cross_entropy(class_logits, labels, label_smoothing=smoothing)
            loss = (1 - self.alpha) * hard + self.alpha * soft_loss(taught_logits, teacher_logits, self.temperature)
        # `Trainer` expects the loss first in a tuple.
        return (loss, outputs if isinstance(outputs, dict) else (loss, *outputs)) if return_outputs else loss

    def _hyperparameters(self) -> dict[str, Any]:
        """For the model card."""
        found = super()._hyperparameters()
        if self.teacher is None:
            return found
        return {**found, "distill_alpha": self.alpha, "distill_temperature": self.temperature}


def _logits(outputs: Any) -> Tensor:
    """Of a model that was given no labels; it may return a tuple."""
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


def _heads(outputs: Any) -> tuple[Tensor, Tensor]:
    """`(logits that learn labels, logits that learn from the teacher)`; the same ones unless there are two heads."""
    if isinstance(outputs, dict) and "distillation_logits" in outputs:
        return outputs["cls_logits"], outputs["distillation_logits"]
    return _logits(outputs), _logits(outputs)

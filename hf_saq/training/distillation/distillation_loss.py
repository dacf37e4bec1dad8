"""Compute the loss of distillation: what labels say, and what a teacher says."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    temperature: float,
    label_smoothing: float = 0.0,
    taught_logits: Tensor | None = None,
) -> Tensor:
    """Compute `(1 - alpha) * cross entropy + alpha * T^2 * KL(teacher || student)`, mean over images.

    `T^2` keeps the gradient of the second term as large as it is at `T = 1` (section 2 of arXiv:1503.02531).

    Args:
        student_logits: `(N, classes)`; half precision is computed with in float32.
        teacher_logits: `(N, classes)`, taken as constant.
        labels: `(N,)` class indices, or `(N, classes)` probabilities.
        alpha: Weight of what the teacher says, 0 to 1; with 0 the teacher is not looked at.
        temperature: Above 0. Both distributions are softened by it in the second term.
        label_smoothing: Of the first term, 0 to 1.
        taught_logits: `(N, classes)` of a head of its own that learns from the teacher; `None`: the student's.

    Returns:
        A scalar.

    Raises:
        ValueError: If `alpha` or `temperature` is out of range, or the logits have different shapes.
    """
    check_distillation(alpha, temperature)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    hard = F.cross_entropy(student_logits.to(dtype), labels, label_smoothing=label_smoothing)
    if alpha == 0:
        return hard
    taught = student_logits if taught_logits is None else taught_logits
    return (1 - alpha) * hard + alpha * soft_loss(taught.to(dtype), teacher_logits, temperature)


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute `T^2 * KL(softmax(teacher / T) || softmax(student / T))`, mean over images.

    Args:
        student_logits: `(N, classes)`.
        teacher_logits: `(N, classes)`, taken as constant.
        temperature: `T`, above 0.

    Raises:
        ValueError: If the two have different shapes.
    """
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


def check_labels(labels: Tensor) -> None:
    """Raise `ValueError` for labels that are floating-point numbers and no probabilities: those of several classes for
    one image, which cross-entropy takes without a word."""
    if labels.is_floating_point() and labels.ndim > 1:
        sums = labels.sum(dim=1)
        if not torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-2):
            raise ValueError(
                f"distillation: the labels of an image add up to {sums.flatten()[(sums - 1).abs().argmax()]:g}; "
                "expected probabilities, which add up to 1. Of several classes for one image nothing can be learned "
                "from a teacher, which gives probabilities of classes that exclude each other: leave it out."
            )

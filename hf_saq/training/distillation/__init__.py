"""Learn from a float model as well as from labels (Hinton et al., arXiv:1503.02531)."""

from .distillation_loss import check_distillation, distillation_loss, soft_loss
from .teaching import LearnsFromTeacher, check_teacher

__all__ = ["LearnsFromTeacher", "check_distillation", "check_teacher", "distillation_loss", "soft_loss"]

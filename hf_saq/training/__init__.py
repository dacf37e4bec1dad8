"""Train a quantized model: `SAQTrainer`, and the parts of it that your own training loop needs.

Comes in: a model, the two configurations, what `transformers.Trainer` takes. Goes out: trained models, logs, and
checkpoints that a run goes on from exactly. Must not know: the command line.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports
from .parameter_groups import parameter_groups, quantizer_parameters

if TYPE_CHECKING:
    from .checkpoints import last_complete_checkpoint, what_is_missing
    from .distillation import check_distillation, distillation_loss
    from .oscillation_callback import OscillationCallback
    from .trainer import SAQTrainer

# Import lazily: the Trainer takes seconds to import. `parameter_groups` is imported at once: its module has the same
# name.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "checkpoints": ("last_complete_checkpoint", "what_is_missing"),
        "distillation": ("check_distillation", "distillation_loss"),
        "oscillation_callback": ("OscillationCallback",),
        "trainer": ("SAQTrainer",),
    },
)

__all__ = [
    "OscillationCallback",
    "SAQTrainer",
    "check_distillation",
    "distillation_loss",
    "last_complete_checkpoint",
    "parameter_groups",
    "quantizer_parameters",
    "what_is_missing",
]

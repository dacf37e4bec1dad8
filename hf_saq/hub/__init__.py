"""Publish models: one commit for each push, a model card of what was measured, a picture of the training.

Comes in: a `Trainer` at work, or a saved model. Goes out: commits on the Hub; `README.md` and `training_curve.png`
next to a model. Must not know: how perturbations are made; it names those of the `SAQConfig`, in cards and in words.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .card import model_card, write_card
    from .card_facts import CardFacts, ResultRow
    from .publishing_trainer import PublishingTrainer
    from .training_picture import draw_training_curve

# Import lazily: a card needs no Trainer, which takes seconds to import.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "card": ("model_card", "write_card"),
        "card_facts": ("CardFacts", "ResultRow"),
        "publishing_trainer": ("PublishingTrainer",),
        "training_picture": ("draw_training_curve",),
    },
)

__all__ = ["CardFacts", "PublishingTrainer", "ResultRow", "draw_training_curve", "model_card", "write_card"]

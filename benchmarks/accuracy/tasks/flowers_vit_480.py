"""Task: ViT-tiny on Oxford Flowers-102 with 3 bits, trained twice as long as with 4: with fewer steps it underfits."""

from __future__ import annotations

from dataclasses import replace

from . import flowers_vit

STEPS = 480

TASK = replace(
    flowers_vit.TASK,
    title=f"Flowers-102, ViT-tiny, {STEPS} steps",
    description=f"{flowers_vit.TASK.description} Quantized training takes {STEPS} steps.",
    bits=(3,),
    steps=STEPS,
    # Those that the trials of the shorter task at 4 bits left over, for as many trials of every method.
    learning_rates=(2e-4,),
    plain_learning_rates=(2e-4, 3e-4),
    radii=(0.1, 0.2),
    adaptive_radii=(0.3, 1.0),
    tuned_at=None,
)

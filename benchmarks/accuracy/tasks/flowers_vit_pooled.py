"""Task: ViT-tiny on Oxford Flowers-102 with one radius for every method, which the trials of six chose together."""

from __future__ import annotations

from dataclasses import replace

from . import flowers_vit

TASK = replace(
    flowers_vit.TASK,
    title="Flowers-102, ViT-tiny, one radius",
    description=f"{flowers_vit.TASK.description} Every perturbation has the radius that was best in the mean over the "
    "trials of six methods there (docs/protocol.md). Training is in float32.",
    bits=(4,),
    # The rates that plain QAT and SAQ chose there.
    learning_rates=(3e-4,),
    plain_learning_rates=(2e-4,),
    radii=(0.1,),
    adaptive_radii=(1.0,),
    precision="float32",  # bfloat16 is many times slower on CPUs without instructions for it
)

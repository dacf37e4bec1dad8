"""Search for ways to perturb in no more than a pass and an eighth that keep the gain of two on pretrained models.

Comes in: the tasks `flowers` and `flowers-vit-pooled`, their validation images. Goes out: one JSON for each trial, and
docs/cheaper.md. Must not: look at test images. `make cheaper` runs `search`, then `page`.
"""

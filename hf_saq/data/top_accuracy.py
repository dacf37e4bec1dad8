"""Compute top-1 and top-5 accuracy from scores."""

from __future__ import annotations

from typing import Any

import numpy as np


def top_k(scores: Any, labels: Any) -> dict[str, float]:
    """Compute the share of images whose label is the highest score (`top1`) or among the five highest (`top5`).

    Args:
        scores: `(images, classes)`.
        labels: `(images,)`, numbers of classes.

    Returns:
        Shares from 0 to 1. Of equal scores the class that comes first is the higher one. An image with a score that is
        NaN is predicted as no class and counts as a miss.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    best = np.argsort(-scores, axis=-1, kind="stable")[:, :5]
    hits = (best == labels[:, None]) & ~np.isnan(scores).any(axis=-1, keepdims=True)
    return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean())}

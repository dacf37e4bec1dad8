"""Top-1 and top-5 accuracy as an `evaluate.Metric` that needs no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import evaluate

from .top_accuracy import top_k


class TopKAccuracy(evaluate.Metric):
    """Computes the share of images whose label is the highest score (`top1`) or among the five highest
    (`top5`), from 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="predictions: scores (images, classes); references: labels (images,)",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return top_k(predictions, references)


def make_compute_metrics() -> Callable[[Any], dict[str, float]]:
    """Make the `compute_metrics` function of a `Trainer`."""
    metric = TopKAccuracy(keep_in_memory=True)

    def compute_metrics(prediction: Any) -> dict[str, float]:
        # Some models return more than the logits.
        scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return metric.compute(predictions=scores, references=prediction.label_ids)

    return compute_metrics

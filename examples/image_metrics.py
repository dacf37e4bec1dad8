"""Top-1 and top-5 accuracy as an `evaluate.Metric` that needs no download."""

from __future__ import annotations

import datasets
import evaluate
import numpy as np
from transformers import EvalPrediction


class TopKAccuracy(evaluate.Metric):
    """Share of images whose label is the highest score (`top1`) or among the five highest (`top5`), from 0 to 1."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation="",
            inputs_description="predictions: scores (images, classes); references: labels (images,)",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        scores, labels = np.asarray(predictions), np.asarray(references)
        best = np.argsort(-scores, axis=-1, kind="stable")[:, :5]
        hits = best == labels[:, None]
        return {"top1": float(hits[:, 0].mean()), "top5": float(hits.any(axis=1).mean())}


def make_compute_metrics():
    """The `compute_metrics` function of a `Trainer`."""
    metric = TopKAccuracy(keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        # Some models return more than the logits.
        scores = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        return metric.compute(predictions=scores, references=prediction.label_ids)

    return compute_metrics

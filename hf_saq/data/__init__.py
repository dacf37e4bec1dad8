"""Read labelled images as the example scripts and the command line take them: by name, from folders, from tables.

Comes in: a name on the Hub, a directory of image folders or parquet files, or nothing for scikit-learn's handwritten
digits; an image processor. Goes out: splits with the columns `image` and `label`, inputs of a model, accuracy; errors
of one sentence that name the argument. Must not know: models, quantization. Needs `hf-saq[data]`.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .augmentations import AUGMENTATIONS
    from .image_checks import is_a_path
    from .image_data import DataTrainingArguments, load_images, load_split
    from .image_metrics import TopKAccuracy, make_compute_metrics
    from .image_processors import input_size, normalization
    from .image_transforms import (
        TransformedImages,
        UnreadableImageError,
        transforms,
        without_unreadable,
    )
    from .rgb import to_rgb
    from .top_accuracy import top_k

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "image_checks": ("is_a_path",),
        "augmentations": ("AUGMENTATIONS",),
        "image_data": ("DataTrainingArguments", "load_images", "load_split"),
        "image_metrics": ("TopKAccuracy", "make_compute_metrics"),
        "image_processors": ("input_size", "normalization"),
        "image_transforms": (
            "TransformedImages",
            "UnreadableImageError",
            "transforms",
            "without_unreadable",
        ),
        "rgb": ("to_rgb",),
        "top_accuracy": ("top_k",),
    },
)

__all__ = [
    "AUGMENTATIONS",
    "DataTrainingArguments",
    "TopKAccuracy",
    "TransformedImages",
    "UnreadableImageError",
    "input_size",
    "is_a_path",
    "load_images",
    "load_split",
    "make_compute_metrics",
    "normalization",
    "to_rgb",
    "top_k",
    "transforms",
    "without_unreadable",
]

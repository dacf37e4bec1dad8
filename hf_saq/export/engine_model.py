"""Run an exported directory like any model of transformers, on the engine of choice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from ..installing import how_to_install
from ..storage.saved_directory import local_directory
from .engines import RUNNERS
from .extras import check_engine
from .layout import CONFIG_FILE, EXPORT_VERSION, EXPORTED_FILES, RECORD


class ExportedClassifier(nn.Module):
    """Classifies images with an exported graph; takes and returns what a model of transformers does.

    ```python
    model = ExportedClassifier.from_pretrained("exported", engine="openvino")
    pipeline("image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained("exported"))
    ```

    It runs on the CPU, whatever the device of its inputs, and cannot be trained.

    Attributes:
        config: The model's configuration; `None` where the model had none.
        engine (`str`): `"onnxruntime"` or `"openvino"`.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, content: bytes, config: Any, engine: str, threads: int | None = None, exact: bool = False):
        super().__init__()
        check_engine(engine)
        self.config, self.engine = config, engine
        self._arguments = content, config, engine, threads, exact
        self._run = RUNNERS[engine](content, threads, exact)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        engine: str = "onnxruntime",
        threads: int | None = None,
        exact: bool | None = None,
        revision: str | None = None,
    ) -> ExportedClassifier:
        """Load what `export_onnx` wrote.

        Args:
            source: Its directory, or a repository on the Hub, of which nothing but the export is downloaded.
            engine: `"onnxruntime"` or `"openvino"`.
            threads: Threads of the engine; `None` leaves it to the engine.
            exact: Whether ONNX Runtime keeps biases of convolutions in float. It rounds them, which where activations
                have few bits flips the class of some images, for better and for worse; without that it runs these
                convolutions in float, which takes longer. `None`: as the checks of the export found it to be needed.
                OpenVINO never rounds them.
            revision: Branch, tag or commit of the repository.

        Raises:
            ValueError: If there is no such engine, if `source` is no export, or if its graph is not the one that
                was written.
            OSError: If the Hub refuses or cannot be reached.
            ImportError: If the engine is not installed; says which extra installs it.
        """
        check_engine(engine)
        directory = local_directory(str(source), revision, EXPORTED_FILES)
        content, record = _graph_of(directory)
        exact = bool(record.get("exact", False)) if exact is None else exact
        has_model_type = "model_type" in json.loads((directory / CONFIG_FILE).read_text())
        config = AutoConfig.from_pretrained(directory) if has_model_type else None
        return cls(content, config, engine, threads, exact)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[Tensor, ...]:
        """Compute logits `(batch, labels)` of `pixel_values` `(batch, channels, height, width)`.

        Args:
            labels: Numbers of classes `(batch,)`, or what else the `problem_type` of the configuration wants; with
                them the output has a `loss`, that of classifiers of transformers.
            return_dict: Whether to return an output with names, not a tuple; by default as the configuration says.

        Raises:
            ValueError: If a value is NaN, which integers cannot hold, the engine takes no inputs of that shape, or
                there are labels and no configuration that says which loss they are for.
        """
        if labels is not None and self.config is None:
            raise ValueError("ExportedClassifier: labels without a configuration; expected none. Compute the loss.")
        images = pixel_values.detach().float().cpu().numpy()
        if np.isnan(images).any():
            raise ValueError(
                "ExportedClassifier: pixel_values has NaN, which would count as some pixel; expected numbers."
            )
        try:
            logits = self._run(images)
        except Exception as error:
            raise ValueError(
                f"ExportedClassifier: {self.engine} failed on pixel_values of shape {tuple(images.shape)}; expected "
                f"the height and width that the model was exported for: {' '.join(str(error).split())}"
            ) from error
        scores = torch.from_numpy(np.array(logits))
        loss = None if labels is None else ForSequenceClassificationLoss(labels, scores, self.config)
        output = ImageClassifierOutput(loss=loss, logits=scores)
        has_names = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if has_names else output.to_tuple()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the graph, from which a session of the engine is made anew: it cannot leave its process."""
        return type(self), self._arguments

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def can_generate(self) -> bool:
        return False


# What `pipeline` looks names of classes up in, before it warns.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.setdefault(RECORD, ExportedClassifier.__name__)


def _graph_of(directory: Path) -> tuple[bytes, dict[str, Any]]:
    """Read the graph of an export, check that it is the one that was written, and return it with what was recorded."""
    if not (directory / CONFIG_FILE).is_file():
        raise ValueError(f"{directory} has no {CONFIG_FILE}; expected a directory that `export_onnx` wrote.")
    try:
        record = json.loads((directory / CONFIG_FILE).read_text()).get(RECORD)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{directory / CONFIG_FILE} is damaged ({error}); export the model again.") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{directory / CONFIG_FILE} has no {RECORD!r}; expected a directory that `export_onnx` wrote. A saved "
            "model of hf_saq is loaded with `AutoModelForImageClassification.from_pretrained`."
        )
    if record.get("format_version") != EXPORT_VERSION:
        raise ValueError(
            f"{directory / CONFIG_FILE}: {RECORD}.format_version is {record.get('format_version')!r}, but this hf_saq "
            f"reads {EXPORT_VERSION}; install a newer hf_saq ({how_to_install()}), or export the model again."
        )
    file = directory / str(record.get("file"))
    if not file.is_file():
        raise ValueError(f"{file} is missing; export the model again.")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != record.get("sha256"):
        raise ValueError(
            f"{file} is not the file that was exported with this {CONFIG_FILE} (its SHA-256 differs): it is damaged "
            "or was replaced. Export the model again."
        )
    return content, record

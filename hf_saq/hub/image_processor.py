"""Save the image processor with a quantized model, without which no pipeline can be made of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor, AutoProcessor, PreTrainedModel, Trainer

from ..layers import HoldsQuantizers
from ..storage.saved_directory import TIMM, has_processor

logger = logging.getLogger(__name__)


class SavesImageProcessor(Trainer):
    """Takes the image processor from the base model where no `processing_class` is given, and warns of saves without.

    Nothing is downloaded for it: the base model is looked for in its directory or in the cache of the Hub.
    """

    model: nn.Module
    _warned_of_no_processor = False

    def find_processor(self) -> None:
        """Take the image processor of the model that this one was made from, if it is here and fits."""
        if self.processing_class is None and self._needs_processor():
            self.processing_class = processor_of_base_model(self.model)
            if self.processing_class is not None:
                logger.info("No processing_class was given; the image processor of the base model will be saved.")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer` does. A model for use that is saved without an image processor is named in a warning."""
        super().save_model(output_dir, _internal_call)
        is_checkpoint = _internal_call and output_dir is not None
        directory = Path(output_dir or str(self.args.output_dir))
        if is_checkpoint or self._warned_of_no_processor or not self.args.should_save or not self._needs_processor():
            return
        if not has_processor(directory):
            self._warned_of_no_processor = True
            base = getattr(self.model.config, "_name_or_path", "") or "the base model"
            logger.warning(
                "%s was saved without an image processor, so that no pipeline can be made of it. Pass "
                "processing_class=processor to the trainer, or call processor.save_pretrained(%r), with the "
                "AutoImageProcessor that prepared the images (that of %s has another image size or is not here).",
                directory,
                str(directory),
                base,
            )

    def _needs_processor(self) -> bool:
        """Tell whether the model is a quantized one of transformers that has its processor in a file of its own."""
        if not isinstance(self.model, PreTrainedModel) or self.model.config.model_type == TIMM:
            return False  # that of timm is in the configuration of the model
        return any(isinstance(module, HoldsQuantizers) for module in self.model.modules())


def processor_of_base_model(model: Any) -> Any:
    """Load the image processor of the model that `model` was made from, without asking the Hub.

    Returns:
        `None` if it is neither in a directory nor in the cache, or makes images of another size than the model takes.
    """
    name = getattr(model.config, "_name_or_path", None)
    if not name:
        return None
    revision = None if Path(name).is_dir() else getattr(model.config, "_commit_hash", None)
    # Take the tokenizer too where the model reads text, as those of pairs do.
    reads_text = getattr(model, "main_input_name", None) == "input_ids"
    for kind in (AutoProcessor, AutoImageProcessor) if reads_text else (AutoImageProcessor,):
        try:
            processor = kind.from_pretrained(name, revision=revision, local_files_only=True)
        except (OSError, ValueError, ImportError):
            continue
        images = getattr(processor, "image_processor", None) if kind is AutoProcessor else processor
        if images is not None and _makes_size_of(images, model):
            return processor
    return None


def _makes_size_of(processor: Any, model: Any) -> bool:
    """Tell whether `processor` makes images of the size that the configuration of `model` names, if it names one."""
    expected = getattr(model.config, "image_size", None)
    size = dict(getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {})
    made = size.get("height", size.get("shortest_edge"))
    if isinstance(expected, (list, tuple)):
        expected = expected[0]
    return expected is None or made is None or int(made) == int(expected)

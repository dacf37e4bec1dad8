"""Let a `Trainer` export its model: the integer graph lies beside the saved model and is published with it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..export.extras import check_engine, installed_engines, needed
from ..export.layout import CONFIG_FILE, MODEL_FILE, RECORD
from ..export.onnx_export import export_onnx
from ..export.report import ExportReport
from ..storage import load_saved, staged
from ..storage.saved_directory import read_json_object
from .publishing_trainer import PublishingTrainer

logger = logging.getLogger(__name__)

EXAMPLES = 8
"""Images of the user's data that an export is verified with."""


class ExportingTrainer(PublishingTrainer):
    """Exports models for [`SAQTrainer`], on request.

    Attributes:
        exported (`ExportReport`): What the last `export_onnx` wrote, as long as it is of the present weights.
    """

    exported: ExportReport | None = None
    _graph: Path | None = None
    _record: Any = None
    """What `config.json` says of the export."""

    def export_onnx(self, directory: str | Path | None = None, **arguments: Any) -> ExportReport | None:
        """Save the model for use and write its integer graph beside it, as [`hf_saq.export.export_onnx`].

        A later `save_model` or `push_to_hub` takes the graph along and the model card describes it, until training
        changes the weights. It is verified with images of `eval_dataset`, or of `train_dataset`, if there are any.

        Args:
            directory: Default: `output_dir`. Files of an earlier export there are replaced.
            **arguments: Those of [`hf_saq.export.export_onnx`] but `model`, `processor` and `overwrite`.

        Returns:
            What was written and verified; `None` on all processes but the first.

        Raises:
            ExportCheckError: If a check fails; the model is saved then, without a graph.
            ValueError: If the model is not a quantized and calibrated one of transformers, or an argument is wrong.
            ImportError: If a library is missing; says which extra installs it.
        """
        engines = arguments.get("engines") or installed_engines()
        for engine in engines:
            check_engine(engine)
        for library in ("onnx", "onnxscript", *engines):
            needed(library)  # before anything is written
        model = self.accelerator.unwrap_model(self.model)
        if not self._is_quantized() or not isinstance(model, PreTrainedModel):
            what = "a plain module" if self._is_quantized() else "not quantized"
            raise ValueError(
                f"SAQTrainer.export_onnx: {type(model).__name__} is {what}; expected a quantized model of "
                "transformers. Others are exported by hf_saq.export.export_onnx(model, directory, example=...)."
            )
        target = Path(directory or str(self.args.output_dir))
        self.exported, self._graph = None, None
        with self._arguments(output_dir=str(target)):
            self.save_model(_internal_call=True)
        report = None
        if self.is_world_process_zero():
            if "example" not in arguments and "image_size" not in arguments:
                arguments["example"] = self._examples(model.main_input_name)
            saved, processor = load_saved(str(target))
            with TemporaryDirectory(prefix="hf_saq-") as made:
                report = export_onnx(saved, made, processor=processor, **arguments)
                record = read_json_object(Path(made) / CONFIG_FILE)[RECORD]
                _put_graph(Path(made) / MODEL_FILE, record, target)
            self.exported, self._graph, self._record = report, target / MODEL_FILE, record
            self.tell_of_export(target, report)
        self.accelerator.wait_for_everyone()
        return report

    def tell_of_export(self, directory: Path, report: ExportReport) -> None:
        """Do nothing; `TellsInWords` prints what was written."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer` does, and put the exported graph of these weights beside a model for use."""
        directory = Path(output_dir or str(self.args.output_dir))
        super().save_model(output_dir, _internal_call)
        is_checkpoint = _internal_call and output_dir is not None
        if is_checkpoint or not self.args.should_save:
            return
        if self.exported is not None and self._graph is not None and not self._graph.is_file():
            logger.warning("%s is not there any more; the model is saved without its export.", self._graph)
            self.exported, self._graph = None, None
        if self._graph is not None:
            _put_graph(self._graph, self._record, directory)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as `Trainer` does; remove the graph of an earlier export there, which would pass for these weights."""
        directory = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:  # read no file that another process is writing
            super()._save(output_dir, state_dict)
            return
        had_graph = _has_record(directory)
        super()._save(output_dir, state_dict)
        is_present = self._graph is not None and self._graph.resolve() == (directory / MODEL_FILE).resolve()
        if had_graph and not is_present:
            (directory / MODEL_FILE).unlink(missing_ok=True)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Take batches as `Trainer` does, and forget the export: the optimizer step will change the weights."""
        self.exported, self._graph = None, None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _examples(self, name: str) -> Tensor | None:
        """Make a batch of the first images to evaluate with, or to train with; `None` where that does not work."""
        datasets = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
        for dataset in (*datasets.values(), self.train_dataset):
            if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset):
                batch = self.data_collator([dataset[i] for i in range(min(EXAMPLES, len(dataset)))])
                images = batch.get(name) if isinstance(batch, Mapping) else None
                if isinstance(images, Tensor) and images.is_floating_point():
                    return images
        return None


def _put_graph(graph: Path, record: Any, directory: Path) -> None:
    """Put the file `graph` beside the model in `directory`, and what it is into the `config.json` there."""
    fields = read_json_object(directory / CONFIG_FILE)
    fields[RECORD] = record
    with staged(directory) as stage:
        if graph.resolve() != (directory / MODEL_FILE).resolve():
            (stage / MODEL_FILE).parent.mkdir(parents=True)
            shutil.copy2(graph, stage / MODEL_FILE)
        (stage / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _has_record(directory: Path) -> bool:
    """Tell whether the model in `directory` may have an exported graph: its `config.json` says so, or is damaged."""
    file = directory / CONFIG_FILE
    try:
        return file.is_file() and RECORD in read_json_object(file)
    except ValueError:  # a killed save left it; this save replaces it
        return True

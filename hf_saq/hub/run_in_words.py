"""Say in words what a run is about to do, and what it left where."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from ..config import SAQConfig
from ..conversion import float_parameters
from ..conversion.report import ConversionReport, LayerPlan
from ..export.extras import EXTRA_OF
from ..export.report import ExportReport
from ..installing import how_to_install
from ..storage.weight_files import weight_file_bytes
from ..tables import bits_name, kibibytes


class TellsInWords(Trainer):
    """Prints a few lines before training and after a save, on the first process, unless transformers is told to be
    silent (`transformers.utils.logging.set_verbosity_error()`). Models without quantized layers are not talked about.
    """

    saq_config: SAQConfig
    model: nn.Module
    minimizer: Any
    scheduled_step: Any
    measures_sharpness: bool
    distill_alpha: float
    distill_temperature: float
    _cost_logs: dict[str, float]

    def tell_before_training(self) -> None:
        """Print what will be trained, how, at which cost, and what the log will have."""
        report = getattr(self.model, "quantization_report", None)
        if isinstance(report, ConversionReport) and report.converted:
            lines = [_of_layers(self.model, report), self._of_method(), *self._of_teacher()]
            lines += [*self._of_cost(), self._of_log()]
            self._tell("\n".join(lines))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer` does, and print where a model for use lies and what to do with it."""
        super().save_model(output_dir, _internal_call)
        report = getattr(self.model, "quantization_report", None)
        if _internal_call or not isinstance(report, ConversionReport) or not report.converted:
            return
        if not self.is_world_process_zero():  # look at no file that another process is writing
            return
        directory = Path(output_dir or str(self.args.output_dir))
        size = weight_file_bytes(directory)
        if size is None:
            return
        full = 4 * float_parameters(self.model)
        lines = [f"Saved in {directory}: {kibibytes(size)} of packed weights; in float32 they take {kibibytes(full)}."]
        if isinstance(self.model, PreTrainedModel):
            loader = f'{type(self.model).__name__}.from_pretrained("{directory}")'
            lines.append(f"To load it: import hf_saq, then {loader}. To look at it: hf-saq inspect {directory}")
            lines.append(_of_export(directory, getattr(self, "exported", None)))
        if not self.args.push_to_hub:
            lines.append("To publish it with a card of what was measured: trainer.push_to_hub()")
        self._tell("\n".join(lines))

    def tell_of_export(self, directory: Path, report: ExportReport) -> None:
        """Print what an export wrote, what it found out, and how to run it."""
        found = [f"{name}: {text}." for name, text in report.checks.items()]
        self._tell("\n".join([f"Exported for {report.target!r}.", *found, _of_export(directory, report)]))

    def _tell(self, text: str) -> None:
        if self.is_world_process_zero() and logging.get_verbosity() <= logging.WARNING:
            print(text, flush=True)

    def _of_method(self) -> str:
        if self.minimizer is None or self.scheduled_step is None:
            return "Method: plain quantization-aware training (QAT), one forward and backward pass a step."
        case, schedule = self.saq_config.case, self.scheduled_step.schedule
        name = {1: "SAQ case 1", 2: "SAM on the quantized model (case 2)", 3: "SAQ (case 3)"}[case or 3]
        source = "as given" if self.saq_config.rho is not None else "the default of the model family"
        most = "at most " if schedule.trigger else ""
        return (
            f"Method: {name}, radius rho={self.minimizer.rho:g} ({source}), perturbing "
            f"{_listed(self.saq_config.perturb)}; {most}{schedule.cost:.4g} forward and backward passes a step, plain "
            "QAT takes 1."
        )

    def _of_teacher(self) -> list[str]:
        teacher = getattr(self, "teacher", None)
        if teacher is None:
            return []
        return [
            f"Distillation: {self.distill_alpha:.0%} of the loss are the answers of a {type(teacher).__name__} "
            f"(temperature {self.distill_temperature:g}), one more forward pass for each batch."
        ]

    def _of_cost(self) -> list[str]:
        if not self._cost_logs:
            return []
        return [
            f"Cost of one image: {self._cost_logs['bit_operations']:.3g} bit operations; weights will take "
            f"{kibibytes(int(self._cost_logs['weight_bytes']))}."
        ]

    def _of_log(self) -> str:
        logged = ["loss"]
        if self.minimizer is not None:
            logged += ["sharpness (perturbed minus clean loss, where a step has both)", "ascent_norm"]
            logged += ["perturbed_loss (for loss, where a step has the whole batch at perturbed weights only)"]
        if self.measures_sharpness:
            logged += ["measured_sharpness (of one batch, every 50 steps or more)"]
        where: Any = self.args.report_to
        return f"Logged: {_listed(logged)}; to {_listed(where) if where else 'the console'}."


def _of_export(directory: Path, report: ExportReport | None) -> str:
    """Say how to run the model in integers: what is left to do for it, or what has been written."""
    if report is None:
        missing = [name for name in EXTRA_OF if EXTRA_OF[name] == "onnx" and find_spec(name) is None]
        first = f" (first {how_to_install('onnx')})" if missing else ""
        return (
            "To run it in integers (ONNX Runtime, OpenVINO, a browser): trainer.export_onnx(), or hf-saq export "
            f"{directory} OUT{first}"
        )
    return (
        f"To run it in integers: {directory / report.file} ({kibibytes(report.size)}), from hf_saq.export import "
        f'ExportedClassifier, then ExportedClassifier.from_pretrained("{directory}"), or transformers.js'
    )


def _of_layers(model: nn.Module, report: ConversionReport) -> str:
    """Say how many layers have which bits, and why others are in float."""
    kinds = Counter(_bits(layer) for layer in report.converted)
    quantized = _listed([f"{count} at {bits}" for bits, count in kinds.most_common()])
    quantizer = report.converted[0].settings.get("quantizer", "lsq")
    text = (
        f"{type(model).__name__}: {len(report.converted)} of {len(report.layers)} layers are quantized "
        f"({quantizer}), {quantized}"
    )
    if report.first_last_modules:
        text += f"; the first layer and the heads are {_listed(report.first_last_modules)}"
    if report.skipped:
        reasons = Counter(layer.reason or "as configured" for layer in report.skipped)
        text += f"; in float: {_listed([f'{count} ({reason})' for reason, count in reasons.items()])}"
    return text + ". print(model.quantization_report) lists them."


def _bits(layer: LayerPlan) -> str:
    weight, activation = (layer.settings.get(name) for name in ("weight_bits", "activation_bits"))
    return bits_name(weight, activation) if "weight_bits" in layer.settings else f"A{activation or 32}"


def _listed(names: Any) -> str:
    return names if isinstance(names, str) else ", ".join(names)

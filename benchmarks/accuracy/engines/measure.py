"""Top-1 accuracy of exported models on every engine, beside that of hf_saq itself, on CPUs with and without VNNI.

    python -m benchmarks.accuracy.engines.measure     # what `make engine-accuracy` runs; goes on where it stopped

The models are those of the tasks `flowers` (MobileNetV2) and `flowers-vit` (ViT-tiny). On a CPU with VNNI, engines are
made to believe that it has none (`without_vnni.c`, which needs a C compiler); that products then saturate is seen
first. Writes docs/engine_accuracy.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn

from hf_saq.export import ExportCheckError, export_onnx

from ...shared.command_line import parsed
from ...shared.places import FLOWERS, MOBILENET, RESULTS, VIT_TINY
from ...shared.runs import Runs
from ..arguments import AccuracyArguments
from ..task import Data, Paths
from ..tasks import TASKS
from ..training import float_state, images_of
from . import run_graph
from .elsewhere import PLACES, run_elsewhere
from .models import LEARNING_RATES, Quantized, calibration_batches, model_of, quantized_models
from .page import FIRST, MODULE, page
from .probe import saturates

EXAMPLES = 16
"""Training images that an export is verified with."""


@dataclass
class EngineArguments:
    """What to measure. Everything an outcome depends on is stored with it."""

    tasks: list[str] = field(default_factory=lambda: list(LEARNING_RATES), metadata={"help": "Tasks of `accuracy`."})
    steps: int = field(default=128, metadata={"help": "Of training with 4-bit weights."})
    seed: int = field(default=0, metadata={"help": "Of the order of images, their augmentation, and dropout."})
    images: int = field(default=2000, metadata={"help": "How many test images."})
    threads: int = field(default=1, metadata={"help": "Of torch."})
    results: str = field(default=f"{RESULTS}/engine_accuracy", metadata={"help": "Where the JSON results go."})
    document: str = field(default="docs/engine_accuracy.md", metadata={"help": "The page to write."})
    cache: str = field(default="outputs/accuracy", metadata={"help": "Decoded images, float models and exports."})
    flowers: str = field(default=FLOWERS, metadata={"help": "Flowers-102 as parquet files."})
    mobilenet: str = field(default=MOBILENET, metadata={"help": "MobileNetV2 1.0, 224."})
    vit_tiny: str = field(default=VIT_TINY, metadata={"help": "ViT-tiny/16 of transformers, 224."})

    def __post_init__(self) -> None:
        unknown = sorted(set(self.tasks) - set(LEARNING_RATES))
        if unknown:
            raise ValueError(f"--tasks {unknown}: unknown; expected some of {list(LEARNING_RATES)}.")

    def paths(self) -> Paths:
        places = {name: getattr(self, name) for name in ("cache", "flowers", "mobilenet", "vit_tiny")}
        return AccuracyArguments(**places).paths()


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(EngineArguments, argv, MODULE, str(__doc__))
    torch.set_num_threads(args.threads)
    runs, paths = Runs(Path(args.results), command), args.paths()
    for place in PLACES:
        for engine in run_graph.ENGINES:
            runs.once(
                f"saturation-{engine}-{place}",
                {"engine": engine, "place": place},
                partial(saturates, engine, place, scratch(paths)),
            )
    for wanted in quantized_models(args.tasks):
        Comparison(wanted, args, paths, runs).run()
    Path(args.document).write_text(page(Path(args.results)), encoding="utf-8")


class Comparison:
    """One quantized model: hf_saq's own predictions, and those of its exports wherever they run."""

    def __init__(self, wanted: Quantized, args: EngineArguments, paths: Paths, runs: Runs):
        self.wanted, self.args, self.paths, self.runs = wanted, args, paths, runs
        self.directory = scratch(paths) / f"{wanted.name}-{args.steps}-{args.seed}-{args.images}"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.about = {
            "task": wanted.task,
            "quantization": wanted.fields,
            "steps": args.steps,
            "learning_rate": wanted.learning_rate,
            "seed": args.seed,
            "images": args.images,
        }

    def run(self) -> None:
        name = self.wanted.name
        self.runs.once(f"{name}-hf_saq", self.about, self.own)
        self.runs.once(f"{name}-float64", self.about, self.own_in_double)
        for target in ("cpu", "cpu-vnni"):
            # What the other target gets wrong on another CPU shows that the comparison can fail.
            if target == "cpu-vnni" and self.wanted.fields["weight_bits"] < 8:
                continue
            about = {**self.about, "target": target}
            self.runs.once(f"{name}-{target}-export", about, partial(self.export, target))
            for place in PLACES:
                for engine in run_graph.ENGINES:
                    self.runs.once(
                        f"{name}-{target}-{engine}-{place}",
                        {**about, "engine": engine, "place": place},
                        partial(self.predict, target, engine, place),
                    )

    def own(self) -> dict[str, Any]:
        """Accuracy of the float model and of the quantized one, both computed by torch in float32."""
        data, task = images_of(self.wanted.task, self.paths), TASKS[self.wanted.task]
        model = model_of(self.wanted, self.paths, self.args.steps, self.args.seed)
        float_model = task.build().eval()
        float_model.load_state_dict(float_state(self.wanted.task, self.paths, None, 0))
        images, labels = self.test_images(data)
        logits = predicted(model, images)
        np.save(self.directory / "logits.npy", logits)
        np.save(self.directory / "labels.npy", labels)
        return {"top1": top1(logits, labels), "float": top1(predicted(float_model, images), labels)}

    def own_in_double(self) -> dict[str, Any]:
        """Accuracy of the quantized model in float64: what the last bits of float32 decide."""
        labels, own = (np.load(self.directory / f"{name}.npy") for name in ("labels", "logits"))
        model = model_of(self.wanted, self.paths, self.args.steps, self.args.seed)
        images, _ = self.test_images(images_of(self.wanted.task, self.paths))
        return compared(predicted(nn.Module.double(model), images.double()), own, labels)

    def export(self, target: str) -> dict[str, Any]:
        data = images_of(self.wanted.task, self.paths)
        model = model_of(self.wanted, self.paths, self.args.steps, self.args.seed)
        example = calibration_batches(data)[0][:EXAMPLES]
        arguments: dict[str, Any] = {"target": target, "example": example, "overwrite": True}
        refused = ""
        try:
            report = export_onnx(model, self.directory / target, **arguments)
        except ExportCheckError as error:  # measured all the same, and told
            refused = str(error)
            report = export_onnx(model, self.directory / target, check=False, **arguments)
        split = [layer.name for layer in report.layers if layer.notes]
        narrow = export_onnx(model, self.directory / f"{target}-int4", weights="int4", check=False, **arguments)
        found = {
            "bytes": report.size,
            "int4_bytes": narrow.size,
            "layers": len(report.layers),
            "split": split,
            "checks": dict(report.checks),
            "exact": report.exact,
        }
        return {**found, "refused": refused}

    def predict(self, target: str, engine: str, place: str) -> dict[str, Any]:
        """Accuracy of an export in a process of its own."""
        labels, own = (np.load(self.directory / f"{name}.npy") for name in ("labels", "logits"))
        images = self.directory / "images.npy"
        if not images.is_file():
            np.save(images, self.test_images(images_of(self.wanted.task, self.paths))[0].numpy())
        logits = run_elsewhere(engine, place, self.directory / target / "onnx" / "model_quantized.onnx", images)
        return compared(logits, own, labels)

    def test_images(self, data: Data) -> tuple[Tensor, np.ndarray]:
        shown = data.test[slice(0, self.args.images)]
        return data.plain(shown.pixels), shown.labels.numpy()


@torch.no_grad()
def predicted(model: Any, images: Tensor) -> np.ndarray:
    return torch.cat([model.eval()(part).logits for part in images.split(run_graph.BATCH)]).numpy()


def compared(logits: np.ndarray, own: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Compare logits with hf_saq's own: accuracies, the share of equal classes, and the relative difference.

    `margin` is half of a 95 % interval around the difference of the accuracies, from the images' own differences;
    `first` has the accuracies on the first of them alone.
    """
    right, right_own = logits.argmax(1) == labels, own.argmax(1) == labels
    differences = right.astype(float) - right_own
    return {
        "top1": top1(logits, labels),
        "hf_saq": top1(own, labels),
        "margin": float(norm.ppf(0.975) * differences.std() / np.sqrt(len(labels))),
        "same": float((logits.argmax(1) == own.argmax(1)).mean()),
        "difference": float(np.sqrt(np.mean((logits - own) ** 2) / np.mean(own**2))),
        "first": {"top1": float(right[:FIRST].mean()), "hf_saq": float(right_own[:FIRST].mean())},
    }


def top1(logits: np.ndarray, labels: np.ndarray) -> float:
    return float((logits.argmax(1) == labels).mean())


def scratch(paths: Paths) -> Path:
    directory = paths.cache / "engines" / "runs"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


if __name__ == "__main__":
    main()

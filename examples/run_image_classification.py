#!/usr/bin/env python
"""Quantize an image classifier with Sharpness-Aware Quantization and compare it with its float self and plain QAT.

    python examples/run_image_classification.py                     # handwritten digits, a small ViT, 4 and 2 bits
    python examples/run_image_classification.py --help
    python examples/run_image_classification.py my_arguments.yaml   # or .json; further arguments may follow
    python examples/run_image_classification.py examples/recipes/flowers102_vit_base.yaml --rho 0.05
    torchrun --nproc_per_node 8 examples/run_image_classification.py ...
    accelerate launch examples/run_image_classification.py ...

One run: (1) fine-tune the float model, if `--float_epochs` is above zero; (2) from that same model, for every entry of
`--weight_bits` and `--methods`, quantize, calibrate, train, evaluate and save packed; (3) load every packed checkpoint
into a fresh object and evaluate it again; (4) one table.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from distillation import DistillationTrainer, check_distillation
from image_data import DataTrainingArguments, TransformedImages, load_images, transforms
from image_metrics import make_compute_metrics
from image_model import (
    ModelArguments,
    has_folded_batch_norm,
    input_size,
    load_model,
    load_processor,
    refit_batch_norm,
    timm_repository,
)
from transformers import AutoModelForImageClassification, HfArgumentParser, Trainer, TrainingArguments, set_seed

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer
from hf_saq.hub import ResultRow
from hf_saq.training import last_complete_checkpoint

logger = logging.getLogger(__name__)

METHODS = ("qat", "saq")
NAMES = {"float": "float", "qat": "QAT", "saq": "SAQ"}  # in model cards
FLOAT_BITS = 32


@dataclass
class QuantizationArguments:
    """What is compared. Every pair of bits and method starts from the same float model."""

    weight_bits: list[int] = field(default_factory=lambda: [4], metadata={"help": "One quantized model for each."})
    activation_bits: list[int] | None = field(
        default=None, metadata={"help": "As many as weight_bits; 32 for float. Default: the same as weight_bits."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["qat", "saq"],
        metadata={"help": "qat: plain quantization-aware training; saq: with the sharpness-aware step."},
    )
    quantizer: str = field(default="lsq", metadata={"help": "Name of the quantizer."})
    weight_granularity: str = field(default="tensor", metadata={"help": "tensor or channel."})
    activation_mode: str = field(default="auto", metadata={"help": "auto, signed or unsigned."})
    scale_init: str = field(default="mse", metadata={"help": "mse or mean."})
    first_last_bits: int = field(default=8, metadata={"help": "Of the first layer and the heads; 0: like the rest."})
    quantize_attention: bool = field(default=False, metadata={"help": "Also the operands of attention products."})
    modules_to_not_convert: list[str] | None = field(default=None, metadata={"help": "Modules to leave in float."})
    quantization_overrides: str | None = field(
        default=None, metadata={"help": 'JSON: pattern -> fields, such as {"*.layers.0.*": {"weight_bits": 8}}.'}
    )
    float_epochs: float = field(default=0.0, metadata={"help": "Epochs of float fine-tuning before quantization."})
    float_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    distill_alpha: float = field(
        default=0.0,
        metadata={
            "help": "Distillation: weight of the float model's answers in the loss, 0 to 1; the rest is for the "
            "labels. 0: off. One more forward pass for each batch."
        },
    )
    distill_temperature: float = field(
        default=1.0, metadata={"help": "Softens the answers of both models in distillation; 1: as they are."}
    )

    def __post_init__(self) -> None:
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.methods:
            raise ValueError(f"--methods {self.methods}; expected some of {list(METHODS)}.")
        if self.activation_bits is not None and len(self.activation_bits) != len(self.weight_bits):
            raise ValueError(
                f"--activation_bits {self.activation_bits}: expected as many as --weight_bits {self.weight_bits}."
            )
        check_distillation(self.distill_alpha, self.distill_temperature)
        self.configs()  # a mistake shows before anything is trained

    def configs(self) -> list[SAQQuantizationConfig]:
        """One checked configuration for each pair of bits."""
        return [
            SAQQuantizationConfig(
                weight_bits=None if w == FLOAT_BITS else w,
                activation_bits=None if a == FLOAT_BITS else a,
                quantizer=self.quantizer,
                weight_granularity=self.weight_granularity,  # type: ignore[arg-type]
                activation_mode=self.activation_mode,  # type: ignore[arg-type]
                scale_init=self.scale_init,  # type: ignore[arg-type]
                first_last_bits=self.first_last_bits or None,
                quantize_attention=self.quantize_attention,
                modules_to_not_convert=self.modules_to_not_convert,
                overrides=json.loads(self.quantization_overrides) if self.quantization_overrides else {},
            )
            for w, a in zip(self.weight_bits, self.activation_bits or self.weight_bits, strict=True)
        ]


DIGITS_DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/digits",
    "do_train": True,
    "do_eval": True,
    "weight_bits": [4, 2],
    "float_epochs": 25.0,
    "float_learning_rate": 4e-3,
    "num_train_epochs": 15.0,
    "learning_rate": 4e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "augmentation": "none",
    "logging_steps": 100,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
    "rho": 0.2,
    "interval": 1,  # as schedule="full", but any other schedule may be given on the command line
}
"""Used for what the user does not set when no data set is named."""


@dataclass
class Row:
    """One line of the final table."""

    method: str
    bits: str
    top1: float
    bytes: int
    seconds: float | None
    reloaded_top1: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def for_card(self) -> ResultRow:
        """As a line in the model card of another model of the same run."""
        return ResultRow(NAMES[self.method], self.bits, self.metrics, self.bytes)


Arguments = tuple[ModelArguments, DataTrainingArguments, TrainingArguments, SAQConfig, QuantizationArguments]


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """From the command line, or from a `.json` or `.yaml` file and what the command line has after it, which wins."""
    parser = HfArgumentParser(
        [ModelArguments, DataTrainingArguments, TrainingArguments, SAQConfig, QuantizationArguments],  # type: ignore[arg-type]
        description=__doc__.split("\n")[0],  # type: ignore[union-attr]
    )
    try:
        given, rest = {}, list(argv)
        if rest and rest[0].endswith((".json", ".yaml", ".yml")):
            given = read_arguments(Path(rest.pop(0)), parser.dataclass_types)
        flags = {argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in rest}
        if not any(given.get(key) or key in flags for key in ("dataset_name", "train_dir", "validation_dir")):
            parser.set_defaults(**DIGITS_DEFAULTS)
        parser.set_defaults(**given)
        return parser.parse_args_into_dataclasses(rest)  # type: ignore[return-value]
    except (ValueError, OSError) as error:
        parser.error(str(error))


def read_arguments(path: Path, dataclass_types) -> dict[str, Any]:
    """Argument -> value, from a `.json` or `.yaml` file.

    Raises:
        ValueError: If the file does not hold names and values, or a name is no argument.
    """
    given = yaml.safe_load(path.read_text())
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}; expected one argument and value a line.")
    known = [field.name for kind in dataclass_types for field in fields(kind) if field.init]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "--help lists what there is."
            raise ValueError(f"{path}: {name!r} is no argument; {hint}")
    return given


def main(argv: Sequence[str] | None = None) -> list[Row]:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        return run(*arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    training_args: TrainingArguments,
    saq_config: SAQConfig,
    quantization_args: QuantizationArguments,
) -> list[Row]:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logger.setLevel(training_args.get_process_log_level())
    transformers.utils.logging.set_verbosity(logging.ERROR if training_args.process_index else logging.WARNING)
    set_seed(training_args.seed)
    if not (training_args.do_train or training_args.do_eval):
        raise SystemExit("Nothing to do: give --do_train, --do_eval or both.")

    with training_args.main_process_first(desc="loading the data"):
        images = load_images(data_args, training_args.seed, model_args.cache_dir)
    labels = images["eval"].features["label"].names
    model = load_model(model_args, labels, data_args.image_size)
    processor = load_processor(model_args, model, data_args.image_size)
    train_transform, eval_transform = transforms(processor, input_size(processor), data_args.augmentation)
    common = {
        "eval_dataset": TransformedImages(images["eval"], eval_transform),
        "compute_metrics": make_compute_metrics(),
        "processing_class": processor,
    }
    training_args.remove_unused_columns = False
    if not training_args.do_train:
        # A packed model is evaluated here too, which only the stock Trainer takes.
        trainer = Trainer(model, stage_arguments(training_args, "eval", push_to_hub=False), **common)
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        return [Row("as loaded", "", metrics["eval_top1"], 0, None)]

    common["train_dataset"] = TransformedImages(images["train"], train_transform)
    show(
        training_args,
        f"{type(model).__name__}, {model.num_parameters():,} parameters; {len(images['train']):,} training and "
        f"{len(images['eval']):,} held-out images of {len(labels)} classes",
    )
    if has_folded_batch_norm(model):
        show(training_args, "The batch norms of this checkpoint were folded; refitting their statistics.")
        sample = TransformedImages(images["train"].shuffle(seed=training_args.seed), train_transform)
        refit_batch_norm(model, (batch["pixel_values"] for batch in first_batches(sample)))
    rows = [train_float(model, training_args, quantization_args, common)]
    for config in quantization_args.configs():
        bits = bits_name(config)
        for method in quantization_args.methods:
            stage = f"{method}-{bits.lower()}"
            show(training_args, f"\n{stage}: quantize, calibrate, train")
            method_config = copy.copy(saq_config)
            method_config.case = None if method == "qat" else saq_config.case
            set_seed(training_args.seed)  # every method sees the same batches and the same augmentation
            trainer = DistillationTrainer(  # with an alpha of 0 the same as SAQTrainer
                copy.deepcopy(model),
                stage_arguments(training_args, stage),
                saq_config=method_config,
                quantization_config=config,
                teacher=model,
                alpha=quantization_args.distill_alpha,
                temperature=quantization_args.distill_temperature,
                **common,
            )
            about = card_arguments(model_args, data_args, len(images["eval"]))
            trainer.card_arguments = {**about, "comparison": [row.for_card() for row in rows]}
            rows.append(train_quantized(trainer, method, bits, training_args, common))
    if training_args.process_index == 0:
        table = format_table(rows)
        print(f"\n{table}", flush=True)
        output = Path(training_args.output_dir)
        (output / "results.txt").write_text(table + "\n")
        (output / "results.json").write_text(json.dumps([row.__dict__ for row in rows], indent=2) + "\n")
    return rows


def train_float(model, training_args: TrainingArguments, quantization_args: QuantizationArguments, common) -> Row:
    """Fine-tune the float model, if asked for, and evaluate it."""
    args = stage_arguments(training_args, "float", push_to_hub=False)
    args.num_train_epochs = quantization_args.float_epochs
    if quantization_args.float_learning_rate is not None:
        args.learning_rate = quantization_args.float_learning_rate
    trainer = SAQTrainer(model, args, saq_config=SAQConfig(case=None), **common)
    seconds = None
    if quantization_args.float_epochs > 0:
        show(training_args, "float: train")
        seconds = timed_training(trainer)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    size = weight_bytes(Path(args.output_dir))
    return Row("float", "W32A32", metrics["eval_top1"], size, seconds, metrics=metrics)


def train_quantized(trainer: SAQTrainer, method: str, bits: str, training_args: TrainingArguments, common) -> Row:
    """Train one quantized model, save it packed, and check what comes back from disk."""
    seconds = timed_training(trainer)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_model()  # and push it, with --push_to_hub
    trainer.accelerator.wait_for_everyone()
    directory = Path(trainer.args.output_dir)
    reloaded = AutoModelForImageClassification.from_pretrained(directory)
    check_args = stage_arguments(training_args, f"{directory.name}-reloaded", push_to_hub=False)
    checker = Trainer(reloaded, check_args, **{k: v for k, v in common.items() if k != "train_dataset"})
    reloaded_top1 = checker.evaluate()["eval_top1"]
    return Row(method, bits, metrics["eval_top1"], weight_bytes(directory), seconds, reloaded_top1, metrics)


def card_arguments(model_args: ModelArguments, data_args: DataTrainingArguments, held_out: int) -> dict[str, Any]:
    """What a model card cannot find out by itself. Names of directories are recognised and left out there."""
    about: dict[str, Any] = {}
    if model_args.model_name_or_path is not None and not model_args.from_scratch:
        about["finetuned_from"] = timm_repository(model_args.model_name_or_path)
    if data_args.dataset_name is not None:
        about["dataset_tags"] = [data_args.dataset_name]
    name = "scikit-learn's digits" if data_args.is_digits else Path(data_args.dataset_name or "image folders").name
    return {**about, "dataset": f"{name} ({held_out:,} held-out images)"}


def timed_training(trainer: Trainer) -> float:
    """Train, resuming where that was asked for; seconds of wall time."""
    resume = trainer.args.resume_from_checkpoint and last_complete_checkpoint(trainer.args.output_dir)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    return time.perf_counter() - start


def stage_arguments(args: TrainingArguments, stage: str, push_to_hub: bool | None = None) -> TrainingArguments:
    """The arguments of one stage: its own directory, and its own repository if there is one."""
    args = copy.copy(args)
    base = Path(args.output_dir)
    args.output_dir = str(base / stage)
    if push_to_hub is not None:
        args.push_to_hub = push_to_hub
    if args.push_to_hub:
        args.hub_model_id = f"{args.hub_model_id or base.name}-{stage}"
    return args


def first_batches(dataset, count: int = 8, size: int = 32):
    """A few batches in order, alike on every process."""
    return itertools.islice(torch.utils.data.DataLoader(dataset, batch_size=size, drop_last=True), count)


def bits_name(config: SAQQuantizationConfig) -> str:
    return f"W{config.weight_bits or FLOAT_BITS}A{config.activation_bits or FLOAT_BITS}"


def weight_bytes(directory: Path) -> int:
    """Size of the weight files in a saved model."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def format_table(rows: list[Row]) -> str:
    cells = [("method", "bits", "top-1 %", "weights on disk", "seconds", "reloaded top-1 %")]
    for row in rows:
        cells.append(
            (
                row.method,
                row.bits,
                f"{100 * row.top1:.2f}",
                f"{row.bytes / 1024:,.1f} KiB",
                "-" if row.seconds is None else f"{row.seconds:.1f}",
                "-" if row.reloaded_top1 is None else f"{100 * row.reloaded_top1:.2f}",
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def show(args: TrainingArguments, text: str) -> None:
    if args.process_index == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()

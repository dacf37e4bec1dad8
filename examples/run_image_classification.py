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
into a fresh object and evaluate it again, with `--engine` also as an exported integer graph; (4) one table.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from image_arguments import FLOAT_BITS, RESUME, QuantizationArguments, parse_arguments
from image_averaging import ImageTrainer
from image_export import NOT_ASKED, evaluate_exported
from image_mistakes import check_is_float, check_names, in_one_line, unreadable_images_in_one_line
from image_mixing import mixing
from image_model import (
    ModelArguments,
    first_batches,
    has_folded_batch_norm,
    load_model,
    load_processor,
    numbered_as_in,
    refit_batch_norm,
    timm_repository,
)
from image_results import Row, save_results, weight_bytes, what_to_do_next, write_results
from image_sharding import copies_of_float_model, top1_of
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer
from hf_saq.data import (
    DataTrainingArguments,
    TransformedImages,
    input_size,
    load_images,
    make_compute_metrics,
    transforms,
    without_unreadable,
)
from hf_saq.training import last_complete_checkpoint

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv, description=str(__doc__))
    try:
        with unreadable_images_in_one_line():
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
    if quantization_args.engine != NOT_ASKED and not training_args.do_train:
        raise SystemExit("--engine exports what is trained: give --do_train, or export a model with `hf-saq export`.")

    with in_one_line("reading the arguments"):
        check_names(model_args)
        stages = ["float", *(stage_name(m, c) for c in quantization_args.configs() for m in quantization_args.methods)]
        check_resume(training_args, stages)
    with training_args.main_process_first(desc="loading the data"), in_one_line("loading the images"):
        images = load_images(data_args, training_args.seed, model_args.cache_dir, to_train=training_args.do_train)
        if data_args.skip_corrupt:
            images = {split: without_unreadable(dataset, split) for split, dataset in images.items()}
    with in_one_line("loading the model"):
        labels = images["eval"].features["label"].names
        is_stored = model_args.model_name_or_path is not None and not model_args.from_scratch
        keeps_classes = is_stored and not training_args.do_train
        model = load_model(model_args, None if keeps_classes else labels, data_args.image_size)
        if keeps_classes:
            images["eval"] = numbered_as_in(model, images["eval"])
        elif training_args.do_train:
            check_is_float(model, str(model_args.model_name_or_path))
        processor = load_processor(model_args, model, data_args.image_size)
        train_transform, eval_transform = transforms(processor, input_size(processor), data_args.augmentation)
    common = {
        "eval_dataset": TransformedImages(images["eval"], eval_transform),
        "compute_metrics": make_compute_metrics(),
        "processing_class": processor,
    }
    training_args.remove_unused_columns = False
    if training_args.device.type == "cpu":
        training_args.dataloader_pin_memory = False  # torch warns of it at each loader otherwise
    if not training_args.do_train:
        # A packed model is evaluated here too, which only the stock Trainer takes.
        trainer = Trainer(model, stage_arguments(training_args, "eval", push_to_hub=False), **common)
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        save_results(trainer, metrics)
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
    how = {
        "mix": mixing(quantization_args.mixup_alpha, quantization_args.cutmix_alpha, len(labels)),
        "ema_decay": quantization_args.ema_decay,
    }
    row, float_trainer = train_float(model, training_args, quantization_args, {**how, **common})
    rows = [row]
    for config in quantization_args.configs():
        for method in quantization_args.methods:
            stage = stage_name(method, config)
            show(training_args, f"\n{stage}: quantize, calibrate, train")
            method_config = copy.copy(saq_config)
            method_config.case = None if method == "qat" else saq_config.case
            set_seed(training_args.seed)  # every method sees the same batches and the same augmentation
            student, *teacher = copies_of_float_model(float_trainer, 2 if quantization_args.distill_alpha else 1)
            trainer = ImageTrainer(
                student,
                stage_arguments(training_args, stage),
                saq_config=method_config,
                quantization_config=config,
                teacher=teacher[0] if teacher else None,
                distill_alpha=quantization_args.distill_alpha,
                distill_temperature=quantization_args.distill_temperature,
                **how,
                **common,
            )
            about = card_arguments(model_args, data_args, len(images["eval"]))
            trainer.card_arguments = {**about, "comparison": [row.for_card() for row in rows]}
            engine = quantization_args.engine
            rows.append(train_quantized(trainer, method, bits_name(config), training_args, common, engine))
    if training_args.process_index == 0:
        output = Path(training_args.output_dir)
        table = write_results(rows, output, quantization_args.engine)
        print(f"\n{table}\n\n{what_to_do_next(rows, output, training_args.push_to_hub)}", flush=True)
    return rows


def train_float(
    model, training_args: TrainingArguments, quantization_args: QuantizationArguments, common
) -> tuple[Row, SAQTrainer]:
    """Fine-tune the float model, if asked for, evaluate and save it."""
    args = stage_arguments(training_args, "float", push_to_hub=False)
    args.num_train_epochs = quantization_args.float_epochs
    if quantization_args.float_learning_rate is not None:
        args.learning_rate = quantization_args.float_learning_rate
    trainer = ImageTrainer(model, args, saq_config=SAQConfig(case=None), **common)
    seconds = None
    if quantization_args.float_epochs > 0:
        show(training_args, "float: train")
        if args.max_steps > 0:  # which `Trainer` takes in place of the epochs, also where they are fewer steps
            args.max_steps = min(args.max_steps, steps_of_epochs(trainer))
        seconds = timed_training(trainer)
    metrics = trainer.evaluate()
    trainer.save_model()
    save_results(trainer, metrics)
    trainer.accelerator.wait_for_everyone()
    size = weight_bytes(Path(args.output_dir))
    return Row("float", "W32A32", metrics["eval_top1"], size, seconds, metrics=metrics), trainer


def steps_of_epochs(trainer: SAQTrainer) -> int:
    """The optimizer steps of `num_train_epochs`, which may be a fraction."""
    with trainer.fresh_loader() as loader:
        in_epoch = max(1, math.ceil(len(loader) / trainer.args.gradient_accumulation_steps))
    return math.ceil(trainer.args.num_train_epochs * in_epoch)


def train_quantized(
    trainer: SAQTrainer, method: str, bits: str, training_args: TrainingArguments, common, engine: str
) -> Row:
    """Train one quantized model, save it packed and, for an engine, exported; check what comes back from disk."""
    seconds = timed_training(trainer)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    save_results(trainer, metrics)
    if engine != NOT_ASKED:
        with in_one_line("exporting the model"):
            trainer.export_onnx()
    trainer.save_model()  # and push it with a card, with --push_to_hub
    if not trainer.args.push_to_hub:
        trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()
    directory = Path(trainer.args.output_dir)
    reloaded = AutoModelForImageClassification.from_pretrained(directory)
    if trainer.is_fsdp_enabled:
        reloaded_top1 = top1_of(reloaded, trainer)
    else:
        check_args = stage_arguments(training_args, directory.name, push_to_hub=False)
        check_args.report_to = []  # the same numbers are logged already
        checker = Trainer(reloaded, check_args, **{k: v for k, v in common.items() if k != "train_dataset"})
        reloaded_top1 = checker.evaluate()["eval_top1"]
    engine_top1 = None
    if engine != NOT_ASKED and training_args.process_index == 0:
        per_batch, workers = training_args.per_device_eval_batch_size, training_args.dataloader_num_workers
        engine_top1 = evaluate_exported(directory, engine, common["eval_dataset"], per_batch, workers)
    size = weight_bytes(directory)
    return Row(method, bits, metrics["eval_top1"], size, seconds, reloaded_top1, metrics, engine_top1)


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
    resume = checkpoint_of_stage(trainer.args)
    if trainer.args.resume_from_checkpoint:
        show(trainer.args, f"training goes on from {resume}" if resume else "no checkpoint to go on from: starts anew")
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    return time.perf_counter() - start


def checkpoint_of_stage(args: TrainingArguments) -> str | None:
    """The checkpoint that the stage with these arguments goes on from."""
    asked: Any = args.resume_from_checkpoint
    if asked is True:
        return last_complete_checkpoint(args.output_dir)
    return asked if asked and Path(asked).resolve().parent == Path(args.output_dir).resolve() else None


def check_resume(args: TrainingArguments, stages: Sequence[str]) -> None:
    """Raise `ValueError` if the checkpoint that was named belongs to no stage."""
    found = [stage for stage in stages if checkpoint_of_stage(stage_arguments(args, stage))]
    if isinstance(args.resume_from_checkpoint, str) and not found:
        expected = [str(Path(args.output_dir) / stage) for stage in stages]
        raise ValueError(
            f"{RESUME} {args.resume_from_checkpoint!r} lies in the directory of no stage of this run; expected one in "
            f"{', '.join(expected)}. Check --output_dir, --weight_bits and --methods."
        )


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


def bits_name(config: SAQQuantizationConfig) -> str:
    return f"W{config.weight_bits or FLOAT_BITS}A{config.activation_bits or FLOAT_BITS}"


def stage_name(method: str, config: SAQQuantizationConfig) -> str:
    return f"{method}-{bits_name(config).lower()}"


def show(args: TrainingArguments, text: str) -> None:
    if args.process_index == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()

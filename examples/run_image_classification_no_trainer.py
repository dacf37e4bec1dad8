#!/usr/bin/env python
"""Sharpness-Aware Quantization in a training loop of your own: Accelerate and `SharpnessAwareMinimizer`, no Trainer.

    python examples/run_image_classification_no_trainer.py             # handwritten digits, a small ViT, 4 bits
    accelerate launch --config_file examples/accelerate/ddp_8gpu.yaml examples/run_image_classification_no_trainer.py
    torchrun --nproc_per_node 2 examples/run_image_classification_no_trainer.py

One run: train the float model (`--float_epochs`), quantize, calibrate, train, evaluate, save packed, load it again.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from image_arguments import OneLineParser, parse_with
from image_mistakes import check_is_float, check_names, in_one_line, unreadable_images_in_one_line
from image_model import ModelArguments, load_model, load_processor
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, get_scheduler

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, pack, parameter_groups, quantize
from hf_saq.data import (
    DataTrainingArguments,
    TopKAccuracy,
    TransformedImages,
    input_size,
    load_images,
    transforms,
    without_unreadable,
)


@dataclass
class LoopArguments:
    """How to quantize and train. The defaults suit the handwritten digits."""

    output_dir: str = field(default="outputs/digits_no_trainer", metadata={"help": "Where the packed model goes."})
    weight_bits: int = field(default=4, metadata={"help": "Bits of weights, 2 to 8."})
    activation_bits: int = field(default=4, metadata={"help": "Bits of activations, 2 to 8."})
    rho: float = field(default=0.2, metadata={"help": "Radius of the perturbation; 0 is plain QAT."})
    case: int = field(default=3, metadata={"help": "1, 2 or 3 (SAQ)."})
    sync: str = field(default="local", metadata={"help": "local or global, see SharpnessAwareMinimizer."})
    float_epochs: int = field(default=15, metadata={"help": "Epochs of float training before quantization."})
    num_train_epochs: int = field(default=8, metadata={"help": "Epochs of quantized training."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Stop each training after so many steps."})
    learning_rate: float = field(default=4e-3, metadata={"help": "Of weights, at its peak."})
    scale_lr_ratio: float = field(default=0.1, metadata={"help": "Learning rate of step sizes, relative to weights."})
    weight_decay: float = field(default=0.05, metadata={"help": "Of weights; biases, norms and step sizes have none."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Images of a micro-batch on a process."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Images of an evaluation batch."})
    gradient_accumulation_steps: int = field(default=2, metadata={"help": "Micro-batches of an optimizer step."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that load images."})
    seed: int = field(default=42, metadata={"help": "Of everything random."})


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    kinds: list = [ModelArguments, DataTrainingArguments, LoopArguments]
    parser = OneLineParser(kinds, description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.set_defaults(augmentation="none")
    model_args, data_args, args = parse_with(parser, sys.argv[1:] if argv is None else argv)
    with in_one_line("reading the arguments"):
        check_names(model_args)
        config = SAQQuantizationConfig(weight_bits=args.weight_bits, activation_bits=args.activation_bits)
    # Without `cpu=True`, processes that torchrun starts on a machine without accelerator would not know of each other.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        parser.error("this loop quantizes and packs a model that is not sharded; under FSDP use SAQTrainer.")
    set_seed(args.seed)

    with accelerator.main_process_first(), in_one_line("loading the images"):
        images = load_images(data_args, args.seed, model_args.cache_dir, to_train=True)
        if data_args.skip_corrupt:
            images = {split: without_unreadable(dataset, split) for split, dataset in images.items()}
    with in_one_line("loading the model"):
        model = load_model(model_args, images["train"].features["label"].names, data_args.image_size)
        check_is_float(model, str(model_args.model_name_or_path))
        processor = load_processor(model_args, model, data_args.image_size)
        train_transform, eval_transform = transforms(processor, input_size(processor), data_args.augmentation)
    workers = {"num_workers": args.dataloader_num_workers, "persistent_workers": args.dataloader_num_workers > 0}
    train_loader = DataLoader(
        TransformedImages(images["train"], train_transform),
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        drop_last=True,
        **workers,
    )
    eval_loader = DataLoader(
        TransformedImages(images["eval"], eval_transform), batch_size=args.per_device_eval_batch_size, **workers
    )
    sample = [{"pixel_values": batch["pixel_values"]} for batch in itertools.islice(train_loader, 4)]
    train_loader, eval_loader = accelerator.prepare(train_loader, eval_loader)
    if len(train_loader) == 0:
        raise SystemExit(
            f"error: {len(images['train'])} training images do not fill one batch of --per_device_train_batch_size "
            f"{args.per_device_train_batch_size} on each process; make it smaller."
        )

    results = {}
    if args.float_epochs > 0:
        model = train(accelerator, model, train_loader, args.float_epochs, args)
        results["float"] = evaluate(accelerator, model, eval_loader)
        accelerator.print(f"float: top-1 {results['float']:.2%}")
        model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator.free_memory()

    calibrate(quantize(model, config), sample)
    minimizer = SharpnessAwareMinimizer(model, rho=args.rho, case=args.case, sync=args.sync)
    model = train(accelerator, model, train_loader, args.num_train_epochs, args, minimizer)
    minimizer.detach()
    results["quantized"] = evaluate(accelerator, model, eval_loader)

    if accelerator.is_main_process:
        pack(accelerator.unwrap_model(model, keep_fp32_wrapper=False)).save_pretrained(args.output_dir)
        processor.save_pretrained(args.output_dir)
    accelerator.wait_for_everyone()
    reloaded = AutoModelForImageClassification.from_pretrained(args.output_dir).to(accelerator.device)
    results["reloaded"] = evaluate(accelerator, reloaded, eval_loader)
    accelerator.print(f"W{args.weight_bits}A{args.activation_bits}: top-1 {results['quantized']:.2%}")
    accelerator.print(f"loaded from {args.output_dir}: top-1 {results['reloaded']:.2%}")
    if accelerator.is_main_process:
        Path(args.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n")
    accelerator.end_training()
    return results


def train(accelerator, model, loader, epochs, args, minimizer=None):
    """Train, with the second pass if there is a minimizer; returns the prepared model."""
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, args.scale_lr_ratio)
    optimizer = torch.optim.AdamW(groups)
    model, optimizer = accelerator.prepare(model, optimizer)
    steps = epochs * math.ceil(len(loader) / args.gradient_accumulation_steps)
    steps = min(steps, args.max_train_steps or steps)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    model.train()
    done = 0
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        with accelerator.accumulate(model):
            if minimizer is None:
                accelerator.backward(model(**batch).loss)
            else:
                # `ascent` sets the gradients of earlier micro-batches aside, so nothing is to be cleared here.
                # With sync="global" the minimizer averages its gradients over processes itself.
                with accelerator.no_sync(model), minimizer.ascent():
                    accelerator.backward(model(**batch).loss)
                with minimizer.perturbed():
                    accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                done += 1
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
        if done == steps:
            return model


@torch.no_grad()
def evaluate(accelerator, model, loader) -> float:
    """Top-1 accuracy over all processes."""
    metric = TopKAccuracy(keep_in_memory=True)
    model.eval()
    for batch in loader:
        scores = model(pixel_values=batch["pixel_values"]).logits
        scores, labels = accelerator.gather_for_metrics((scores, batch["labels"]))
        metric.add_batch(predictions=scores.float().cpu(), references=labels.cpu())
    return metric.compute()["top1"]


if __name__ == "__main__":
    with unreadable_images_in_one_line():
        main()

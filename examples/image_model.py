"""The model and its image processor, by transformers or timm name, from a directory, or the small ViT for digits."""

from __future__ import annotations

import difflib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from datasets import Dataset, Value
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTImageProcessor,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING


@dataclass
class ModelArguments:
    """Which float (or already quantized) model to start from."""

    _argument_group_name = "model: what to start from"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A directory, a model on the Hub, or a timm name such as resnet18 or timm/resnet18.a1_in1k. "
            "Without it, a small ViT with random weights."
        },
    )
    from_scratch: bool = field(default=False, metadata={"help": "Take only the architecture, with random weights."})
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'JSON of configuration fields to change: {"hidden_dropout_prob": 0.1}.'},
    )
    image_processor_name: str | None = field(default=None, metadata={"help": "If it is not the model's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep downloaded models and data."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    token: str | None = field(default=None, metadata={"help": "Token for private models on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from the Hub."})
    ignore_mismatched_sizes: bool = field(
        default=True, metadata={"help": "Replace a head with another number of classes by a new one."}
    )


SIZES_OF_ALL_IMAGES = ("dinov2", "dinov2_with_registers")
"""Types of models that fit stored position embeddings to each image; `image_size` says what those were made for."""


def small_vit(labels: list[str], image_size: int, **overrides: Any) -> PreTrainedModel:
    """A ViT of 0.1 million parameters for tiny images, with random weights; `overrides` are fields of its own."""
    config = ViTConfig(
        image_size=image_size,
        patch_size=2,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        # The usual 0.02 is made for hundreds of dimensions; with 64 training is slow to start.
        initializer_range=0.1,
        **_label_maps(labels),
    )
    _check_fields(overrides, config)
    for name, value in overrides.items():
        setattr(config, name, value)
    return AutoModelForImageClassification.from_config(config)


def load_model(args: ModelArguments, labels: list[str] | None, image_size: int | None) -> PreTrainedModel:
    """The model, with a head for `labels`; as it was stored, where these are `None`.

    Raises:
        ValueError: If there is no such model, it has no such fields, or what is asked for needs other weights than the
            stored ones, but for the head.
    """
    if args.model_name_or_path is None:
        return small_vit(labels or [], image_size or 8, **_overrides(args))
    name = timm_repository(args.model_name_or_path)
    hub = {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision,
        "token": args.token,
        "trust_remote_code": args.trust_remote_code,
    }
    overrides, label_maps = _overrides(args), {} if labels is None else _label_maps(labels)
    if args.from_scratch and args.model_name_or_path in timm.list_models():
        config = TimmWrapperConfig(architecture=args.model_name_or_path, **label_maps, **overrides)
    else:
        try:
            config = AutoConfig.from_pretrained(name, **overrides, **hub)
            for field_name, value in label_maps.items():
                setattr(config, field_name, value)
            if isinstance(config, TimmWrapperConfig) and labels is not None:
                config.label_names = labels  # saves would keep those of the stored configuration
        except OSError as error:
            if Path(name).is_dir():
                raise
            near = difflib.get_close_matches(args.model_name_or_path, timm.list_models(), n=1)
            hint = f" Did you mean timm's {near[0]!r}?" if near else ""
            raise ValueError(
                f"--model_name_or_path {args.model_name_or_path!r} is no directory here, and could not be had from "
                f"the Hub: {error}{hint}"
            ) from error
    _check_fields(overrides, config)
    if image_size is not None and isinstance(config, TimmWrapperConfig):
        config.pretrained_cfg = {**getattr(config, "pretrained_cfg", {}), "input_size": [3, image_size, image_size]}
    elif image_size is not None and hasattr(config, "image_size"):
        if args.from_scratch or config.model_type not in SIZES_OF_ALL_IMAGES:
            config.image_size = image_size
    if args.from_scratch:
        return AutoModelForImageClassification.from_config(config, trust_remote_code=args.trust_remote_code)
    model, loaded = AutoModelForImageClassification.from_pretrained(
        name,
        config=config,
        # A packed checkpoint guards itself with mismatched shapes; they must not be waved through.
        ignore_mismatched_sizes=args.ignore_mismatched_sizes and not hasattr(config, "quantization_config"),
        output_loading_info=True,
        **hub,
    )
    for tensor, stored, wanted in sorted(loaded["mismatched_keys"]):
        if stored[1:] != wanted[1:] or wanted[0] != model.config.num_labels:
            raise ValueError(
                f"--model_name_or_path {args.model_name_or_path!r}: its {tensor} has the shape {tuple(stored)}, and "
                f"{tuple(wanted)} is needed for what --image_size and --config_overrides ask for, so that it would "
                "start from random values. Leave them out, take a model that was made for them, or train all of it "
                "--from_scratch."
            )
    return model


def numbered_as_in(model: PreTrainedModel, images: Dataset) -> Dataset:
    """`images` with the labels that `model` has for their classes, by name: it may have more, in another order.

    Where it knows none of the names but has as many classes, they are taken to be in one order.

    Raises:
        ValueError: If it lacks a class, or has two of its name.
    """
    names = images.features["label"].names
    own = [str(model.config.id2label[number]) for number in sorted(model.config.id2label)]
    unknown = [name for name in names if name not in own]
    if unknown == names and len(names) == len(own):
        if not all(map(str.isdigit, names)) or own[0] == "LABEL_0":
            return images
        own, unknown = sorted(names, key=int), []  # folders have numbers of classes in the order of text
    if unknown or (twice := [name for name in names if own.count(name) > 1]):
        what = f"does not know the class {unknown[0]!r}" if unknown else f"has two classes called {twice[0]!r}"
        raise ValueError(
            f"--model_name_or_path: the model {what} of the images; it has {len(own)}: {own[:3]}... Give images of "
            "the classes that it was trained on, in folders of their names."
        )
    numbers = torch.tensor([own.index(name) for name in names])
    unnamed = images.cast_column("label", Value("int64"))
    return unnamed.map(lambda labels: {"label": numbers[labels]}, batched=True, input_columns=["label"])


def _overrides(args: ModelArguments) -> dict:
    try:
        found = json.loads(args.config_overrides or "{}")
    except ValueError as error:
        raise ValueError(f"--config_overrides {args.config_overrides!r} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f'--config_overrides {args.config_overrides!r}; expected fields, as in {{"hidden_size": 64}}.'
        )
    return found


def _check_fields(overrides: dict, config: PreTrainedConfig) -> None:
    """Raise `ValueError` for a field that `config` has not, which transformers leaves out without a word."""
    for name in overrides:
        if not hasattr(config, name) and name != "attn_implementation":
            near = difflib.get_close_matches(name, list(config.to_dict()), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--config_overrides: {type(config).__name__} has no field {name!r}.{hint}")


def load_processor(args: ModelArguments, model: PreTrainedModel, image_size: int | None):
    """The image processor, set to `image_size` so that it is saved with what the model was trained on."""
    name = args.image_processor_name or args.model_name_or_path
    if isinstance(model.config, TimmWrapperConfig) and not args.image_processor_name:
        # timm keeps what a processor needs in the configuration of the model.
        return TimmWrapperImageProcessor(getattr(model.config, "pretrained_cfg", {}), model.config.architecture)
    if name is None:
        size = image_size or 8
        return ViTImageProcessor(
            size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=True
        )
    try:
        processor = AutoImageProcessor.from_pretrained(
            timm_repository(name),
            cache_dir=args.cache_dir,
            revision=args.model_revision,
            token=args.token,
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError):
        if args.image_processor_name:
            raise
        # Without a preprocessor_config.json: the defaults of its family.
        if type(model.config) not in IMAGE_PROCESSOR_MAPPING:
            raise ValueError(
                f"{name!r} has no preprocessor_config.json and {type(model.config).__name__} no default processor; "
                "name one with --image_processor_name."
            ) from None
        found = IMAGE_PROCESSOR_MAPPING[type(model.config)]
        found = found.get("torchvision") if isinstance(found, dict) else next(c for c in found if c is not None)
        processor = found()
        of_model = getattr(model.config, "image_size", None)  # the default is made for the family's usual one
        image_size = image_size or (of_model if isinstance(of_model, int) else None)
    if image_size is not None:
        resized = {"height": image_size, "width": image_size}
        if getattr(processor, "do_center_crop", False) and processor.crop_size:
            processor.crop_size = resized
            processor.size = {"shortest_edge": round(image_size / 0.875)}
        elif set(dict(processor.size)) == {"shortest_edge"}:  # ResNet, ConvNeXt: crop to this square by themselves
            processor.size = {"shortest_edge": image_size}
        else:
            processor.size = resized
    return processor


def timm_repository(name: str) -> str:
    """The Hub repository of a bare timm name; any other name as it is."""
    if "/" in name or not timm.is_model(name):
        return name
    pretrained = timm.get_pretrained_cfg(name)
    return pretrained.hf_hub_id if pretrained is not None and pretrained.hf_hub_id else name


def _label_maps(labels: list[str]) -> dict:
    """Without `num_labels`: transformers compares it with the names that a stored configuration has, and warns."""
    return {
        "label2id": {label: i for i, label in enumerate(labels)},
        "id2label": dict(enumerate(labels)),
    }


def has_folded_batch_norm(model: torch.nn.Module) -> bool:
    """Whether batch norms have lost their statistics: mean 0 and one and the same variance in every channel.

    Checkpoints converted from inference-only models come so. They evaluate well, but training normalizes with the
    statistics of the batch and would destroy them.
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    pretrained = [m for m in norms if not torch.equal(m.bias, torch.zeros_like(m.bias))]
    return bool(pretrained) and all(
        not m.running_mean.any() and torch.allclose(m.running_var, m.running_var[0]) for m in pretrained
    )


def first_batches(dataset, count: int = 8, size: int = 32):
    """A few batches in order, alike on every process; one smaller batch where there are fewer images."""
    loader = torch.utils.data.DataLoader(dataset, batch_size=min(size, len(dataset)), drop_last=True)
    return itertools.islice(loader, count)


@torch.no_grad()
def refit_batch_norm(model: torch.nn.Module, batches, momentum: float = 0.1) -> None:
    """Give batch norms the statistics of their inputs, in place, and adapt their affine part so that the function in
    evaluation mode stays what it was; training mode then computes nearly the same.

    Args:
        batches: Tensors `(N, 3, H, W)`.
        momentum: Of the running statistics from now on (HF's MobileNetV2 has 0.997, which keeps only the last batch).
    """
    norms = {m: [] for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}

    def observe(norm, args):
        x = args[0].double()
        norms[norm].append((x.mean(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))))

    handles = [norm.register_forward_pre_hook(observe) for norm in norms]
    model.eval()
    for batch in batches:
        model(pixel_values=batch)
    for handle in handles:
        handle.remove()
    for norm, seen in norms.items():
        mean = torch.stack([m for m, _ in seen]).mean(dim=0)
        variance = (torch.stack([s for _, s in seen]).mean(dim=0) - mean.square()).clamp_min(norm.eps)
        gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        norm.bias.copy_(norm.bias + gain * (mean - norm.running_mean))
        norm.weight.copy_(gain * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.momentum = momentum

"""Carry out the commands that run a saved model on images: `eval`, `compare` and `analyze`."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..analysis import Landscape, compare, landscape, sensitivity, sharpness
from ..analysis.html_report import Section, html_report
from ..analysis.results import plain
from ..analysis.sharpness_at_quantized import IN_SCOPE
from ..analysis.weight_point import WeightPoint, shapes_of_parameters
from ..conversion import calibrate, quantize
from ..layers import HoldsQuantizers
from ..progress import with_progress
from ..sharpness import default_rho
from ..tables import text_table
from ..version import __version__
from .arguments import PARTS
from .checking import check_analysis, check_picture
from .saved_images import (
    Images,
    differences_of_processors,
    load_images,
    load_model,
    load_model_or_graph,
    loss_of,
    scores_of,
)

CALIBRATION_BATCHES = 4


def evaluate(args: argparse.Namespace) -> str:
    """Return loss and accuracy of a saved model or an export; they are NaN, `null` in JSON, if any score is."""
    from ..data import top_k

    model, processor = load_model_or_graph(args.source, args)
    images = load_images(model, processor, args)
    begin, each = time.perf_counter(), []
    with torch.inference_mode():
        for batch in with_progress(images.batches, "evaluating"):
            each.append(scores_of(model, batch).cpu())
    seconds = time.perf_counter() - begin
    scores, labels = torch.cat(each), torch.cat([batch["labels"] for batch in images.batches])
    found: dict[str, Any] = {**top_k(scores, labels), "loss": F.cross_entropy(scores, labels).item()}
    without = int(scores.isnan().any(dim=1).sum())
    if without:  # sorting would take them for some class, and count it right or wrong
        found = {**dict.fromkeys(found, math.nan), "images_with_nan_scores": without}
    found |= {"images": len(images), "images_per_second": len(images) / seconds}
    if args.json:
        return json.dumps(plain({"model": args.source, "data": args.data, **found}), indent=2)
    rows = [(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}") for name, value in found.items()]
    text = f"{args.source} on {images.where}\n{text_table(rows, right=(1,))}"
    if without:
        text += (
            f"\nThe model gives scores that are NaN to {without:,} of {len(images):,} images, so it has no accuracy. "
            "Its training has diverged, or its files are damaged: see its log, and evaluate an earlier checkpoint."
        )
    return text


def compare_two(args: argparse.Namespace) -> str:
    """Return where two saved models part, layer by layer."""
    if args.plot is not None:
        check_picture("--plot", args.plot)
    first, processor = load_model(args.first, args)
    second = _second_model(args.second, args, args.first, first, processor)
    images = load_images(first, processor, args)
    found = compare(first, second, images.batches, loss=loss_of)
    if args.plot is not None:
        found.plot(args.plot)
    if args.json:
        return json.dumps({"first": args.first, "second": args.second, **found.to_dict()}, indent=2)
    return f"{args.first} and {args.second} on {images.where}\n{found}"


def analyze(args: argparse.Namespace) -> str:
    """Measure what was asked for, write the report, and return what was found as text."""
    check_analysis(args)
    output = Path(args.output)
    names = _names_beside(args.source, args.beside)
    model, processor = load_model(args.source, args, trainable=True)
    if not any(isinstance(module, HoldsQuantizers) for module in model.modules()):
        raise ValueError(f"{args.source} is a float model; expected one that hf_saq has quantized.")
    models: dict[str, Any] = {names[0]: model}
    if args.beside is not None:
        models[names[1]] = _second_model(args.beside, args, args.source, model, processor, trainable=True)
    plain_model = None if args.float_model is None else _float_model(args, model, processor)
    images = load_images(model, processor, args)
    sections = [
        section
        for part in PARTS
        if part in args.parts
        for section in _sections(part, args, models, images, plain_model)
    ]
    about = [f"{args.source}, a {type(model).__name__}, on {images.where}.", f"Made with hf_saq {__version__}."]
    partial = output.with_name(output.name + ".partial")
    partial.write_text(html_report(f"Analysis of {names[0]}", about, sections), "utf-8", "backslashreplace")
    os.replace(partial, output)
    if args.json:
        found = {section.title: section.result.to_dict() for section in sections}
        return json.dumps({"model": args.source, "data": args.data, "images": len(images), **found}, indent=2)
    text = [f"{section.title}\n{section.result}" for section in sections]
    return "\n\n".join([f"{args.source} on {images.where}", *text, f"{output}: report with pictures"])


def _sections(
    part: str, args: argparse.Namespace, models: dict[str, Any], images: Images, plain_model: Any
) -> list[Section]:
    name, model = next(iter(models.items()))
    if part == "sharpness":
        rho = default_rho(model)[0] if args.rho is None else args.rho
        about = (
            f"How much the loss rises within a radius of {rho:g} around the quantized weights, in the steepest and in "
            "random directions, and its curvature there."
        )
        only = _in_scope_of_all(models)
        if only is not None:
            about += " What is in scope in one of the models alone, such as embeddings of a float one, does not move."
        return [
            Section(
                f"Sharpness of {other}",
                about,
                sharpness(each, images.batches, rho, adaptive_rho=10 * rho, only=only, loss=loss_of),
            )
            for other, each in models.items()
        ]
    if part == "landscape":
        line = landscape(models, images.batches, places=("quantized", "latent"), points=args.points, loss=loss_of)
        fewer = max(3, args.points // 4 * 2 + 1)
        plane = landscape(models, images.batches, dimensions=2, points=fewer, loss=loss_of)
        if args.landscape is not None:
            plane.plot(args.landscape)
        about = "The loss along random directions that move every filter by a share of its own norm"
        return [
            Section("Landscape along a line", f"{about}: {_took(line)}", line),
            Section("Landscape over a plane", f"{about}: {_took(plane)}", plane),
        ]
    about = "What quantizing one operand of one layer alone costs, everything else in float; most sensitive first."
    if plain_model is not None:
        model, name = _quantized_anew(plain_model, model, images), _name(args.float_model)
    elif model.config.quantization_config.storage == "packed":
        about += " Weights were stored as integers: more bits than they have bring nothing back, see --float."
    found = sensitivity(model, images.batches, passes=args.passes, loss=loss_of)
    return [Section(f"Sensitivity of the layers of {name}", about, found)]


def _in_scope_of_all(models: dict[str, Any]) -> list[str] | None:
    """Name the tensors that are in scope in each of the models; `None` if the same ones are in all of them."""
    first, *others = [WeightPoint("analyze", model, IN_SCOPE).names for model in models.values()]
    if all(set(names) == set(first) for names in others):
        return None
    return [name for name in first if all(name in names for names in others)]


def _float_model(args: argparse.Namespace, model: Any, processor: Any) -> Any:
    """Load the float model of the quantized `model`.

    Raises:
        ValueError: If it is quantized, has other parameters, or [`_second_model`] refuses it.
    """
    found = _second_model(args.float_model, args, args.source, model, processor, trainable=True)
    if any(isinstance(module, HoldsQuantizers) for module in found.modules()):
        raise ValueError(f"--float {args.float_model} is quantized; expected a float model.")
    shapes, expected = shapes_of_parameters(found), shapes_of_parameters(model)
    if different := [name for name in (*expected, *shapes) if shapes.get(name) != expected.get(name)]:
        raise ValueError(
            f"--float {args.float_model} is a {type(found).__name__} with other parameters than {args.source}, such "
            f"as {different[0]}; expected the float model that was quantized."
        )
    return found


def _quantized_anew(plain_model: Any, model: Any, images: Images) -> nn.Module:
    """Quantize and calibrate the float model as the other one is quantized."""
    device = next(plain_model.parameters()).device
    shown = [batch["pixel_values"].to(device) for batch in images.batches[:CALIBRATION_BATCHES]]
    return calibrate(quantize(plain_model, model.config.quantization_config.replace(storage="float")), shown).eval()


def _name(source: str) -> str:
    return Path(os.path.abspath(source)).name


def _names_beside(source: str, beside: str | None) -> list[str]:
    """Name the models in titles and legends: shortly, or as they were given where they have the same short name.

    Raises:
        ValueError: If they are one model.
    """
    given = [source] if beside is None else [source, beside]
    if len({os.path.realpath(each) for each in given}) < len(given):
        raise ValueError(f"--beside {beside} is the model {source} itself; expected another one, or no --beside.")
    short = [_name(each) for each in given]
    return short if len(set(short)) == len(given) else given


def _took(found: Landscape) -> str:
    points = " x ".join([str(len(found.steps))] * found.dimensions)
    return f"{points} points in {found.seconds:.0f} seconds."


def _second_model(
    second: str, args: argparse.Namespace, first: str, model: Any, processor: Any, trainable: bool = False
) -> Any:
    """Load a model that is shown the images of the first one.

    Args:
        first, model, processor: Where the first model is, it, and the image processor that made the images.

    Raises:
        ValueError: If it has other classes, or takes images that are prepared in another way.
    """
    other: Any
    other, other_processor = load_model(second, args, trainable)
    names = [[str(name) for _, name in sorted(each.config.id2label.items())] for each in (model, other)]
    if names[0] != names[1]:
        raise ValueError(
            f"{first} and {second} have different classes ({len(names[0])}, such as {names[0][0]!r}, and "
            f"{len(names[1])}, such as {names[1][0]!r}); expected two models of the same task."
        )
    if different := differences_of_processors(processor, other_processor):
        raise ValueError(
            f"The image processors of {first} and {second} differ: {'; '.join(different)}. Both models are shown the "
            "same images; expected two that take images prepared in one way. If the models were trained on such "
            "images, one processor is wrong: copy the right preprocessor_config.json over it."
        )
    return other

"""The table in examples/recipes/README.md, from the recipes. As a program: put it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

DIRECTORY = Path(__file__).parents[2] / "examples" / "recipes"
README = DIRECTORY / "README.md"
RECIPES = sorted(DIRECTORY.glob("*.yaml"))
START, END = "<!-- table: python tests/support/recipe_table.py -->\n", "<!-- end of the table -->\n"

TRAINING_IMAGES = {
    "ILSVRC/imagenet-1k": 1_281_167,
    "uoft-cs/cifar10": 50_000,
    "uoft-cs/cifar100": 50_000,
    "dpdl-benchmark/oxford_flowers102": 1_020,
    "timm/oxford-iiit-pet": 3_680,
}
PASSES = {"qat": 1, "saq": 2}
SMALL, MEDIUM = 2, 100
"""Millions of image passes at which a cost class ends."""


def image_passes(recipe: dict[str, Any]) -> float:
    """Millions of forward and backward passes of one image of 224 x 224 pixels, for the whole recipe."""
    quantized = len(recipe["weight_bits"]) * sum(PASSES[method] for method in recipe["methods"])
    epochs = recipe.get("float_epochs", 0) + quantized * recipe["num_train_epochs"]
    size = recipe.get("image_size", 224)
    return TRAINING_IMAGES[recipe["dataset_name"]] * epochs * (size / 224) ** 2 / 1e6


def cost_class(recipe: dict[str, Any]) -> str:
    millions = image_passes(recipe)
    return "small" if millions < SMALL else "medium" if millions < MEDIUM else "large"


def table() -> str:
    lines = [
        "| recipe | model | bits | float epochs | epochs | rho | image passes | cost class |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in RECIPES:
        recipe = yaml.safe_load(path.read_text())
        cells = [
            f"[{path.stem}]({path.name})",
            recipe["model_name_or_path"] + (" (from scratch)" if recipe.get("from_scratch") else ""),
            ", ".join(f"W{bits}A{bits}" for bits in recipe["weight_bits"]),
            str(recipe.get("float_epochs", 0)),
            str(recipe["num_train_epochs"]),
            str(recipe["rho"]),
            f"{image_passes(recipe):,.1f} M",
            cost_class(recipe),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, rest = README.read_text().split(START)
    README.write_text(before + START + table() + END + rest.split(END)[1])

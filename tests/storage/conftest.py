"""A quantized model with layers of several widths, and its packed checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from quantized_models import quantized
from torch import nn

from hf_saq import pack


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized(overrides={"*.fc2": {"weight_bits": 3}, "vit.layers.0.mlp": {"weight_bits": 2}})


@pytest.fixture(scope="module")
def packed_dir(model: nn.Module, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    pack(model).save_pretrained(directory)
    return directory


@pytest.fixture
def own_packed_dir(packed_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in packed_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path

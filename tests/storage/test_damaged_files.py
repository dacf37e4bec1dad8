"""Damaged packed checkpoints: each loads as what was saved, or raises; nothing crashes, hangs or differs silently."""

from __future__ import annotations

import builtins
import pickle
import random
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from damage import CONFIG, WEIGHTS, damage
from quantized_models import quantized
from tiny_models import images, seeded
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_saq import pack
from hf_saq.conversion.forms import is_packed

SECONDS = 30.0
"""Of this process's own time, which other work on the machine does not lengthen; a load takes some 20 ms."""


def small_vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        num_labels=3,
        initializer_range=0.2,
    )
    with seeded(0):
        return ViTForImageClassification(config)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> tuple[nn.Module, dict[str, bytes]]:
    """A model with offsets and scales of channels, and the files of its checkpoint."""
    directory = tmp_path_factory.mktemp("original")
    model = pack(quantized(small_vit, images(), quantizer="lsq_plus", weight_granularity="channel"))
    model.save_pretrained(directory)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert set(files) == {WEIGHTS, CONFIG}
    return load(directory)[0], files


def load(directory: Path) -> tuple[nn.Module, set[str]]:
    """The model and the texts of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AutoModelForImageClassification.from_pretrained(directory)
    return model, {str(warning.message) for warning in caught}


def differences(found: nn.Module, expected: nn.Module) -> list[str]:
    first, second = found.state_dict(), expected.state_dict()
    if first.keys() != second.keys():
        return ["names of tensors"]
    different = [
        name
        for name in first
        if first[name].dtype != second[name].dtype
        or not torch.equal(first[name].nan_to_num(7), second[name].nan_to_num(7))
    ]
    a, b = (model.config.to_diff_dict() for model in (found, expected))
    different += sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    return different or ([] if torch.equal(found(images()).logits, expected(images()).logits) else ["logits"])


def check(original, directory: Path, count: int, seed: int) -> Counter:
    """Load `count` damaged checkpoints. Returns how many ended how."""
    expected, files = original
    outcomes: Counter = Counter()
    for i in range(count):
        for name, content in files.items():
            (directory / name).write_bytes(content)
        file, change = damage(directory, random.Random(f"{seed} {i}"))
        what = f"case {i} of seed {seed}: {change} in {file}"
        began = time.process_time()
        try:
            found, said = load(directory)
        except Exception as error:
            outcomes[f"{file} {type(error).__name__}"] += 1
            if file == WEIGHTS:
                assert isinstance(error, (ValueError, OSError)), f"{what}: {error!r}"
                assert str(directory) in str(error) and WEIGHTS in str(error), f"{what}: {error!r}"
        else:
            wrong = [name for name in differences(found, expected) if not any(name in text for text in said)]
            assert not wrong, f"{what}: {wrong} differ, and nothing says so"
            outcomes[f"{file} loaded"] += 1
        assert time.process_time() - began < SECONDS, what
    return outcomes


def test_damaged_checkpoints(original, tmp_path: Path):
    outcomes = check(original, tmp_path, 150, seed=0)
    assert 80 < sum(n for kind, n in outcomes.items() if kind.startswith(WEIGHTS))
    assert 30 < sum(n for kind, n in outcomes.items() if kind.startswith(CONFIG))
    assert outcomes[f"{WEIGHTS} ValueError"] > 60


@pytest.mark.slow
def test_ten_thousand_damaged_checkpoints(original, tmp_path: Path):
    outcomes = check(original, tmp_path, 10_000, seed=1)
    print("\n".join(f"{count:6} {kind}" for kind, count in sorted(outcomes.items())))
    assert outcomes.total() == 10_000


def test_nothing_is_unpickled(original, tmp_path: Path, monkeypatch):
    """Neither from a file in pickle's format nor anywhere else while a packed checkpoint loads."""
    _, files = original

    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(builtins, "exec", refuse)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert is_packed(load(tmp_path)[0])
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin: packed checkpoints are safetensors files; this one"):
        load(tmp_path)

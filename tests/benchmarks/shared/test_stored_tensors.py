"""Tensors made once: kept in a file, and nothing half-made is taken for it."""

from __future__ import annotations

import pytest
import torch

from benchmarks.shared.images import Images
from benchmarks.shared.stored_tensors import made_once, splits_made_once


def test_made_once(tmp_path):
    path, made = tmp_path / "cache" / "a.safetensors", []

    def make():
        made.append(1)
        return {"x": torch.arange(6).view(2, 3).T}

    first, second = made_once(path, make), made_once(path, make)
    assert len(made) == 1
    assert first["x"].tolist() == second["x"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_what_fails_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"

    def half_written(tensors, target):
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("benchmarks.shared.stored_tensors.save_file", half_written)
        with pytest.raises(KeyboardInterrupt):
            made_once(path, lambda: {"x": torch.zeros(1)})
    assert made_once(path, lambda: {"x": torch.ones(1)})["x"].item() == 1


def test_splits_keep_their_images_and_their_order(tmp_path):
    path = tmp_path / "a.safetensors"
    splits = {name: Images(torch.full((n, 1, 2, 2), n), torch.arange(n)) for name, n in (("train", 3), ("test", 2))}
    splits_made_once(path, ("test", "train"), splits.__getitem__)
    train, test = splits_made_once(path, ("train", "test"), {}.__getitem__)  # from the file: nothing to decode with
    for found, name in ((test, "test"), (train, "train")):
        assert torch.equal(found.pixels, splits[name].pixels) and torch.equal(found.labels, splits[name].labels)

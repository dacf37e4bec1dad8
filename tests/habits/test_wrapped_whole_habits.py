"""Models that are wrapped as a whole, by DDP, DataParallel or `torch.compile`, in other forms and in exports."""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import load
from quantized_models import assert_same_state, quantized
from tiny_models import images
from torch import nn

from hf_saq import dequantize, pack, unpack
from hf_saq.export import ExportedClassifier, export_onnx


def by_ddp(model: nn.Module) -> nn.Module:
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)  # without processes
    wrapped.module = model
    return wrapped


def by_compiler_and_ddp(model: nn.Module) -> nn.Module:
    return torch.compile(by_ddp(model), backend="eager")


WRAPPERS = [by_ddp, nn.DataParallel, by_compiler_and_ddp]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_other_forms_are_of_the_model_inside(wrap, tmp_path):
    """`pack(ddp).module.save_pretrained` wrote packed codes that its configuration called float."""
    model = quantized()
    packed = pack(wrap(model))
    packed.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path), pack(model))
    assert_same_state(unpack(wrap(packed)), unpack(packed))
    assert_same_state(dequantize(wrap(model)), dequantize(model))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_an_export_keeps_the_names_of_classes(wrap, tmp_path):
    """With DataParallel no configuration was written, and pipelines answered without names of classes."""
    model, x = quantized(activation_bits=8), images(3, seed=4)
    model.config.id2label = {0: "ant", 1: "bee", 2: "cat"}
    export_onnx(wrap(model), tmp_path, image_size=16, check=False)
    loaded = ExportedClassifier.from_pretrained(tmp_path, threads=1)
    assert loaded.config.id2label == model.config.id2label
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, model(x).logits, atol=0.02, rtol=0.02)

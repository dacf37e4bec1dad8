"""What people do to a quantized model before they save it: put another head on it, save an average in its place."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from checkpoint_files import load
from quantized_models import quantized
from tiny_models import images
from torch import nn
from training import Images, arguments

from hf_saq import SAQConfig, SAQTrainer, pack
from hf_saq.layers import HoldsQuantizers, PackedLayer

TOLD = "classifier took the place of quantized layers and stay in float"


def with_new_head(classes: int = 5) -> nn.Module:
    model = quantized()
    model.classifier = nn.Linear(16, classes)
    model.config.num_labels = classes
    return model


def assert_loads_with_a_float_head(path, model: nn.Module) -> None:
    loaded = load(path)
    assert type(loaded.classifier) is nn.Linear and loaded.config.num_labels == 5
    assert isinstance(loaded.vit.layers[0].mlp.fc1, (HoldsQuantizers, PackedLayer))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images()).logits, model.eval()(images()).logits)


def test_a_head_replaced_before_training_is_trained_saved_and_loaded_in_float(tmp_path):
    """It loaded with an error about mismatched sizes, after all the training."""
    data = Images(8, torch.float32)
    with pytest.warns(UserWarning, match=TOLD):
        trainer = SAQTrainer(
            with_new_head(), arguments(tmp_path, max_steps=1), saq_config=SAQConfig(rho=0.1), train_dataset=data
        )
    trainer.train()
    trainer.save_model()
    planned = {layer.name: layer for layer in trainer.model.quantization_report.layers}
    assert planned["classifier"].reason == "replaced by a float layer after quantization"
    assert_loads_with_a_float_head(tmp_path, trainer.model)


@pytest.mark.parametrize("storage", ["float", "packed"])
def test_a_head_replaced_before_saving(storage, tmp_path):
    model = with_new_head()
    with pytest.warns(UserWarning, match=TOLD):
        model = pack(model) if storage == "packed" else model
        model.save_pretrained(tmp_path)
    assert_loads_with_a_float_head(tmp_path, model)


def test_a_head_that_timm_resets_is_told_of():
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = quantized(lambda: timm.create_model("vit_tiny_patch16_224", **small))
    model.reset_classifier(7)
    with pytest.warns(UserWarning, match="head took the place of quantized layers"):
        packed = pack(model)
    assert "head" not in {layer.name for layer in packed.quantization_report.converted}


def test_the_state_dict_that_is_given_is_saved(tmp_path):
    """An average of weights, or what `accelerator.get_state_dict` gathered: transformers does not hand it on."""
    model = quantized()
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p in average.parameters():
            p.mul_(1.3)
    model.save_pretrained(tmp_path, state_dict=average.state_dict())
    saved = load(tmp_path).state_dict()
    for name, value in average.state_dict().items():
        assert torch.equal(saved[name], value), name

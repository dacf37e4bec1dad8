"""What people do to a quantized model before they save it: put another head on it, save an average in its place."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from checkpoint_files import load
from quantized_models import quantized
from tiny_models import images, vit
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


def test_an_average_of_parameters_alone_is_saved_with_the_buffers_of_the_model(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path, state_dict={name: 1.3 * p.detach() for name, p in model.named_parameters()})
    saved = load(tmp_path)
    for name, p in model.named_parameters():
        assert torch.equal(saved.get_parameter(name), 1.3 * p), name
    assert torch.isfinite(saved.eval()(images()).logits).all()


def test_a_state_dict_that_is_not_that_of_a_packed_model_is_refused(tmp_path):
    model = quantized()
    packed = pack(model)
    with pytest.raises(ValueError, match="which is not in this packed ViTForImageClassification or is another there"):
        packed.save_pretrained(tmp_path / "packed", state_dict=model.state_dict())
    packed.save_pretrained(tmp_path / "packed", state_dict=packed.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "packed")(images()).logits, packed(images()).logits)


def test_a_compiled_model_is_saved_and_goes_on_by_the_names_of_the_model(tmp_path):
    """`SAQTrainer(torch.compile(model))`: its state dict has a prefix before every name."""
    how = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    data = Images(16, torch.float32)

    def trainer() -> SAQTrainer:
        model = torch.compile(quantized(), backend="eager")
        return SAQTrainer(model, how, saq_config=SAQConfig(rho=0.1, schedule="full"), train_dataset=data)

    with torch.compiler.set_stance("force_eager"):  # the names are those of a compiled model all the same
        first = trainer()
        first.train()
        second = trainer()
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    model = load(tmp_path / "checkpoint-2")
    for name, value in first.model._orig_mod.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for name, value in second.model._orig_mod.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)


def test_names_of_ddp_are_those_of_the_model(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path, state_dict={f"module.{name}": t for name, t in model.state_dict().items()})
    assert torch.equal(load(tmp_path).classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("variant", [None, "w4"])
@pytest.mark.parametrize("storage", ["float", "packed"])
def test_shards_take_the_place_of_one_file(storage, variant, tmp_path):
    """A later model is saved in shards where an earlier one lay in one file: the earlier one was loaded, for good."""
    earlier, later = (quantized(lambda seed=seed: vit(seed)) for seed in (0, 1))
    if storage == "packed":
        earlier, later = pack(earlier), pack(later)
    earlier.save_pretrained(tmp_path, variant=variant)
    later.save_pretrained(tmp_path, variant=variant, max_shard_size="3KB")
    with torch.no_grad():
        assert torch.equal(load(tmp_path, variant=variant)(images()).logits, later(images()).logits)

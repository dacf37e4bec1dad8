"""What people do between a checkpoint and the run that goes on from it: rebuild the model, and not always the same.

A run goes on exactly, by the names of the model that is at hand, or it is refused with both values named.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from checkpoint_files import edit_weights
from quantized_models import assert_same_state, quantized, same_values
from tiny_models import TRANSFORMERS_MODELS, vit
from torch import nn
from training import Images, arguments
from transformers import Trainer, ViTForImageClassification

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, calibrate, pack, quantize
from hf_saq.conversion.swapping import leave_in_float
from hf_saq.storage.exact_loading import load_exactly
from hf_saq.training.checkpoints import what_is_missing
from hf_saq.training.saving import go_on_from

W3 = {"weight_bits": 3, "activation_bits": 4}


def checkpoint_of(model: nn.Module, directory: Path) -> str:
    model.save_pretrained(directory)
    return str(directory)


def other_values(model: nn.Module) -> nn.Module:
    """As a fresh process has them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def fresh(**fields) -> nn.Module:
    """The model of a new process: quantized, not calibrated, of other values."""
    return other_values(quantize(vit(), SAQQuantizationConfig(**{**W3, **fields})))


# The same run goes on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRANSFORMERS_MODELS)
def test_every_tensor_comes_back(family, tmp_path):
    model = quantized(TRANSFORMERS_MODELS[family], **W3)
    checkpoint = checkpoint_of(model, tmp_path)
    again = other_values(quantize(TRANSFORMERS_MODELS[family](), SAQQuantizationConfig(**W3)))
    go_on_from(again, checkpoint)
    assert_same_state(again, model)


def test_a_float64_model_comes_back_in_float64(tmp_path):
    """Its scales too, all 53 bits of them."""
    model = quantized(**W3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.rand_like(parameter) * 1e-9)
    checkpoint = checkpoint_of(model, tmp_path)
    again = fresh().double()
    go_on_from(again, checkpoint)
    assert_same_state(again, model)


def test_a_head_was_replaced(tmp_path):
    """`model.classifier = nn.Sequential(...)` before or after quantization: `from_pretrained` would build another."""

    def build(moment: str) -> nn.Module:
        model = vit()
        if moment == "after":
            quantize(model, SAQQuantizationConfig(**W3))
        model.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        return quantize(model, SAQQuantizationConfig(**W3)) if moment == "before" else model

    for moment in ("before", "after"):
        model = build(moment)
        checkpoint = checkpoint_of(model, tmp_path / moment)
        again = other_values(build(moment))
        go_on_from(again, checkpoint)
        assert_same_state(again, model)


class NetForImageClassification(ViTForImageClassification):
    """A class that cannot be built from its configuration alone."""

    def __init__(self, config, classes_of_the_user: int):
        super().__init__(config)
        self.extra = nn.Linear(config.hidden_size, classes_of_the_user)


def test_the_best_model_of_a_class_with_more_arguments(tmp_path):
    """`load_best_model_at_end` comes when all the training is done: no moment to find out that a class has another
    constructor."""
    torch.manual_seed(0)
    kept = {}

    class Keeps(SAQTrainer):
        def _save_checkpoint(self, model, trial):
            kept[self.state.global_step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            super()._save_checkpoint(model, trial)

    model = NetForImageClassification(vit().config, classes_of_the_user=5)
    trainer = Keeps(
        model,
        arguments(
            tmp_path,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=1,
            eval_steps=1,
            max_steps=3,
            learning_rate=1e-2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,
        ),
        saq_config=SAQConfig(case=None),
        quantization_config=SAQQuantizationConfig(**W3, modules_to_not_convert=["extra"]),
        train_dataset=Images(12, torch.float32),
        eval_dataset=Images(8, torch.float32),
    )
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    for name, tensor in kept[best].items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


def test_layers_that_calibration_left_in_float(tmp_path):
    """The first run found a layer that is never called. The run that resumes has not calibrated and quantizes it."""

    def build() -> nn.Module:
        model = vit()
        model.unused = nn.Linear(4, 4)
        return quantize(model, SAQQuantizationConfig(**W3))

    model = build()
    with pytest.warns(UserWarning, match="1 of 15 layers stay in float"):
        calibrate(model, [torch.randn(4, 3, 16, 16)])
    checkpoint = checkpoint_of(model, tmp_path)
    again = build()
    go_on_from(again, checkpoint)
    assert_same_state(again, model)
    assert again.config.quantization_config == model.config.quantization_config


def test_a_checkpoint_of_version_1_goes_on(tmp_path):
    model = quantized(**W3)
    checkpoint = checkpoint_of(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["first_last_modules"], config["quantization_config"]["modules_found_idle"]
    config["quantization_config"]["format_version"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = fresh()
    go_on_from(again, checkpoint)
    assert_same_state(again, model)


# Another run is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_bits": 4},
        {"activation_bits": 8},
        {"first_last_bits": 4},
        {"quantizer": "lsq_plus"},
        {"activation_mode": "signed"},
        {"modules_to_not_convert": ["classifier"]},
        {"overrides": {"*.fc1": {"weight_bits": 8}}},
        {"quantize_attention": True},
        {"first_last_modules": ["classifier"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("changed", ["the model", "the checkpoint"])
def test_a_model_that_is_quantized_otherwise(fields, changed, tmp_path):
    """Its tensors may have the same names and shapes: only the settings tell that they mean something else."""
    checkpoint = checkpoint_of(quantized(**{**W3, **(fields if changed == "the checkpoint" else {})}), tmp_path)
    model = fresh(**(fields if changed == "the model" else {}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=rf"was saved with {name}=.*, but this .* is quantized with {name}=") as error:
        go_on_from(model, checkpoint)
    assert repr(value) in str(error.value)
    assert all(same_values(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_first_values_may_be_found_otherwise(tmp_path):
    """`scale_init` says where training begins, and it has begun."""
    model = quantized(**W3)
    again = fresh(scale_init="mean")
    go_on_from(again, checkpoint_of(model, tmp_path))
    assert_same_state(again, model)


def test_a_float_checkpoint_says_that_it_is_one(tmp_path):
    vit().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="float is a checkpoint of a float model, but this ViT.* is quantized"):
        go_on_from(fresh(), str(tmp_path / "float"))
    quantized(**W3).save_pretrained(tmp_path / "quantized")
    with pytest.raises(ValueError, match="quantized is a checkpoint of a quantized model, but this ViT.* is in float"):
        go_on_from(vit(), str(tmp_path / "quantized"))


def test_a_packed_model_says_that_it_is_one(tmp_path):
    """What `save_model` writes is for use; its folder is easily taken for the place where the run stopped."""
    pack(quantized(**W3)).save_pretrained(tmp_path)
    assert "it holds packed integers, for inference" in str(what_is_missing(tmp_path))
    trainer = SAQTrainer(quantized(**W3), arguments(tmp_path), train_dataset=Images(8, torch.float32))
    with pytest.raises(ValueError, match="holds packed integers, for inference; .* are in a checkpoint-N folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


def test_a_saved_model_that_is_no_checkpoint(tmp_path):
    quantized(**W3).save_pretrained(tmp_path)
    assert "it is a saved model and not a training checkpoint" in str(what_is_missing(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("classifier.weight"), r"lacks 1 tensor\(s\) \(for example classifier.weight\)"),
        (lambda tensors: tensors.update(other=torch.ones(2)), r"does not have 1 tensor\(s\) \(for example other\)"),
        (
            lambda tensors: tensors.update({"classifier.bias": torch.ones(7)}),
            r"classifier.bias is torch.float32 of shape \(7,\), but classifier.bias .* of shape \(3,\)",
        ),
        (
            lambda tensors: tensors.update({"classifier.bias": torch.ones(3, dtype=torch.float64)}),
            r"classifier.bias is torch.float64 .* is torch.float32",
        ),
    ],
    ids=["missing", "left-over", "shape", "type"],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    """Nothing is loaded unless all of it fits."""
    checkpoint = checkpoint_of(quantized(**W3), tmp_path)
    edit_weights(tmp_path, change)
    model = fresh()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_exactly(model, checkpoint)
    assert all(same_values(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_in_shards(tmp_path):
    model = quantized(**W3)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = fresh()
    go_on_from(again, str(tmp_path))
    assert_same_state(again, model)


# Under FSDP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded_trainer(tmp_path, monkeypatch):
    """A trainer that believes in FSDP; what `Trainer` itself would load and save there is left out."""

    def build(model: nn.Module) -> SAQTrainer:
        trainer = SAQTrainer(model, arguments(tmp_path / "run"), train_dataset=Images(8, torch.float32))
        trainer.is_fsdp_enabled = True
        plugin = SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")
        trainer.accelerator.state.fsdp_plugin = plugin
        return trainer

    loaded = []
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda self, directory, model=None: loaded.append(directory))
    monkeypatch.setattr(Trainer, "save_model", lambda self, directory, internal: Path(directory).mkdir())
    build.loaded = loaded
    yield build
    AcceleratorState._reset_state(reset_partial_state=False)


def test_sharded_checkpoints_know_their_settings(sharded_trainer, tmp_path):
    """A run under FSDP goes on with the same settings, and is refused with others before anything is loaded."""
    shards = str(tmp_path / "shards")
    sharded_trainer(quantized(**W3)).save_model(shards, _internal_call=True)
    assert [file.name for file in Path(shards).iterdir()] == ["config.json"]
    sharded_trainer(fresh())._load_from_checkpoint(shards)
    assert sharded_trainer.loaded == [shards]
    with pytest.raises(ValueError, match="shards was saved with weight_bits=3, but this ViT.* with weight_bits=4"):
        sharded_trainer(fresh(weight_bits=4))._load_from_checkpoint(shards)
    with pytest.raises(ValueError, match="quantized model, but this ViT.* is in float"):
        trainer = sharded_trainer(fresh())
        trainer.model = vit()
        trainer._load_from_checkpoint(shards)
    assert sharded_trainer.loaded == [shards]


def test_layers_that_were_left_in_float_are_named_under_fsdp(sharded_trainer, tmp_path):
    """Nothing takes quantizers out of a model that is sharded: the user lists them."""
    model = quantized(**W3)
    leave_in_float(model, ["vit.layers.0.mlp.fc1"], "idle")
    shards = str(tmp_path / "shards")
    sharded_trainer(model).save_model(shards, _internal_call=True)
    with pytest.raises(ValueError, match=r"shards has vit.layers.0.mlp.fc1 in float.* modules_to_not_convert"):
        sharded_trainer(fresh())._load_from_checkpoint(shards)
    sharded_trainer(fresh(modules_to_not_convert=["vit.layers.0.mlp.fc1"]))._load_from_checkpoint(shards)
    assert sharded_trainer.loaded == [shards]

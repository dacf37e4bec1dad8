"""What does not fit together is refused: a checkpoint never loads silently as something else."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from checkpoint_files import edit_config, edit_weights, load, weights_file
from quantized_models import assert_same_state
from tiny_models import vit
from torch import Tensor, nn
from transformers import AutoConfig

from hf_saq import pack


def without(ending: str):
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[next(name for name in sorted(tensors) if name.endswith(ending))]

    return change


@pytest.mark.parametrize(
    ("storage", "ending"),
    [
        *(("packed", name) for name in ("weight_scale", "packed_weight", "classifier.bias")),
        *((storage, "activation_quantizer.scale") for storage in ("packed", "float")),
        *((storage, "activation_quantizer.range_state") for storage in ("packed", "float")),
        *(("float", f"weight_quantizer.{name}") for name in ("scale", "range_state")),
    ],
)
def test_missing_tensors_raise(storage: str, ending: str, model: nn.Module, own_packed_dir: Path):
    if storage == "float":
        model.save_pretrained(own_packed_dir)
    edit_weights(own_packed_dir, without(ending), sealed=storage == "packed")
    message = rf"^The checkpoint of this ViTForImageClassification lacks 1 tensor\(s\) .*'classifier\..*'{storage}'"
    with pytest.raises(ValueError, match=message):
        load(own_packed_dir)


def test_a_float_weights_file_under_a_quantized_configuration_raises(own_packed_dir: Path):
    for storage in ("float", "packed"):
        edit_config(own_packed_dir, storage=storage)
        vit().save_pretrained(own_packed_dir / "weights")
        weights_file(own_packed_dir).write_bytes(weights_file(own_packed_dir / "weights").read_bytes())
        message = {
            "float": r"lacks \d+ tensor\(s\) of the quantized model",
            "packed": "the header has no 'hf_saq' entry",
        }
        with pytest.raises(ValueError, match=message[storage]):
            load(own_packed_dir)


@pytest.mark.parametrize("storage", ["float", "packed"])
def test_a_float_model_with_the_configuration_of_a_quantized_one(storage: str, model: nn.Module, tmp_path: Path):
    """`ViTForImageClassification(quantized.config)`, for a teacher or to begin anew, is float, and transformers saves
    that configuration with it. The error says how to load what was saved."""
    (model if storage == "float" else pack(model)).save_pretrained(tmp_path / "quantized")
    plain = type(model)(AutoConfig.from_pretrained(tmp_path / "quantized"))
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="configuration of a quantized one.*delete quantization_config"):
        load(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = load(tmp_path).state_dict()
    assert loaded.keys() == plain.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in plain.state_dict().items())


@pytest.fixture
def load_report(caplog):
    """What transformers logs about tensors that do not fit; its own error only points there."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)


def cut_classifier(tensors: dict[str, Tensor]) -> None:
    tensors["classifier.packed_weight"] = tensors["classifier.packed_weight"][:-1].clone()


def test_truncated_codes_raise(own_packed_dir: Path, load_report):
    edit_weights(own_packed_dir, cut_classifier, sealed=True)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(own_packed_dir)
    assert re.search(
        r"classifier.packed_weight .* ckpt: torch.Size\(\[47\]\) vs model:torch.Size\(\[48\]\)", load_report.text
    )


def test_truncated_codes_raise_also_where_mismatches_are_ignored(own_packed_dir: Path):
    edit_weights(own_packed_dir, cut_classifier, sealed=True)
    with pytest.raises(ValueError, match=r"lacks 1 tensor\(s\) of .*, for example \['classifier.packed"):
        load(own_packed_dir, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    "change",
    [
        {"weight_bits": 3},
        {"activation_bits": 5},  # no tensor would show it
        {"first_last_bits": 4},
        {"quantizer": "lsq_plus"},
        {"weight_granularity": "channel"},
        {"activation_mode": "signed"},
        {"modules_to_not_convert": ["classifier"]},
        {"overrides": [["*.fc2", {"weight_bits": 4}]]},
        {"storage": "float"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_configuration_that_contradicts_the_tensors_raises(change: dict, own_packed_dir: Path):
    edit_config(own_packed_dir, **change)
    ((field, value),) = change.items()
    message = (
        rf"^config.json: quantization_config.{field} is {re.escape(repr(value))}, but {own_packed_dir}/model.safe"
    )
    with pytest.raises(ValueError, match=message):
        load(own_packed_dir)


def set_state_to_7(tensors: dict[str, Tensor]) -> None:
    tensors["classifier.activation_quantizer.range_state"].fill_(7)


def test_a_damaged_state_raises(own_packed_dir: Path):
    edit_weights(own_packed_dir, set_state_to_7, sealed=True)
    message = r"^classifier.activation_quantizer.range_state is 7; expected 35 \(not calibrated\), 50 \(unsigned\)"
    with pytest.raises(ValueError, match=message):
        load(own_packed_dir)


def test_a_truncated_file_raises(own_packed_dir: Path):
    content = weights_file(own_packed_dir).read_bytes()
    weights_file(own_packed_dir).write_bytes(content[:-100])
    with pytest.raises(ValueError, match=rf"^{weights_file(own_packed_dir)} cannot be read \(.*cut off or damaged"):
        load(own_packed_dir)


def test_bad_stored_configurations_raise(own_packed_dir: Path):
    edit_config(own_packed_dir, group_size=8)
    with pytest.raises(ValueError, match=r"quantization_config has unknown keys \['group_size'\]"):
        load(own_packed_dir)
    edit_config(own_packed_dir, format_version=9)
    with pytest.raises(ValueError, match="format_version is 9, but this hf_saq reads up to 2; install a newer one"):
        load(own_packed_dir)


def test_a_newer_float_storage_loads_with_a_warning(model: nn.Module, tmp_path: Path):
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, format_version=3, group_size=8)
    with pytest.warns(UserWarning, match=r"format_version is 3, .* Ignored keys: \['group_size'\]"):
        loaded = load(tmp_path)
    assert_same_state(loaded, model)


def test_a_directory_that_is_not_a_checkpoint_raises(packed_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=f"Unrecognized model in {tmp_path}"):
        load(tmp_path)
    (tmp_path / "config.json").write_bytes((packed_dir / "config.json").read_bytes())
    with pytest.raises(OSError, match=f"no file named model.safetensors.* found in directory {tmp_path}"):
        load(tmp_path)

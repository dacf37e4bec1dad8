"""Which files are weights, for everything that counts, removes, downloads or resumes from them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from tiny_models import images, vit
from training import BATCH, Images, arguments, quantized_model
from transformers.modeling_utils import _add_variant
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, calibrate, pack, quantize
from hf_saq.hub import write_card
from hf_saq.storage import inspect_checkpoint, staged, weight_file_bytes
from hf_saq.storage.saved_directory import NEEDED_FILES
from hf_saq.storage.weight_files import holds_weights, is_index, is_model_file, is_weight_file, weight_files
from hf_saq.tables import kibibytes
from hf_saq.training import what_is_missing

SHARD = "model-00001-of-00002.safetensors"
MODEL = {SAFE_WEIGHTS_NAME, SHARD, SAFE_WEIGHTS_INDEX_NAME}
OTHER_WEIGHTS = {
    WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model_fsdp.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    _add_variant(SAFE_WEIGHTS_NAME, "fp16"),
    _add_variant(SAFE_WEIGHTS_INDEX_NAME, "fp16"),
    "model.fp16-00001-of-00002.safetensors",
}
NO_WEIGHTS = {
    "perturbation_state_0.safetensors",
    "schedule-0.safetensors",
    "my_model.safetensors",
    "model.safetensors.bak",
    "model-1-of-2.safetensors",
    "model-00001-of-00002.safetensors.bak",
    "onnx/model.safetensors",
    "pytorch_model_parts/0.bin",
    "last-checkpoint/model.safetensors",
    "training_args.bin",
    "optimizer.bin",
    "config.json",
}


@pytest.mark.parametrize("name", sorted(MODEL | OTHER_WEIGHTS | NO_WEIGHTS))
def test_names(name: str):
    assert is_model_file(name) == (name in MODEL)
    assert is_weight_file(name) == (name not in NO_WEIGHTS)
    assert is_index(name) == (".index" in name and "fp16" not in name)


def test_what_is_downloaded_to_be_inspected():
    offered = MODEL | OTHER_WEIGHTS | NO_WEIGHTS | {"preprocessor_config.json", "last-checkpoint/config.json"}
    taken = {name for name in offered if any(fnmatchcase(name, pattern) for pattern in NEEDED_FILES)}
    assert taken == MODEL | {"config.json", "preprocessor_config.json"}


def test_sizes(tmp_path: Path):
    assert weight_file_bytes(tmp_path) is None
    for size, name in enumerate([SHARD, "model-00002-of-00002.safetensors", "perturbation_state_0.safetensors"], 3):
        (tmp_path / name).write_bytes(size * b"x")
    (tmp_path / SAFE_WEIGHTS_INDEX_NAME).write_text("{}")
    assert [file.name for file in weight_files(tmp_path)] == [SHARD, "model-00002-of-00002.safetensors"]
    assert weight_file_bytes(tmp_path) == 3 + 4


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "fsdp_0/__0_0.distcp", "notes.safetensors"]
)
def test_what_a_run_can_go_on_from(name: str, tmp_path: Path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x")
    assert holds_weights(tmp_path) == (name != "notes.safetensors")


def test_a_save_removes_what_it_replaces_and_nothing_else(tmp_path: Path):
    for name in MODEL | OTHER_WEIGHTS | {name for name in NO_WEIGHTS if "/" not in name}:
        (tmp_path / name).write_text("old")
    with staged(tmp_path) as stage:
        (stage / SAFE_WEIGHTS_NAME).write_text("new")
    left = {file.name for file in tmp_path.iterdir()}
    assert left == (OTHER_WEIGHTS | NO_WEIGHTS | {SAFE_WEIGHTS_NAME}) - {n for n in NO_WEIGHTS if "/" in n}


def test_the_state_of_a_schedule_is_no_weights(tmp_path: Path):
    """A checkpoint of a schedule with a memory, inspected and given a card; `eps` is not taken for a scale."""
    trainer = SAQTrainer(
        quantized_model("vit", torch.float32),
        arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2),
        saq_config=SAQConfig(rho=0.1, reuse="stale", interval=2),
        train_dataset=Images(BATCH * 2, torch.float32),
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "perturbation_state_0.safetensors").is_file()
    size = (checkpoint / "model.safetensors").stat().st_size
    found = inspect_checkpoint(str(checkpoint))
    assert found.files == {"model.safetensors": size}
    scales = {layer.name: layer.scale_min for layer in found.layers}
    for name, scale in scales.items():
        assert scale == trainer.model.get_submodule(name).weight_quantizer.scale.min().item()
    assert f"| {kibibytes(size)} |" in write_card(checkpoint).read_text()
    assert what_is_missing(checkpoint) is None
    (checkpoint / "model.safetensors").unlink()
    assert what_is_missing(checkpoint) == "it holds no weights"
    with pytest.raises(ValueError, match="has no weight file"):
        inspect_checkpoint(str(checkpoint))


def test_a_variant_alone_is_named(tmp_path: Path):
    quantize(vit(), SAQQuantizationConfig()).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match=r"has no weight file .* Its model.fp16.safetensors are of a variant"):
        inspect_checkpoint(str(tmp_path))


def test_all_shards_are_inspected(tmp_path: Path):
    model = pack(calibrate(quantize(vit(), SAQQuantizationConfig()), [images()]).eval())
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    found = inspect_checkpoint(str(tmp_path))
    assert len(found.files) > 2 and found.weight_bytes == weight_file_bytes(tmp_path)
    assert all(layer.scales == 1 and layer.weight_bytes for layer in found.layers)

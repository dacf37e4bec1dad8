"""Where checkpoints may lie and how they may be loaded: shards, devices, subfolders, revisions, timm, without us."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import load
from processes import run_python
from quantized_models import assert_same_codes, assert_same_state, codes, quantized
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import images, resnet, vit
from torch import nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hf_saq import SAQQuantizationConfig, calibrate, conversion, dequantize, pack, quantize
from hf_saq.conversion import is_packed
from hf_saq.layers import PackedLayer
from hf_saq.storage.seal import KEY

FORMS = {"float": lambda model: model, "packed": pack}
either_storage = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return quantized(quantizer="lsq_plus", weight_granularity="channel", overrides={"*.fc2": {"weight_bits": 3}})


@pytest.fixture(scope="module")
def packed_dir(model: nn.Module, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("packed")
    pack(model).save_pretrained(directory)
    return directory


def timm_model() -> nn.Module:
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args=arguments,
        num_labels=3,
        pretrained_cfg={"input_size": [3, 16, 16]},
    )
    return TimmWrapperForImageClassification(config).eval()


# Shards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(model: nn.Module, tmp_path: Path) -> Path:
    pack(model).save_pretrained(tmp_path, max_shard_size="2KB")
    return tmp_path


@either_storage
def test_shards(form, model: nn.Module, tmp_path: Path):
    saved = form(model)
    saved.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    loaded, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_state(loaded, saved)
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    seals = set()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            seals.add(file.metadata().get(KEY))
    assert len(seals) == 1 and (None in seals) == (form is not pack)


def test_a_missing_shard_raises(sharded: Path):
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=f"^{victim} is missing, a file of weights that"):
        load(sharded)


def test_a_cut_off_shard_raises(sharded: Path):
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"^{victim} cannot be read"):
        load(sharded)


def test_shards_of_two_saves_raise(sharded: Path, model: nn.Module, tmp_path_factory):
    other, saved = tmp_path_factory.mktemp("other"), pack(model)
    with torch.no_grad():
        saved.classifier.bias += 1  # the same sizes, so that every name is there
    saved.save_pretrained(other, max_shard_size="2KB")
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.write_bytes((other / victim.name).read_bytes())
    with pytest.raises(ValueError, match=f"^{victim}: its 'hf_saq' entry is not that of .*different saves"):
        load(sharded)


# Ways of loading -----------------------------------------------------------------------------------------------------


@either_storage
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_device_map(form, device_map, model: nn.Module, tmp_path: Path):
    form(model).save_pretrained(tmp_path)
    loaded = load(tmp_path, device_map=device_map)
    assert torch.equal(loaded(images()).logits, model(images()).logits)


@either_storage
def test_offloading_raises(form, model: nn.Module, tmp_path: Path):
    form(model).save_pretrained(tmp_path)
    device_map = {"vit.embeddings": "cpu", "vit.layers": "disk", "vit.layernorm": "cpu", "classifier": "cpu"}
    with pytest.raises(ValueError, match=r"^device_map leaves \d+ tensor\(s\) .*, for example vit.layers.0"):
        load(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload", offload_buffers=True)


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", "auto"], ids=str)
def test_dtype(dtype, packed_dir: Path, model: nn.Module):
    loaded = load(packed_dir, dtype=dtype)
    expected = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
    assert loaded.dtype == loaded.classifier.weight.dtype == loaded.classifier.quantized_weight().dtype == expected
    assert loaded.classifier.weight_scale.dtype == torch.float32
    assert_same_codes(codes(loaded), codes(model))
    logits = loaded(images().to(expected)).logits
    assert logits.dtype == expected and logits.isfinite().all()
    assert dtype != "auto" or torch.equal(logits, model(images()).logits)


def test_subfolder(packed_dir: Path, model: nn.Module, tmp_path: Path):
    shutil.copytree(packed_dir, tmp_path / "inner")
    assert_same_codes(codes(load(tmp_path, subfolder="inner")), codes(model))
    config = json.loads((tmp_path / "inner" / "config.json").read_text())
    (tmp_path / "inner" / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match="inner/config.json: layer_norm_eps changed since model.safetensors was"):
        load(tmp_path, subfolder="inner")


def test_revision(packed_dir: Path, model: nn.Module, tmp_path: Path):
    """Two revisions in a cache laid out as huggingface_hub lays it out, where files are links into a pool."""
    other = quantized(weight_bits=2)
    pack(other).save_pretrained(tmp_path / "other")
    cache = tmp_path / "cache" / "models--someone--vit"
    (cache / "refs").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for revision, source in (("main", packed_dir), ("two-bits", tmp_path / "other")):
        commit = {"main": "a" * 40, "two-bits": "b" * 40}[revision]
        (cache / "refs" / revision).write_text(commit)
        (cache / "snapshots" / commit).mkdir(parents=True)
        for file in source.iterdir():
            blob = cache / "blobs" / f"{revision}-{file.name}"
            blob.write_bytes(file.read_bytes())
            (cache / "snapshots" / commit / file.name).symlink_to(os.path.relpath(blob, cache / "snapshots" / commit))
    for revision, expected in (("main", model), ("two-bits", other), ("b" * 40, other)):
        assert_same_codes(codes(load("someone/vit", revision=revision, cache_dir=tmp_path / "cache")), codes(expected))


def test_memory_is_not_allocated_for_float_weights(packed_dir: Path, monkeypatch):
    """The model is built on the meta device, and stays there until integers come from the file."""
    seen = []

    def convert_to_packed(model, config):
        original(model, config)
        seen.append({tensor.device.type for tensor in [*model.parameters(), *model.buffers()]})

    original = conversion.convert_to_packed
    monkeypatch.setattr(conversion, "convert_to_packed", convert_to_packed)
    load(packed_dir)
    assert seen == [{"meta"}]


def test_a_packed_model_holds_its_bits(tmp_path: Path):
    model = quantized(weight_bits=4, first_last_bits=None)
    pack(model).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    layers = [layer for layer in loaded.modules() if isinstance(layer, PackedLayer)]
    assert len(layers) == len(codes(model))
    in_float = 4 * sum(code.numel() for code in codes(model).values())
    in_memory = sum(b.untyped_storage().nbytes() for layer in layers for b in layer.buffers(recurse=False))
    scales = 4 * len(layers)
    assert in_memory == in_float / 8 + scales
    loaded(images())  # decoding leaves nothing behind
    assert in_memory == sum(b.untyped_storage().nbytes() for layer in layers for b in layer.buffers(recurse=False))
    assert not any(p.ndim > 1 and p.shape[0] > 3 for layer in layers for p in layer.parameters())


# timm ----------------------------------------------------------------------------------------------------------------


@either_storage
def test_timm_models(form, tmp_path: Path):
    original = timm_model()
    original.save_pretrained(tmp_path / "float")
    model = load(tmp_path / "float", quantization_config=SAQQuantizationConfig(weight_bits=3))
    calibrate(model, [images()]).eval()
    form(model).save_pretrained(tmp_path / "quantized")
    loaded = load(tmp_path / "quantized")
    assert is_packed(loaded) == (form is pack)
    assert_same_codes(codes(loaded), codes(model))
    assert torch.equal(loaded(images(seed=1)).logits, model(images(seed=1)).logits)
    restored = dequantize(loaded)
    assert [type(m) for m in restored.modules()] == [type(m) for m in original.modules()]


# Without this package ---------------------------------------------------------------------------------------------


SCRIPT = """
import sys, warnings
from transformers import AutoModelForImageClassification
warnings.simplefilter("ignore")
for directory in sys.argv[1:]:
    for ignore in (False, True):
        try:
            AutoModelForImageClassification.from_pretrained(directory, ignore_mismatched_sizes=ignore)
            outcome = "loaded"
        except RuntimeError as error:
            outcome = "RuntimeError"
        print(f"== {outcome}", file=sys.stderr)
assert not any(name.startswith("hf_saq") for name in sys.modules)
"""


def test_without_this_package(packed_dir: Path, tmp_path: Path):
    """Packed: an error, and only a report where the user told transformers to ignore mismatches. ViT is stored under
    legacy names that transformers renames, the others under the names of their modules."""
    for name, model in {"resnet": resnet(), "timm": timm_model()}.items():
        pack(calibrate(quantize(model, SAQQuantizationConfig()), [images()])).save_pretrained(tmp_path / name)
    quantized(vit).save_pretrained(tmp_path / "float")
    directories = [packed_dir, tmp_path / "resnet", tmp_path / "timm", tmp_path / "float"]
    assert any(".encoder.layer." in name for name in load_file(packed_dir / "model.safetensors"))
    done = run_python("-c", SCRIPT, *directories)
    *said, _ = re.split(r"(?<=== loaded)\n|(?<=== RuntimeError)\n", done.stderr)
    for i, text in enumerate(said):
        assert "Unknown quantization type, got saq" in text
        assert re.search(r"import_hf_saq_first__this_model_is_quantized +\| UNEXPECTED", text)
        if directories[i // 2].name == "float":  # the latent weights, unquantized, as the warning says
            assert text.endswith("== loaded") and "UNEXPECTED" in text
        else:  # the report of transformers says which tensors do not fit
            assert text.endswith("== loaded" if i % 2 else "== RuntimeError")
            assert text.count("MISMATCH") >= 2 and "UNEXPECTED" in text
    assert len(said) == 8

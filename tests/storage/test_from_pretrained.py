"""`from_pretrained` and `save_pretrained` of quantized models: what comes back is what was saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import load, weights_file
from PIL import Image
from quantized_models import assert_same_codes, assert_same_state, codes, quantized
from safetensors import safe_open
from tiny_models import IMAGE_SIZE, TRANSFORMERS_MODELS, images, vit
from torch import nn
from transformers import ViTImageProcessor, pipeline
from transformers.quantizers import AutoHfQuantizer

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.conversion.calibration import is_calibrated
from hf_saq.conversion.forms import is_packed
from hf_saq.layers.packing import packed_size
from hf_saq.storage.from_pretrained import SAQHfQuantizer, register

every_family = pytest.mark.parametrize("build", TRANSFORMERS_MODELS.values(), ids=TRANSFORMERS_MODELS)


# A float checkpoint ------------------------------------------------------------------------------------------------


@every_family
def test_a_float_checkpoint_becomes_what_quantize_makes_of_it(build, tmp_path):
    build().save_pretrained(tmp_path)
    config = SAQQuantizationConfig(weight_bits=3, weight_granularity="channel", scale_init="mean")
    loaded, info = load(tmp_path, quantization_config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = quantize(build(), config)
    assert_same_state(loaded, expected)
    assert not loaded.training and str(loaded.quantization_report) == str(expected.quantization_report)
    assert not is_calibrated(loaded)
    x = images()
    assert torch.equal(calibrate(loaded, [x])(x).logits, calibrate(expected, [x]).eval()(x).logits)


def test_a_float_checkpoint_with_a_new_head(tmp_path):
    vit().save_pretrained(tmp_path)
    torch.manual_seed(0)
    kwargs = {"num_labels": 7, "ignore_mismatched_sizes": True, "id2label": {i: str(i) for i in range(7)}}
    loaded = load(tmp_path, quantization_config=SAQQuantizationConfig(), **kwargs)
    assert loaded.classifier.weight.shape == (7, 16) and loaded.classifier.weight.std() > 0
    fitted = copy.deepcopy(loaded.classifier.weight_quantizer)
    fitted.initialize(loaded.classifier.weight)
    assert torch.equal(loaded.classifier.weight_quantizer.scale, fitted.scale)


def test_weights_stay_trainable(tmp_path):
    vit().save_pretrained(tmp_path)
    loaded = calibrate(load(tmp_path, quantization_config=SAQQuantizationConfig()), [images()]).train()
    loaded(images(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.requires_grad and p.grad is not None for n, p in loaded.named_parameters())
    assert loaded.hf_quantizer.is_trainable and loaded.hf_quantizer.is_qat_trainable


def test_packed_storage_for_a_float_checkpoint_raises(tmp_path):
    vit().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^SAQQuantizationConfig.storage='packed' describes a stored checkpoint, but"):
        load(tmp_path, quantization_config=SAQQuantizationConfig(storage="packed"))


def test_bad_names_raise_while_loading(tmp_path):
    vit().save_pretrained(tmp_path)
    # The name on disk, where ViT is stored under legacy names, instead of the name of the module.
    config = SAQQuantizationConfig(modules_to_not_convert=["vit.encoder.layer.0"])
    with pytest.raises(ValueError, match="modules_to_not_convert: 'vit.encoder.layer.0' matches no module"):
        load(tmp_path, quantization_config=config)


# Float storage -----------------------------------------------------------------------------------------------------


@every_family
def test_float_storage_comes_back_exactly(build, tmp_path):
    model = quantized(build, weight_bits=3, overrides={"*.0.*": {"weight_bits": 2}})
    model.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_state(loaded, model)
    assert_same_codes(codes(loaded), codes(model))
    assert torch.equal(loaded(images(seed=1)).logits, model(images(seed=1)).logits)
    assert loaded.config.quantization_config == model.config.quantization_config


def test_what_was_not_calibrated_comes_back_not_calibrated(tmp_path):
    quantize(vit(), SAQQuantizationConfig()).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert not is_calibrated(loaded)
    with pytest.raises(RuntimeError, match="^vit.embeddings.patch_embeddings.projection.activation_quantizer: this"):
        loaded(images())
    assert is_calibrated(calibrate(loaded, [images()]))


def test_overrides_win_in_the_same_order_after_loading(tmp_path):
    """`config.json` is written with sorted keys; these two patterns sort the other way round."""
    overrides = {"vit.layers.*": {"weight_bits": 5}, "*.fc1": {"weight_bits": 2}}
    model = quantized(overrides=overrides)
    model.save_pretrained(tmp_path / "float")
    pack(model).save_pretrained(tmp_path / "packed")
    for storage in ("float", "packed"):
        loaded = load(tmp_path / storage)
        assert_same_codes(codes(loaded), codes(model))
        assert list(loaded.config.quantization_config.overrides) == list(overrides)


# Packed storage ----------------------------------------------------------------------------------------------------


@every_family
def test_packed_storage_comes_back_exactly(build, tmp_path):
    # LIQ has an offset, and one of each per channel: the most that a packed layer can have to store.
    model = quantized(build, quantizer="liq", weight_granularity="channel")
    packed = pack(model)
    packed.save_pretrained(tmp_path)
    loaded, info = load(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert is_packed(loaded) and not loaded.training
    assert_same_state(loaded, packed)
    assert_same_codes(codes(loaded), codes(model))
    x = images(seed=1)
    assert torch.equal(loaded(x).logits, packed(x).logits)
    assert torch.equal(packed(x).logits, model(x).logits)


@pytest.mark.parametrize("bits", range(2, 9), ids=lambda bits: f"{bits}bit")
def test_every_width(bits: int, tmp_path):
    model = quantized(weight_bits=bits, activation_bits=bits, first_last_bits=None)
    pack(model).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same_codes(codes(loaded), codes(model))
    assert torch.equal(loaded(images(seed=1)).logits, model(images(seed=1)).logits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8], ids=lambda bits: f"{bits}bit")
def test_weights_take_their_bits_on_disk(bits: int, tmp_path):
    model = quantized(weight_bits=bits, first_last_bits=None)
    pack(model).save_pretrained(tmp_path)
    expected = {name: code.numel() for name, code in codes(model).items()}
    with safe_open(weights_file(tmp_path), "pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 (not a dict)
    packed_sizes = sorted(size for name, size in sizes.items() if name.endswith("packed_weight"))
    assert packed_sizes == sorted(packed_size(count, bits) for count in expected.values())
    weights = sum(expected.values()) * bits // 8
    assert sum(packed_sizes) == weights  # every weight here fills whole bytes
    # Nothing else holds them: what remains are the tensors that were not quantized, and for each layer two scales of
    # four bytes and a state of four.
    others = sum(p.nbytes for p in vit().parameters()) - 4 * sum(expected.values())
    assert sum(sizes.values()) == weights + others + len(expected) * (4 + 4 + 4)
    header = int.from_bytes(weights_file(tmp_path).read_bytes()[:8], "little")
    assert weights_file(tmp_path).stat().st_size == sum(sizes.values()) + header + 8


def test_saving_again_writes_the_same(packed_dir: Path, tmp_path: Path):
    loaded = load(packed_dir)
    loaded.save_pretrained(tmp_path)
    again, before = weights_file(tmp_path).read_bytes(), weights_file(packed_dir).read_bytes()
    # The header is JSON whose metadata safetensors writes in no fixed order.
    start = 8 + int.from_bytes(before[:8], "little")
    assert json.loads(again[8:start]) == json.loads(before[8:start])
    assert again[start:] == before[start:]
    assert (tmp_path / "config.json").read_text() == (packed_dir / "config.json").read_text()


def test_float_storage_can_be_saved_and_packed_after_loading(model: nn.Module, tmp_path: Path):
    model.save_pretrained(tmp_path / "one")
    loaded = load(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert weights_file(tmp_path / "one").read_bytes() == weights_file(tmp_path / "two").read_bytes()
    pack(loaded).save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert_same_codes(codes(again), codes(model))
    assert torch.equal(again(images()).logits, model(images()).logits)


def test_stored_configuration_wins_over_one_that_is_passed(packed_dir: Path, model: nn.Module):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = load(packed_dir, quantization_config=SAQQuantizationConfig(weight_bits=8))
    assert_same_codes(codes(loaded), codes(model))


@pytest.mark.parametrize("source", ["float checkpoint", "float storage", "packed storage"])
def test_loading_in_bfloat16(source: str, tmp_path: Path):
    """Weights are bfloat16, the learned scales float32: rounded to 8 bits of mantissa they would move the grid."""
    x = images()
    config = SAQQuantizationConfig(weight_bits=8, activation_bits=8)
    model = calibrate(quantize(vit(), config), [x]).eval()
    stored = {"float checkpoint": vit(), "float storage": model, "packed storage": pack(model)}[source]
    stored.save_pretrained(tmp_path)
    kwargs = {"quantization_config": config} if source == "float checkpoint" else {}
    loaded = load(tmp_path, dtype=torch.bfloat16, **kwargs)
    if not is_calibrated(loaded):
        calibrate(loaded, [x.bfloat16()])
    assert loaded.dtype == torch.bfloat16
    types = {name.rsplit(".", 1)[-1]: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert types["bias"] == types["weight"] == torch.bfloat16
    assert types["scale"] == types.get("weight_scale", torch.float32) == torch.float32
    logits, reference = loaded(x.bfloat16()).logits, model(x).logits
    assert logits.dtype == torch.bfloat16
    # Measured 0.02 to 0.04 on logits of standard deviation 1.
    torch.testing.assert_close(logits.float(), reference, rtol=0, atol=0.1)
    again = loaded if is_packed(loaded) else pack(loaded)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(load(tmp_path / "again")(x.bfloat16()).logits, logits)


def test_pipeline_classifies_an_image(packed_dir: Path, own_packed_dir: Path):
    processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    processor.save_pretrained(own_packed_dir)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    classify = pipeline("image-classification", model=str(own_packed_dir))
    assert is_packed(classify.model)
    found = {entry["label"]: entry["score"] for entry in classify(image)}
    inputs = processor(image, return_tensors="pt")
    probabilities = load(packed_dir)(**inputs).logits.softmax(-1)[0]
    assert found == pytest.approx({f"LABEL_{i}": p.item() for i, p in enumerate(probabilities)}, abs=1e-6)


def test_a_packed_checkpoint_does_not_train(packed_dir: Path):
    loaded = load(packed_dir).train()
    with pytest.raises(RuntimeError, match="^vit.embeddings.patch_embeddings.projection: packed weights cannot"):
        loaded(images(), labels=torch.tensor([0, 1, 2, 0]))


# Registration ------------------------------------------------------------------------------------------------------


def test_registering_again_is_harmless():
    register()
    register()
    assert AutoHfQuantizer.supports_quant_method({"quant_method": "saq"})
    assert isinstance(AutoHfQuantizer.from_config(SAQQuantizationConfig()), SAQHfQuantizer)

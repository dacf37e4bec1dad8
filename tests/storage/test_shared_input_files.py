"""Every form, file and graph of a model whose layers share inputs goes on sharing them."""

from __future__ import annotations

import copy
import json
from dataclasses import fields

import onnx
import pytest
import torch
from checkpoint_files import edit_config
from quantized_models import quantized
from resume_runs import STEPS, make_trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharing_models import (
    GROUPS,
    activation_quantizers,
    readers,
    share_one_quantizer,
)
from tiny_models import images, resnet, vit
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification

from hf_saq import SAQQuantizationConfig, calibrate, dequantize, pack, quantize, unpack
from hf_saq.export import export_onnx
from hf_saq.storage.seal import KEY

ALWAYS_THERE = {
    "weight_bits",
    "activation_bits",
    "quantizer",
    "weight_granularity",
    "activation_mode",
    "scale_init",
    "first_last_bits",
    "first_last_modules",
    "quantize_attention",
    "modules_to_not_convert",
    "modules_found_idle",
    "overrides",
    "storage",
    "format_version",
    "quant_method",
}
"""Fields of the first files of format version 2. Files lack those that came later."""


def test_every_form_goes_on_sharing(tmp_path):
    model = quantized(share_inputs=True)
    logits = model(images()).logits
    packed = pack(model)
    model.save_pretrained(tmp_path / "float")
    packed.save_pretrained(tmp_path / "packed")
    forms = {
        "copy": copy.deepcopy(model),
        "packed": packed,
        "packed twice": pack(unpack(packed)),
        "unpacked": unpack(packed),
        "loaded": AutoModelForImageClassification.from_pretrained(tmp_path / "float"),
        "loaded packed": AutoModelForImageClassification.from_pretrained(tmp_path / "packed"),
    }
    for name, form in forms.items():
        assert share_one_quantizer(form), name
        assert readers(form)[0].activation_quantizer is not readers(model)[0].activation_quantizer, name
        assert torch.equal(form.eval()(images()).logits, logits), name
    assert share_one_quantizer(AutoModel.from_pretrained(tmp_path / "float", add_pooling_layer=False))
    assert type(readers(dequantize(model))[1]) is nn.Linear


def test_from_a_float_checkpoint(tmp_path):
    vit().save_pretrained(tmp_path)
    config = SAQQuantizationConfig(share_inputs=True)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=config)
    assert loaded.config.quantization_config.shared_input_modules == GROUPS and share_one_quantizer(loaded)
    direct = calibrate(quantize(vit(), config), [images()])
    assert torch.equal(calibrate(loaded, [images()]).eval()(images()).logits, direct.eval()(images()).logits)


def test_what_is_stored_decides(tmp_path):
    """A checkpoint with a scale for each layer loads with them; groups that are none in this model are refused."""
    quantized().save_pretrained(tmp_path / "apart")
    assert not share_one_quantizer(AutoModelForImageClassification.from_pretrained(tmp_path / "apart"))
    quantized(share_inputs=True).save_pretrained(tmp_path / "shared")
    edit_config(
        tmp_path / "shared", shared_input_modules=[["vit.layers.0.attention.q_proj", "vit.layers.0.attention"]]
    )
    with pytest.raises(ValueError, match=r"vit.layers.0.attention \(not quantized\)"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "shared")


@pytest.mark.parametrize("field", [f.name for f in fields(SAQQuantizationConfig) if f.name not in ALWAYS_THERE])
def test_packed_files_from_before_there_was_a_field_load(field, tmp_path):
    model = pack(quantized())
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = dict(file.metadata())
    seal = json.loads(metadata[KEY])
    for stored in (content["quantization_config"], seal["quantization_config"]):
        del stored[field]
    metadata[KEY] = json.dumps(seal)
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", metadata)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(images()).logits, model(images()).logits)
    default = getattr(SAQQuantizationConfig(), field)
    if isinstance(default, bool):
        edit_config(tmp_path, **{field: not default})
        message = f"quantization_config.{field} is {not default}, but .* was saved with {default}"
        with pytest.raises(ValueError, match=message):
            AutoModelForImageClassification.from_pretrained(tmp_path)


def test_resume_is_exact(tmp_path):
    sharing = SAQQuantizationConfig(weight_bits=3, activation_bits=4, share_inputs=True)

    def trainer(directory, steps=STEPS):
        return make_trainer("vit", tmp_path / directory, quantization_config=sharing, max_steps=steps, save_steps=3)

    whole = trainer("whole")
    whole.train()
    again = trainer("whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert share_one_quantizer(again.model)
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    apart = make_trainer("vit", tmp_path / "apart")
    with pytest.raises(ValueError, match="was saved with share_inputs=True"):
        apart.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))


@pytest.mark.parametrize(
    ("build", "saved"), [(vit, 4), pytest.param(resnet, 1, marks=pytest.mark.slow)], ids=["vit", "resnet"]
)
def test_a_graph_quantizes_once_what_is_shared(build, saved, tmp_path):
    """One node for each quantizer; the export checks itself that the graph has the model's codes and predictions."""
    model = quantized(build, share_inputs=True)
    export_onnx(model, tmp_path / "out", image_size=16)
    graph = onnx.load(tmp_path / "out" / "onnx" / "model_quantized.onnx").graph
    nodes = sum(node.op_type == "QuantizeLinear" for node in graph.node)
    assert nodes == len(activation_quantizers(model)) == len(model.quantization_report.converted) - saved

"""The scale of a model's own input can stay as calibrated, so that no gradient of the images is computed."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_models import layers, quantized
from resume_runs import STEPS, make_trainer
from tiny_models import convnext, images, mobilenet_v2, resnet, timm_efficientnet, vit
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, TrainerCallback

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize, unpack
from hf_saq.analysis.bits.changing import change_bits
from hf_saq.conversion import configuration_of
from hf_saq.quantizers import Quantizer

FIRST = {
    vit: "vit.embeddings.patch_embeddings.projection",
    convnext: "convnext.embeddings.patch_embeddings",
    resnet: "resnet.embedder.embedder.convolution",
    mobilenet_v2: "mobilenet_v2.conv_stem.first_conv.convolution",
    timm_efficientnet: "timm_model.conv_stem",
}


def kept(model: nn.Module) -> list[str]:
    """Names of the quantizers that are not learned; neither is any of their parameters, and all others' are."""
    found = [name for name, m in model.named_modules() if isinstance(m, Quantizer) and not m.learned]
    for name, m in model.named_modules():
        if isinstance(m, Quantizer):
            assert {p.requires_grad for p in m.parameters()} == {m.learned}, name
    return found


@pytest.mark.parametrize("build", FIRST, ids=lambda build: build.__name__)
@pytest.mark.parametrize("fields", [{}, {"first_last_bits": None}, {"quantizer": "lsq_plus"}], ids=str)
def test_it_is_the_quantizer_of_the_first_layer(build, fields):
    assert kept(quantize(build(), SAQQuantizationConfig(learn_input_scale=False, **fields))) == [
        f"{FIRST[build]}.activation_quantizer"
    ]
    assert kept(quantize(build(), SAQQuantizationConfig(**fields))) == []


def test_nothing_is_kept_where_the_first_layer_quantizes_no_input():
    left_out = {"modules_to_not_convert": ["*.patch_embeddings.*"]}
    for fields in ({"activation_bits": None}, {"overrides": {"*.projection": {"activation_bits": None}}}, left_out):
        assert kept(quantize(vit(), SAQQuantizationConfig(learn_input_scale=False, **fields))) == []


def test_no_gradient_reaches_the_images_and_all_others_are_the_same():
    learning = quantized(resnet, first_last_bits=None).train()
    keeping = quantize(resnet(), SAQQuantizationConfig(first_last_bits=None, learn_input_scale=False))
    keeping.load_state_dict(learning.state_dict())
    read: list[bool] = []
    for model in (learning, keeping.train()):
        convolution = layers(model)[FIRST[resnet]]
        convolution.activation_quantizer.register_forward_hook(lambda _, __, output: read.append(output.requires_grad))
        model(images(), labels=torch.tensor([0, 1] * (len(images()) // 2))).loss.backward()
    assert read == [True, False]
    gradients = {name: p.grad for name, p in learning.named_parameters()}
    scale = f"{FIRST[resnet]}.activation_quantizer.scale"
    assert gradients.pop(scale).abs() > 0 and dict(keeping.named_parameters())[scale].grad is None
    for name, p in keeping.named_parameters():
        assert name == scale or torch.equal(p.grad, gradients[name]), name


def test_every_form_and_file_goes_on_keeping_it(tmp_path):
    model = quantized(learn_input_scale=False)
    packed = pack(model)
    model.save_pretrained(tmp_path / "float")
    packed.save_pretrained(tmp_path / "packed")
    forms = {
        "copy": copy.deepcopy(model),
        "packed": packed,
        "unpacked": unpack(packed),
        "loaded": AutoModelForImageClassification.from_pretrained(tmp_path / "float"),
        "loaded packed": AutoModelForImageClassification.from_pretrained(tmp_path / "packed"),
        "unpacked of loaded": unpack(AutoModelForImageClassification.from_pretrained(tmp_path / "packed")),
        "quantized as it is": quantize(vit(), configuration_of(model)),
    }
    for name, form in forms.items():
        assert kept(form) == [f"{FIRST[vit]}.activation_quantizer"], name
    body = AutoModel.from_pretrained(tmp_path / "float", add_pooling_layer=False)
    assert kept(body) == [f"{FIRST[vit]}.activation_quantizer".removeprefix("vit.")]
    vit().save_pretrained(tmp_path / "of float")
    config = SAQQuantizationConfig(learn_input_scale=False)
    from_float = AutoModelForImageClassification.from_pretrained(tmp_path / "of float", quantization_config=config)
    assert kept(from_float) == [f"{FIRST[vit]}.activation_quantizer"]
    assert configuration_of(quantized()).learn_input_scale and not configuration_of(packed).learn_input_scale


class NoteScales(TrainerCallback):
    def __init__(self):
        self.before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self.before = scales(model)


def scales(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.scale.detach().clone() for n, m in model.named_modules() if isinstance(m, Quantizer)}


def test_training_moves_all_scales_but_it(tmp_path):
    config = SAQQuantizationConfig(learn_input_scale=False)
    trainer = make_trainer("vit", tmp_path, quantization_config=config, save_strategy="no")
    trainer.add_callback(noted := NoteScales())
    trainer.train()
    after = scales(trainer.model)
    still = [name for name, scale in noted.before.items() if torch.equal(scale, after[name])]
    assert still == [f"{FIRST[vit]}.activation_quantizer"] and after[still[0]] > 0


def test_a_checkpoint_goes_on_as_it_began(tmp_path):
    config = SAQQuantizationConfig(learn_input_scale=False)
    whole = make_trainer("vit", tmp_path / "whole", quantization_config=config)
    whole.train()
    resumed = make_trainer("vit", tmp_path / "again", quantization_config=config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{STEPS - 2}"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    other = make_trainer("vit", tmp_path / "other", quantization_config=SAQQuantizationConfig())
    with pytest.raises(ValueError, match="saved with learn_input_scale=False, but this ViTForImageClassification"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{STEPS - 2}"))


def test_other_bits_keep_it_too():
    model = quantized(learn_input_scale=False, first_last_bits=None)
    change_bits(model, {FIRST[vit]: {"activation_bits": 6}})
    calibrate(model, [images()])
    assert kept(model) == [f"{FIRST[vit]}.activation_quantizer"]
    assert model.get_submodule(FIRST[vit]).activation_quantizer.bits == 6
    assert not configuration_of(model).learn_input_scale

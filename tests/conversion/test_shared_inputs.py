"""Layers that read the same tensor are found by structure, and share one quantizer."""

from __future__ import annotations

import pytest
import torch
from quantized_models import quantized
from sharing_models import (
    GROUPS,
    LABELS,
    Two,
    quantized_two,
    readers,
    share_one_quantizer,
    written_to_between,
)
from tiny_models import images, resnet, timm_efficientnet, vit
from torch import nn
from transformers import AutoModelForImageClassification, SegformerConfig, SegformerForImageClassification

from hf_saq import SAQQuantizationConfig, calibrate, conversion, pack, quantize
from hf_saq.analysis import allocate_bits, measure_latencies
from hf_saq.analysis.bits.changing import change_bits
from hf_saq.conversion.shared_inputs import find_shared_inputs, readers_of_the_same_tensor
from hf_saq.quantizers import Quantizer


def test_query_key_and_value_share_the_quantizer_of_the_first():
    model = quantize(vit(), SAQQuantizationConfig(share_inputs=True))
    assert model.quantization_report.shared_inputs == GROUPS
    assert "6 of them read 2 tensors, which are quantized once" in str(model.quantization_report)
    assert model.config.quantization_config.shared_input_modules == GROUPS
    assert share_one_quantizer(model)
    assert not [name for name in model.state_dict() if "k_proj.activation" in name or "v_proj.activation" in name]


def test_only_what_is_the_same_tensor_is_shared():
    """Segformer's key and value read fewer tokens than its query."""
    config = SegformerConfig(
        num_encoder_blocks=1, depths=[1], sr_ratios=[2], hidden_sizes=[8], num_attention_heads=[2], image_size=16
    )
    config.mlp_ratios, config.strides, config.patch_sizes = [2], [4], [7]
    model = SegformerForImageClassification(config)
    linear = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    found = find_shared_inputs(model, linear).groups
    assert [[name.rpartition(".")[2] for name in group] for group in found] == [["k_proj", "v_proj"]]


@pytest.mark.parametrize("build", [resnet, timm_efficientnet, vit], ids=["resnet", "timm", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_shapes_tell_is_what_a_run_shows(build, dtype):
    """A residual block may read its input in a convolution and in a shortcut; an EfficientNet reads nothing twice."""
    model = build().eval()
    layers = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    expected = readers_of_the_same_tensor(layers, lambda: model(images()))
    found = find_shared_inputs(model.to(dtype), list(layers))
    assert found.groups == expected and len(expected) == {resnet: 1, timm_efficientnet: 0, vit: 2}[build]
    assert bool(found.why_none) == (not expected)


@pytest.mark.parametrize(
    ("forward", "shared"),
    [
        (lambda net, x: net.a(x) + net.b(x), True),
        (lambda net, x: net.a(x) + net.b(net.drop(x)), False),
        (lambda net, x: net.a(net.a(x) + net.b(x)), False),
        (written_to_between, False),
    ],
    ids=["same", "dropout", "runs twice", "written to"],
)
def test_what_counts_as_the_same_tensor(forward, shared):
    assert find_shared_inputs(Two(forward), ["a", "b"]).groups == ([["a", "b"]] if shared else [])


def test_finding_runs_no_hook_and_changes_nothing():
    model = vit()
    model.vit.layers[0].register_forward_hook(lambda *_: pytest.fail("a hook of the user ran"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    assert find_shared_inputs(model, [name for group in GROUPS for name in group]).groups == GROUPS
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_cannot_run_without_values_shares_nothing():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(224, 4), nn.Linear(224, 4)

        def forward(self, x):
            return self.a(x) + self.b(x) if x.sum().item() > 0 else self.a(x)

    with pytest.warns(UserWarning, match=r"nothing is shared in this Odd: it could not be run .*item.*name them in"):
        model = quantize(Odd(), SAQQuantizationConfig(share_inputs=True))
    assert model.quantization_report.shared_inputs == []
    named = SAQQuantizationConfig(share_inputs=True, shared_input_modules=[["a", "b"]])
    assert quantize(Odd(), named).quantization_report.shared_inputs == [["a", "b"]]


def test_layers_with_other_settings_keep_their_own():
    config = SAQQuantizationConfig(share_inputs=True, overrides={"*.v_proj": {"activation_bits": 8}})
    assert quantize(vit(), config).quantization_report.shared_inputs == [group[:2] for group in GROUPS]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared_input_modules": [["vit.layers.0.nope", "classifier"]]}, "'vit.layers.0.nope' matches no module"),
        (
            {"shared_input_modules": [GROUPS[0]], "overrides": {GROUPS[0][1]: {"activation_bits": 8}}},
            r"cannot share the quantizer of their input. Expected .* found .*q_proj \(4, lsq, auto, mse\), .*\(8, lsq",
        ),
        (
            {"shared_input_modules": [GROUPS[0]], "modules_to_not_convert": [GROUPS[0][2]]},
            r"v_proj \(not quantized\)",
        ),
    ],
)
def test_groups_that_are_none(fields, message):
    with pytest.raises(ValueError, match=f"^shared_input_modules: .*{message}"):
        quantize(vit(), SAQQuantizationConfig(share_inputs=True, **fields))


def test_who_leaves_a_group_leaves_it_whole(tmp_path):
    """The first layer holds the quantizer: when it goes to float, the next one does, also in a model loaded anew."""
    model = quantized(share_inputs=True)
    scale = readers(model)[0].activation_quantizer.scale.clone()
    conversion.leave_in_float(model, [GROUPS[0][0]], "for the test")
    query, key, value = readers(model)
    assert query.activation_quantizer is None and key.activation_quantizer is value.activation_quantizer
    assert key.activation_quantizer.path == f"{GROUPS[0][1]}.activation_quantizer"
    assert model.quantization_report.shared_inputs == [GROUPS[0][1:], GROUPS[1]]
    assert torch.equal(model.state_dict()[f"{GROUPS[0][1]}.activation_quantizer.scale"], scale)
    model(images())
    assert key.shared_input._kept is None
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    conversion.leave_in_float(model, [GROUPS[0][2]], "for the test")
    assert key.shared_input is None and "activation_quantizer" in dict(key.named_children())
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForImageClassification.from_pretrained(tmp_path).eval()(images()).logits, model(images()).logits
    )


def test_a_first_layer_that_never_runs_is_noticed():
    with pytest.warns(UserWarning, match="1 of 3 layers stay in float.* They are: a."):
        model = quantized_two(lambda net, x: net.b(x) + nn.functional.conv2d(x, net.a.weight))
    assert model.a.activation_quantizer is None and model.b.shared_input is None


def test_a_holder_that_was_replaced_is_told_of():
    model = quantized(share_inputs=True)
    model.vit.layers[0].attention.q_proj = nn.Linear(16, 16)
    with pytest.raises(
        ValueError, match="k_proj: its input is quantized with the quantizer of a layer that is no part"
    ):
        pack(model)


def test_bits_are_found_without_sharing_and_suit_it():
    batches = [{"pixel_values": images(), "labels": LABELS}]
    with pytest.raises(ValueError, match="allocate_bits: .*4 layers, .*k_proj for example.*share_inputs=False"):
        allocate_bits(quantized(share_inputs=True), batches, "0.8x")
    with pytest.raises(ValueError, match="measure_latencies: 4 layers, .*k_proj"):
        measure_latencies(quantized(share_inputs=True), images())
    found = allocate_bits(quantized(), batches, "0.8x", candidates=(2, 4), progress=False)
    model = quantize(vit(), found.applied_to(SAQQuantizationConfig(share_inputs=True)))
    assert model.quantization_report.shared_inputs == GROUPS


def test_bits_change_for_all_readers_or_none():
    model = quantized(share_inputs=True)
    with pytest.raises(ValueError, match=r"change_bits: \['vit.layers.0.*read the same tensor .* the same activation"):
        change_bits(model, {GROUPS[0][1]: {"activation_bits": 8}})
    before = {name: q.bits for name, q in model.named_modules() if isinstance(q, Quantizer)}
    with pytest.raises(ValueError, match="bits=12; expected an integer from 2 to 8"):
        change_bits(model, {name: {"activation_bits": 12, "weight_bits": 3} for name in GROUPS[0]})
    assert before == {name: q.bits for name, q in model.named_modules() if isinstance(q, Quantizer)}
    change_bits(model, {name: {"activation_bits": 8, "weight_bits": 3} for name in GROUPS[0]})
    assert share_one_quantizer(model) and readers(model)[2].activation_quantizer.bits == 8
    assert readers(model)[2].weight_quantizer.bits == 3 and readers(model, 1)[0].activation_quantizer.bits == 4
    assert torch.isfinite(calibrate(model, [images()])(images()).logits).all()

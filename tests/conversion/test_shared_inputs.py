"""Layers that read the same tensor quantize it once: found by structure, exact, stored, exported as one node."""

from __future__ import annotations

import copy
import json

import onnx
import pytest
import torch
from checkpoint_files import edit_config
from quantized_models import quantized
from resume_runs import STEPS, make_trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import images, resnet, timm_efficientnet, vit
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForImageClassification, SegformerConfig, SegformerForImageClassification

from hf_saq import SAQQuantizationConfig, calibrate, conversion, dequantize, pack, quantize, unpack
from hf_saq.analysis import allocate_bits, measure_latencies
from hf_saq.analysis.bits.changing import change_bits
from hf_saq.conversion.shared_inputs import find_shared_inputs, readers_of_the_same_tensor
from hf_saq.export import export_onnx
from hf_saq.layers import PackedLayer, QuantizedLayer
from hf_saq.layers.shared_input import SharedInput
from hf_saq.quantizers import Quantizer
from hf_saq.storage.seal import KEY

ATTENTION = "vit.layers.{}.attention.{}_proj"
GROUPS = [[ATTENTION.format(block, name) for name in "qkv"] for block in range(2)]
LABELS = torch.arange(len(images())) % 3


def readers(model: nn.Module, block: int = 0) -> list[QuantizedLayer | PackedLayer]:
    base = getattr(model, "vit", model)
    return [getattr(base.layers[block].attention, f"{name}_proj") for name in "qkv"]


def share_one_quantizer(model: nn.Module) -> bool:
    quantizers = [layer.activation_quantizer for layer in readers(model)]
    return quantizers[0] is not None and all(quantizer is quantizers[0] for quantizer in quantizers)


def activation_quantizers(model: nn.Module) -> list[Quantizer]:
    return [m for m in model.modules() if isinstance(m, Quantizer) and m.role == "activation"]


# Which layers ------------------------------------------------------------------------------------------------------


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


class Two(nn.Module):
    """Layers `a` and `b` that read what `forward` gives them."""

    def __init__(self, forward):
        super().__init__()
        self.stem, self.a, self.b, self.drop = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Dropout()
        self.how = forward

    def forward(self, x):
        return self.how(self, self.stem(x))


def written_to_between(net, x):
    y = net.a(x)
    x.relu_()
    return y + net.b(x)


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


# What they compute -------------------------------------------------------------------------------------------------


def test_values_and_gradients_are_those_of_one_scale_read_three_times():
    """Against separate quantizers of equal scales: equal outputs; the gradient of the one scale is their sum."""
    shared = quantized(share_inputs=True).train()
    apart = quantize(vit(), SAQQuantizationConfig())
    state = shared.state_dict()
    for group in GROUPS:
        first = f"{group[0]}.activation_quantizer."
        values = {name.removeprefix(first): value for name, value in state.items() if name.startswith(first)}
        state.update({f"{name}.activation_quantizer.{key}": v for name in group for key, v in values.items()})
    apart.load_state_dict(state)
    calls = []
    for quantizer in activation_quantizers(shared):
        quantizer.register_forward_hook(lambda quantizer, *_: calls.append(quantizer.path))
    losses = [model(images(), labels=LABELS).loss for model in (shared, apart)]
    assert torch.equal(*losses)
    assert len(calls) == len(set(calls)) == len(activation_quantizers(apart)) - 4
    for loss in losses:
        loss.backward()
    for name, parameter in shared.named_parameters():
        group = next((g for g in GROUPS if name == f"{g[0]}.activation_quantizer.scale"), None)
        names = [f"{member}.activation_quantizer.scale" for member in group] if group else [name]
        expected = sum(apart.get_parameter(other).grad for other in names)
        # Order of sums alone differs: the three gradients meet before the quantizer, or behind it.
        assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
    assert all(layer.shared_input._kept is None for layer in readers(shared)), "kept longer than needed"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(reentrant):
    grads = []
    for checkpointed in (False, True):
        model = quantized(share_inputs=True).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(images(), labels=LABELS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_tensor_written_to_is_quantized_anew():
    shared, x, seen = SharedInput(2), torch.ones(2), []
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)

    def quantize_x(t):
        seen.append(t.clone())
        return t * 2

    assert shared.once(a, x, quantize_x) is shared.once(b, x, quantize_x)
    assert shared._kept is None
    first = shared.once(a, x, quantize_x)
    x.add_(1)
    assert torch.equal(shared.once(b, x, quantize_x), x * 2) and shared.once(a, x, quantize_x) is not first
    scale = nn.Parameter(torch.ones(1))
    first = shared.once(a, x, quantize_x, [scale])
    with torch.no_grad():
        scale.add_(1)
    assert shared.once(b, x, quantize_x, [scale]) is not first
    first = shared.once(a, x, quantize_x)
    assert shared.once(a, x, quantize_x) is not first, "a reader that asks again is in another forward"
    with torch.no_grad():
        assert shared.once(b, x, quantize_x) is not first
    assert copy.deepcopy(shared)._kept is None
    with torch.inference_mode():  # nothing counts writes to these
        y = torch.ones(2)
        shared.once(a, y, quantize_x)
        assert torch.equal(shared.once(b, y.add_(1), quantize_x), y * 2)


def quantized_two(forward):
    config = SAQQuantizationConfig(share_inputs=True, shared_input_modules=[["a", "b"]], first_last_bits=None)
    return calibrate(quantize(Two(forward), config), [torch.randn(4, 3, 8, 8)])


def test_writes_between_two_readers_are_seen_in_every_mode():
    model, x = quantized_two(written_to_between).eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)


def test_a_reader_that_runs_twice_and_a_second_pass():
    """The second pass of SAM has the same inputs and, where only weights are perturbed, the same scales."""
    model, x = quantized_two(lambda net, x: net.a(x) + net.a(x) + net.b(x)).train(), torch.randn(4, 3, 8, 8)
    features = model.stem(x).detach().requires_grad_()
    for _ in range(2):
        model.how(model, features).sum().backward()


def test_readers_in_checkpointed_regions_of_their_own():
    """What a region saves must be its own: it is made again alone."""

    def apart(net, x):
        parts = [nn.Sequential(net.a, nn.Tanh()), nn.Sequential(net.b, nn.Tanh())]
        if not net.training:
            return parts[0](x) + parts[1](x)
        return sum(checkpoint(part, x, use_reentrant=False) for part in parts)

    grads = []
    for training in (True, False):
        torch.manual_seed(0)
        model = quantized_two(apart).train(training)
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


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


def test_interrupted_forwards_leave_nothing_wrong_behind():
    model = quantized(share_inputs=True)
    expected = model(images()).logits
    query, key, _ = readers(model)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        query(x)  # and nobody else
        query.activation_quantizer.scale.mul_(2)
        assert torch.equal(key(x), nn.functional.linear(key.activation_quantizer(x), key.quantized_weight(), key.bias))
        query.activation_quantizer.scale.div_(2)
    assert torch.equal(model(images()).logits, expected)


@pytest.mark.slow
def test_compiled_models_compute_the_same():
    model = quantized(share_inputs=True)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(images()).logits, model(images()).logits)


# Copies, files, graphs ---------------------------------------------------------------------------------------------


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


def test_packed_files_from_before_there_was_sharing_load(tmp_path):
    model = pack(quantized())
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = dict(file.metadata())
    seal = json.loads(metadata[KEY])
    for fields in (content["quantization_config"], seal["quantization_config"]):
        del fields["share_inputs"], fields["shared_input_modules"]
    metadata[KEY] = json.dumps(seal)
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", metadata)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(images()).logits, model(images()).logits)
    edit_config(tmp_path, share_inputs=True)
    with pytest.raises(ValueError, match="quantization_config.share_inputs is True, but .* was saved with False"):
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
    change_bits(model, {name: {"activation_bits": 8, "weight_bits": 3} for name in GROUPS[0]})
    assert share_one_quantizer(model) and readers(model)[2].activation_quantizer.bits == 8
    assert readers(model)[2].weight_quantizer.bits == 3 and readers(model, 1)[0].activation_quantizer.bits == 4
    assert torch.isfinite(calibrate(model, [images()])(images()).logits).all()

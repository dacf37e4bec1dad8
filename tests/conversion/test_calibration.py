"""Ranges from real batches, with the model left as it was."""

from __future__ import annotations

import types
from contextlib import nullcontext

import pytest
import torch
from quantized_models import same_values
from tiny_models import conv_net, images, jitter, linear_net, vectors, vit
from torch import Tensor, nn
from torch.testing import assert_close

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.conversion.calibration import NEVER_RUN, is_calibrated
from hf_saq.conversion.observing.observers import SAMPLES_PER_BATCH
from hf_saq.quantizers import Quantizer

W4A4 = SAQQuantizationConfig()


def activation_scales(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("activation_quantizer.scale")
    }


class TwoInputs(nn.Module):
    """`forward(x, y=None, double=False)`: something that a tuple and a dict can fill in different ways."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor | None = None, double: bool = False) -> Tensor:
        if y is not None:
            x = x + y
        return self.second(self.first(x * 2 if double else x))


@pytest.mark.parametrize(
    "batch",
    [
        vectors() * 2,
        (vectors(), vectors()),
        [vectors(), vectors()],
        (vectors(), None, True),
        {"x": vectors(), "y": vectors()},
        {"x": vectors(), "double": True},
    ],
    ids=["tensor", "tuple", "list", "tuple with other values", "dict", "dict with other values"],
)
def test_kinds_of_batches(batch):
    """Each of them is twice the vectors, so that each must give the same ranges."""
    torch.manual_seed(0)
    model = quantize(TwoInputs(), W4A4)
    twin = quantize(TwoInputs(), W4A4)
    twin.load_state_dict(model.state_dict())
    assert calibrate(model, [batch]) is model
    assert is_calibrated(model) and not is_calibrated(twin)
    calibrate(twin, [vectors() * 2])
    assert_close(activation_scales(model), activation_scales(twin), rtol=1e-6, atol=0)


def test_transformers_inputs_as_a_dict_with_labels():
    model = quantize(vit(), W4A4)
    calibrate(model, [{"pixel_values": images(), "labels": torch.tensor([0, 1, 2, 0])}])
    assert is_calibrated(model)


def test_any_iterable_of_batches_and_every_batch_counts():
    model, twin = quantize(linear_net(), W4A4), quantize(linear_net(), W4A4)
    calibrate(model, (batch for batch in (vectors(), vectors(seed=1) * 10)))
    calibrate(twin, [vectors()])
    assert activation_scales(model)["0.activation_quantizer.scale"] > (
        2 * activation_scales(twin)["0.activation_quantizer.scale"]
    )


def test_auto_decides_the_sign_from_the_smallest_value():
    model = quantize(linear_net(), W4A4)  # Linear, ReLU, Linear, GELU, Linear
    calibrate(model, [vectors()])
    assert [model[i].activation_quantizer.signed for i in (0, 2, 4)] == [True, False, True]
    positive = quantize(linear_net(), W4A4)
    calibrate(positive, [vectors().abs(), vectors(seed=1).abs()])
    assert positive[0].activation_quantizer.signed is False
    # One negative value in any batch is enough, also where it is not among the values that are sampled.
    x = torch.rand(8 * SAMPLES_PER_BATCH // 4, 6)
    x.view(-1)[1] = -1e-3
    late = quantize(linear_net(), W4A4)
    calibrate(late, [vectors().abs(), x])
    assert late[0].activation_quantizer.signed is True


@pytest.mark.parametrize("mode", ["signed", "unsigned"])
def test_a_sign_that_was_told_is_kept(mode: str):
    model = quantize(linear_net(), SAQQuantizationConfig(activation_mode=mode))
    with pytest.warns(match="cut off the negative") if mode == "unsigned" else nullcontext():
        calibrate(model, [vectors()])
    assert {model[i].activation_quantizer.signed for i in (0, 2, 4)} == {mode == "signed"}


def test_inputs_that_are_cut_off_because_they_were_told_to_be_unsigned_are_named():
    """`unsigned` suits what follows a ReLU; of normalized images it takes one half. SiLU's dip is cut on purpose."""
    x = vectors(64)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 3))
    with torch.no_grad():
        net[2].weight.mul_(20)
    share = x.clamp(max=0).square().sum() / x.square().sum()
    quantize(net, SAQQuantizationConfig(activation_mode="unsigned"))
    with pytest.warns(match=rf"1 of 3 quantizers are unsigned, .*: 0.activation_quantizer \({share:.0%}\)\."):
        calibrate(net, [x])
    calibrate(net, [x.abs()])


def test_ranges_that_are_there_are_kept_if_asked_for():
    """After one layer was reset the others keep what they have learned, and it gets what it had at first."""
    model = calibrate(quantize(linear_net(), W4A4), [vectors()])
    first = activation_scales(model)
    with torch.no_grad():
        for i in (0, 2, 4):
            model[i].activation_quantizer.scale.mul_(1.5)
    model[2].activation_quantizer.reset()
    calibrate(model, [vectors()], only_missing=True)
    for i, factor in ((0, 1.5), (2, 1), (4, 1.5)):
        name = f"{i}.activation_quantizer.scale"
        assert torch.equal(activation_scales(model)[name], first[name] * factor)


def test_ranges_belong_to_the_float_function():
    """The scale of each layer is the one fitted to the inputs that it has in the float model."""
    float_model = linear_net()
    inputs: dict[int, Tensor] = {}
    for i in (0, 2, 4):
        float_model[i].register_forward_pre_hook(lambda module, args, i=i: inputs.update({i: args[0]}))
    float_model(vectors())
    model = quantize(linear_net(), SAQQuantizationConfig(weight_bits=2, activation_bits=2, first_last_bits=None))
    calibrate(model, [vectors()])
    for i in (0, 2, 4):
        fitted = model[i].activation_quantizer.scale.clone()
        model[i].activation_quantizer.initialize(inputs[i].detach().reshape(-1))
        assert torch.equal(model[i].activation_quantizer.scale, fitted)


def test_weights_run_in_float_while_observing():
    float_model, model = jitter(conv_net()).eval(), quantize(jitter(conv_net()), SAQQuantizationConfig(weight_bits=2))
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    calibrate(model, [images(size=8)])
    assert torch.equal(seen[0], float_model(images(size=8)))
    assert not torch.equal(model.eval()(images(size=8)), seen[0])


def test_nothing_else_changes():
    model = jitter(quantize(conv_net(), W4A4)).train()
    model[1].eval()  # a mixed mode, as a model with frozen normalization has
    model[3].weight.requires_grad_(False)
    gradients: list[bool] = []
    model.register_forward_hook(lambda module, args, output: gradients.append(torch.is_grad_enabled()))
    modes = {name: module.training for name, module in model.named_modules()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: t.clone() for name, t in model.state_dict().items() if "activation_quantizer" not in name}
    calibrate(model, [images(size=8), images(size=8, seed=1)])
    assert gradients == [False, False] and torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert after["1.num_batches_tracked"] == 0
    assert all(p.grad is None for p in model.parameters())
    assert all(m.observer is None for m in model.modules() if isinstance(m, Quantizer))


def test_dropout_is_off():
    model = quantize(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.9), nn.Linear(8, 3)), W4A4).train()
    calibrate(model, [vectors()])
    again = activation_scales(model)
    calibrate(model, [vectors()])
    assert_close(activation_scales(model), again, rtol=0, atol=0)


def test_calibrating_again_starts_over():
    model = quantize(linear_net(), W4A4)
    calibrate(model, [vectors() * 100])
    calibrate(model, [vectors().abs()])
    fresh = calibrate(quantize(linear_net(), W4A4), [vectors().abs()])
    assert_close(activation_scales(model), activation_scales(fresh), rtol=0, atol=0)
    assert model[0].activation_quantizer.signed is False


def test_weights_only_and_packed_models():
    weights_only = quantize(linear_net(), SAQQuantizationConfig(activation_bits=None))
    assert is_calibrated(weights_only)
    calibrate(weights_only, [vectors()])
    assert is_calibrated(pack(weights_only))
    packed = pack(calibrate(quantize(linear_net(), W4A4), [vectors()]))
    calibrate(packed, [vectors() * 2])  # a packed model may be calibrated again
    assert packed(vectors()).shape == (8, 3)
    untouched = quantize(linear_net(), SAQQuantizationConfig(weight_bits=None, activation_bits=None))
    calibrate(untouched, [vectors()])


def test_forward_before_calibration_raises_with_the_path():
    model = quantize(vit(), W4A4)
    with pytest.raises(RuntimeError) as error:
        model(images())
    assert str(error.value) == (
        "vit.embeddings.patch_embeddings.projection.activation_quantizer: this activation quantizer has no range yet. "
        "Run `hf_saq.calibrate(model, batches)` with a few batches of model inputs, or train with `SAQTrainer`, which "
        "calibrates from its training data. A copy or an average (EMA, SWA) that was begun before that has none "
        "either: make it of the calibrated model."
    )


def test_no_batches_raise():
    for empty in ([], iter(()), ()):
        with pytest.raises(ValueError, match="calibrate: `batches` is empty; expected at least one batch"):
            calibrate(quantize(linear_net(), W4A4), empty)


def test_an_empty_batch_raises():
    with pytest.raises(ValueError, match=r"ran the quantized layers \['0', '2', '4'\] on no value"):
        calibrate(quantize(linear_net(), W4A4), [vectors()[:0]])


@pytest.mark.parametrize("batch", ["image.png", 3, None, {1, 2}], ids=["str", "int", "NoneType", "set"])
def test_a_batch_of_another_type_raises(batch):
    found = type(batch).__name__
    with pytest.raises(ValueError, match=f"`batches` holds a {found}; expected a tensor, a tuple of positional"):
        calibrate(quantize(linear_net(), W4A4), [batch])


@pytest.mark.parametrize("batches", [vectors(), {"x": vectors()}], ids=["Tensor", "dict"])
def test_one_batch_instead_of_a_list_raises(batches):
    """Iterating over a tensor would take each image, over a dict each name, for a batch."""
    found = type(batches).__name__
    with pytest.raises(ValueError, match=f"calibrate: `batches` is a {found}; expected a list of batches"):
        calibrate(quantize(linear_net(), W4A4), batches)


def test_a_float_model_raises():
    with pytest.raises(ValueError, match=r"calibrate: Sequential has no quantizer; call `quantize\(model, config\)`"):
        calibrate(linear_net(), [vectors()])


class WithIdleLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.used(x))


class ReadsTheWeight(nn.Module):
    """As timm's BEiT does: the parent computes with the weight of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.read, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(x, self.read.weight, self.read.bias))


@pytest.mark.parametrize("bits", [(4, 4), (4, None), (None, 4)], ids=["W4A4", "weights", "activations"])
@pytest.mark.parametrize(("build", "name"), [(WithIdleLayer, "idle"), (ReadsTheWeight, "read")], ids=["idle", "read"])
def test_a_layer_that_the_model_never_calls_goes_back_to_float(build, name: str, bits):
    model = quantize(build(), SAQQuantizationConfig(weight_bits=bits[0], activation_bits=bits[1]))
    with pytest.warns(
        UserWarning, match=rf"^calibrate: 1 of \d layers stay in float, .* They are: {name}\. List them"
    ):
        calibrate(model, [vectors()])
    assert is_calibrated(model)
    assert not [key for key in model.state_dict() if key.startswith(name) and "quantizer" in key]
    assert {layer.name: layer.reason for layer in model.quantization_report.skipped} == {name: NEVER_RUN}
    config = SAQQuantizationConfig(weight_bits=bits[0], activation_bits=bits[1], modules_to_not_convert=[name])
    said = calibrate(quantize(build(), config), [vectors()])  # and no warning
    assert said.state_dict().keys() == model.state_dict().keys()
    if bits[0] is not None:
        assert_close(pack(model)(vectors()), model.eval()(vectors()), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:calibrate. 1 of 14 layers stay in float")
def test_a_layer_left_in_float_is_stored_as_one(tmp_path):
    """An encoder whose first projection is passed by: what is saved loads as it was, packed or not."""
    model = quantize(vit(), W4A4)
    block = model.vit.layers[0].mlp

    def forward(self, x):
        return self.fc2(nn.functional.gelu(nn.functional.linear(x, self.fc1.weight, self.fc1.bias)))

    block.forward = types.MethodType(forward, block)
    calibrate(model, [images()])
    expected = model(images()).logits
    assert model.config.quantization_config.modules_to_not_convert == ["vit.layers.0.mlp.fc1"]
    assert W4A4.modules_to_not_convert is None
    for storage, saved in (("float", model), ("packed", pack(model))):
        saved.save_pretrained(tmp_path / storage)
        loaded = type(model).from_pretrained(tmp_path / storage)
        assert type(loaded.vit.layers[0].mlp.fc1) is nn.Linear
        assert_close(loaded(images()).logits, expected, rtol=0, atol=1e-5 if storage == "packed" else 0)


def test_a_model_that_runs_none_of_its_layers_raises():
    model = quantize(linear_net(), W4A4)
    model.forward = lambda x: x
    with pytest.raises(
        ValueError, match=r"Sequential ran none of its 3 quantized layers, for example \['0', '2', '4'"
    ):
        calibrate(model, [vectors()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("position", [0, 1, -1], ids=["first", "not sampled", "last"])
def test_inputs_that_are_not_finite_raise(value: float, position: int):
    x = torch.rand(SAMPLES_PER_BATCH, 6)
    x.view(-1)[position] = value
    with pytest.raises(ValueError, match=r"^0.activation_quantizer: calibration found infinite or NaN values"):
        calibrate(quantize(linear_net(), W4A4), [x])


def test_after_an_exception_everything_is_back():
    model = quantize(conv_net(), W4A4).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        calibrate(model, [images(size=8), images(size=16)])  # the second does not fit the head
    assert all(module.training for module in model.modules())
    assert all(m.observer is None for m in model.modules() if isinstance(m, Quantizer))
    after = model.state_dict()
    assert all(same_values(after[name], tensor) for name, tensor in state.items())
    assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="0.activation_quantizer: this activation quantizer has no range yet"):
        model(images(size=8))
    calibrate(model, [images(size=8)])
    model(images(size=8))


def test_rare_large_activations_in_one_column_are_seen():
    """A sample at even distances would look at the first column only: 91 = 13 * 7."""
    x = torch.rand(16384 * 91 // 7, 7)
    x[:400, 3] = 6.0
    model = torch.nn.Sequential(torch.nn.Linear(7, 3), torch.nn.Linear(3, 2))
    quantize(model, SAQQuantizationConfig(weight_bits=8, activation_bits=8))
    calibrate(model, [x])
    quantizer = model[0].activation_quantizer
    assert quantizer.scale.item() * quantizer.qmax == pytest.approx(6.0, rel=0.02)

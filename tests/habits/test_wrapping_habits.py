"""Users wrap layers: replaced forwards, accelerate's hooks, weights computed from others, a minimizer that watches.

Each goes on working or is refused by name; no copy runs the original in secret or carries it along.
"""

from __future__ import annotations

import copy
import io
import pickle
import types

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from minimizer_nets import batch, linear_net, loss_of, two_passes
from timm.models.byobnet import MobileOneBlock
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import AveragedModel
from transformers import TrainingArguments

from hf_saq import (
    SAQQuantizationConfig,
    SAQTrainer,
    SharpnessAwareMinimizer,
    calibrate,
    dequantize,
    pack,
    quantize,
    unpack,
)
from hf_saq.layers.float_form import FloatForm

CONFIG = SAQQuantizationConfig(weight_bits=8, activation_bits=8)


def quantized() -> nn.Module:
    net = linear_net().eval()
    return calibrate(quantize(net, CONFIG), [batch(net)[0]])


def double(layer: nn.Module) -> nn.Module:
    """What many tools do: keep the old forward and put a function of one's own in its place."""
    old = layer.forward
    layer.forward = lambda x: old(x) * 2  # type: ignore[method-assign]
    return layer


def test_a_layer_whose_forward_was_replaced_is_refused():
    """A user replaced the forward of one layer: `quantize` names it and changes nothing."""
    net = linear_net()
    double(net[3])
    with pytest.raises(ValueError, match=r"1 of its layers cannot be replaced .* 3: its forward was replaced on the"):
        quantize(net, CONFIG)
    assert type(net[0]) is nn.Linear


def test_a_wrapped_layer_that_is_left_in_float_keeps_its_wrapper():
    """A user lists the layer in modules_to_not_convert: the others are quantized, its wrapper works on."""
    net, plain = linear_net().eval(), linear_net().eval()
    double(net[3])
    x = batch(net)[0]
    excluding = CONFIG.replace(modules_to_not_convert=["3"])
    calibrate(quantize(net, excluding), [x])
    calibrate(quantize(plain, excluding), [x])
    assert torch.allclose(net[:4](x), plain[:4](x) * 2)


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: cpu_offload(net, execution_device="cpu"),
        lambda net: dispatch_model(net, {f"0.{i}": "cpu" for i in range(6)}, force_hooks=True),
    ],
    ids=["cpu_offload", "dispatch_model"],
)
def test_layers_under_hooks_of_accelerate_are_refused(wrap):
    """A user dispatches the float model first: the error names a layer and what to do, and that works."""
    net = wrap(nn.Sequential(linear_net()))
    with pytest.raises(ValueError, match=r"0\.0: accelerate's hooks .*remove_hook_from_module"):
        quantize(net, CONFIG)
    remove_hook_from_module(net, recurse=True)
    assert len(quantize(net, CONFIG).quantization_report.converted) == 3


def test_no_function_of_a_float_layer_is_remembered():
    """However a function came onto a layer, the float form does not keep it: it would run the old weights."""
    layer = double(nn.Linear(3, 3))
    layer.note = types.MethodType(lambda self: 1, layer)
    assert set(FloatForm.of(layer).attributes) == {"in_features", "out_features"}


@pytest.mark.parametrize("change", [pack, dequantize], ids=["pack", "dequantize"])
def test_a_quantized_layer_whose_forward_was_replaced_is_not_copied_without_it(change):
    """A user wraps a quantized layer by hand: a packed copy would go without the wrapper, so there is none."""
    net = quantized()
    double(net[0])
    with pytest.raises(ValueError, match=r"^0: its forward was replaced"):
        change(net)


@pytest.mark.parametrize("change", [pack, dequantize], ids=["pack", "dequantize"])
def test_a_model_whose_forward_holds_the_original_is_not_copied(change):
    """A user replaces the forward of the whole model by a closure: a copy would run the original's weights."""
    with pytest.raises(ValueError, match="Sequential: its forward was replaced .* a copy would run the original"):
        change(double(quantized()))


def test_a_forward_bound_to_its_module_is_copied():
    """A user binds a method to the model: the copy runs its own weights, as before."""
    net = quantized()
    net.forward = types.MethodType(lambda self, x: nn.Sequential.forward(self, x) * 2, net)  # type: ignore[method-assign]
    x = batch(net)[0]
    packed, expected = pack(net), net(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.allclose(packed(x), expected)


# A minimizer that watches ------------------------------------------------------------------------------------------


def pickled_size(model: nn.Module) -> int:
    stream = io.BytesIO()
    torch.save(model, stream)
    return len(stream.getvalue())


@pytest.mark.parametrize("change", [pack, dequantize, lambda net: unpack(pack(net))], ids=["pack", "float", "unpack"])
def test_copies_go_without_the_hooks_of_the_minimizer(change):
    """A user packs while training: the copy pickles as small as one made before, and training goes on."""
    net = quantized()
    without = pickled_size(change(net))
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    copied = change(net)
    assert pickled_size(copied) == without
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied.modules())
    two_passes(net, minimizer, batch(net))
    assert minimizer.ascent_norm > 0


def test_hooks_of_others_are_copied():
    """A user's own hook on a layer is still there after `pack`."""
    net, calls = quantized(), []
    net[0].register_forward_hook(lambda *args: calls.append(1))
    pack(net)(batch(net)[0])
    assert calls == [1]


def stored(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), stored, lambda net: AveragedModel(net).module],
    ids=["deepcopy", "pickle", "torch.save", "averaged"],
)
def test_copies_of_a_watched_model_are_nobodys(duplicate):
    """A user copies or stores a whole model between the two passes: neither the minimizer, nor its buffers, nor the
    original comes along; the copy trains with a minimizer of its own, like the original would have."""
    net, data = quantized(), batch(quantized())
    without = pickled_size(net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.1)
    with minimizer.ascent():
        loss_of(net, data).backward()
    net.zero_grad()
    copied = duplicate(net)
    assert pickled_size(net) < without + 500 and pickled_size(copied) < without + 500
    with minimizer.perturbed():  # no hook on the copy adds what belongs to the original
        assert torch.equal(copied(data[0]), quantized()(data[0])) and not torch.equal(net(data[0]), copied(data[0]))
    minimizer.detach()
    two_passes(copied, SharpnessAwareMinimizer(copied, rho=0.1), data)
    two_passes(net, SharpnessAwareMinimizer(net, rho=0.1), data)
    for found, expected in zip(copied.parameters(), net.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


# Fused layers --------------------------------------------------------------------------------------------------------


def with_statistics() -> nn.Module:
    """A convolution and a BatchNorm that changes the size of its channels by very different factors."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    net[1].running_var.copy_(torch.logspace(-1, 2, 8))
    net[1].running_mean.normal_()
    return net


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_batch_norm_fused_into_a_quantized_layer_gives_its_weight_a_scale(granularity: str):
    """A user fuses after `quantize`: the layer is as if the fused float layer had been quantized, and a warning says
    what to do better. The scale of the old weight would cut the fused one off."""
    config = SAQQuantizationConfig(weight_bits=8, activation_bits=None, weight_granularity=granularity)
    plain, x = with_statistics(), torch.randn(4, 3, 8, 8)
    net = quantize(copy.deepcopy(plain), config)
    with pytest.warns(UserWarning, match=r"^0.weight_quantizer: the weight .* replaced .*fitted to it anew\. Fuse"):
        fused = fuse_conv_bn_eval(net[0], net[1])
    expected = quantize(nn.Sequential(fuse_conv_bn_eval(plain[0], plain[1])), config)
    assert torch.equal(fused(x), expected(x))
    assert not torch.equal(net[0].weight_quantizer.scale, fused.weight_quantizer.scale)
    if granularity == "channel":
        assert (fused(x) - plain(x)).abs().max() < 0.01 * plain(x).abs().max()


def test_a_weight_that_no_scale_can_be_found_for_does_not_take_the_place_of_another():
    net = quantize(nn.Sequential(nn.Linear(4, 3)), SAQQuantizationConfig(activation_bits=None))
    weight, x = net[0].weight, torch.randn(2, 4)
    expected = net(x)
    with pytest.raises(ValueError, match=r"^0.weight_quantizer: cannot fit a range to infinite or NaN values"):
        net[0].weight = nn.Parameter(torch.full((3, 4), torch.nan))
    assert net[0].weight is weight and torch.equal(net(x), expected)


def test_loading_by_assignment_keeps_stored_scales():
    """`load_state_dict(assign=True)` replaces weights too, and their scales arrive after them."""
    net, other = quantized(), quantized()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    net.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(net[0].weight_quantizer.scale, other[0].weight_quantizer.scale)
    assert torch.equal(net(batch(net)[0]), other(batch(net)[0]))


def test_a_batch_norm_is_not_fused_into_packed_integers():
    """A user fuses after `pack`: only the bias would be fused."""
    net = pack(quantize(with_statistics(), SAQQuantizationConfig(activation_bits=None)))
    with pytest.raises(ValueError, match=r"^0: its weight is packed integers, .*fuse_conv_bn_eval\), do so in"):
        fuse_conv_bn_eval(net[0], net[1])


def test_reparameterized_branches_are_missed():
    """A user lets timm fuse the branches of a quantized RepVGG block: `pack` says that what stands in is in float."""
    block = quantize(nn.Sequential(MobileOneBlock(8, 8, 3), nn.Conv2d(8, 8, 1)).eval(), SAQQuantizationConfig())
    calibrate(block, [torch.randn(2, 8, 8, 8)])
    fused = reparameterize_model(block)
    with pytest.warns(UserWarning, match=r"pack: \d of \d quantized layers of Sequential are gone, for example 0\..*"):
        pack(fused)
    calibrate(fused, [torch.randn(2, 8, 8, 8)])  # and their places in the report are no obstacle


# Weights that are computed from others -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    "compute",
    [weight_norm, spectral_norm, parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)],
    ids=["old weight_norm", "old spectral_norm", "parametrized", "pruned"],
)
class TestComputedWeights:
    def test_before_quantization_such_a_layer_stays_in_float(self, compute):
        """A user prunes or normalizes a weight, then quantizes: the report says that this layer stays in float."""
        net = linear_net()
        compute(net[0])
        reasons = {layer.name: layer.reason for layer in quantize(net, CONFIG).quantization_report.skipped}
        assert set(reasons) == {"0"} and reasons["0"]

    def test_after_quantization_the_forward_quantizes_what_was_computed(self, compute):
        """A user does so after `quantize` and goes on training: the quantizer gets the computed weight, and its
        sources get the gradient."""
        net = quantized().train()
        compute(net[0])
        x, _ = batch(net)
        net(x).sum().backward()
        layer = net[0]
        w_q = layer.quantized_weight()
        codes = (layer.weight / layer.weight_quantizer.scale).round().clamp(-128, 127)
        assert torch.allclose(w_q, codes * layer.weight_quantizer.scale)
        sources = [p for name, p in layer.named_parameters() if "weight" in name and "quantizer" not in name]
        assert sources and all(p.grad is not None and p.grad.abs().sum() > 0 for p in sources)

    @pytest.mark.parametrize(
        "use", [pack, dequantize, lambda net: SharpnessAwareMinimizer(net, rho=0.1)], ids=["pack", "float", "perturb"]
    )
    def test_after_quantization_its_copies_and_its_perturbation_are_refused(self, compute, use):
        """A user does so after `quantize`: the error names the layer and says to make it permanent."""
        net = quantized()
        compute(net[0])
        with pytest.raises(ValueError, match=r"^0: its weight is computed from other parameters since .*prune.remove"):
            use(net)


def test_pruning_made_permanent_is_packed():
    """A user removes the mask as told: packing works, and pruned weights are zero."""
    net = quantized()
    prune.l1_unstructured(net[0], "weight", 0.5)
    prune.remove(net[0], "weight")
    assert (pack(net)[0].quantized_weight() == 0).float().mean() >= 0.5


def test_biases_that_are_computed():
    """A user prunes biases: before quantization that layer stays in float, afterwards it is made permanent first."""
    net = linear_net()
    prune.l1_unstructured(net[0], "bias", 0.5)
    quantize(net, CONFIG)
    reasons = {layer.name: layer.reason for layer in net.quantization_report.skipped}
    assert reasons == {"0": "its bias is computed from other parameters"}
    net = quantized()
    prune.l1_unstructured(net[0], "bias", 0.5)
    with pytest.raises(ValueError, match=r"^0: its bias is computed from other parameters since .*prune.remove"):
        pack(net)


@pytest.mark.parametrize("where", ["quantize", "SAQTrainer", "copying a model in another form"])
def test_parts_wrapped_by_the_compiler_are_refused_before_a_training_and_not_after_it(where, tmp_path):
    """`net[0] = torch.compile(net[0])` renames tensors: a training went to its end, and its model could not be saved.
    `net[0].compile()` does not, nor does a wrapper around the whole."""
    net = linear_net() if where == "quantize" else quantized()
    net[0] = torch.compile(net[0], backend="eager")
    doing = {
        "quantize": lambda model: quantize(model, CONFIG),
        "SAQTrainer": lambda model: SAQTrainer(model, TrainingArguments(str(tmp_path), report_to="none")),
    }.get(where, pack)
    message = rf"^{where}: 0 is wrapped by torch.compile, which gives its tensors other names .*module.compile\(\)"
    with pytest.raises(ValueError, match=message):
        doing(net)
    net[0] = net[0]._orig_mod
    net[0].compile(backend="eager")
    doing(torch.compile(net, backend="eager") if where == "SAQTrainer" else net)


def test_a_weight_that_does_not_fit_the_quantizer_is_refused_in_one_sentence():
    """A user changes the number of classes by hand, after `quantize`; one scale for the tensor is fitted anew."""
    config = SAQQuantizationConfig(weight_granularity="channel", first_last_bits=None)
    net = quantize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), config)
    before = net[1].weight
    with pytest.raises(
        ValueError, match=r"^1: its weight was to be replaced by one of shape \(5, 3\) on cpu; expected"
    ):
        net[1].weight = nn.Parameter(torch.randn(5, 3))
    assert net[1].weight is before
    per_tensor = quantize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), SAQQuantizationConfig())
    with pytest.warns(UserWarning, match="was fitted to it anew"):
        per_tensor[1].weight = nn.Parameter(torch.randn(5, 3))

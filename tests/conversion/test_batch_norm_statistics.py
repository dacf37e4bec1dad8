"""Running statistics are those of the model that is evaluated, against means over what its batch norms are given."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import TRANSFORMERS_MODELS, images
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize, reestimate_batch_norm

TOLERANCE = 1e-5
"""Relative, of float32 sums in another order."""


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": b.clone() for name, norm in norms_of(model).items() for key, b in norm.named_buffers()}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.01), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )


def test_statistics_are_means_over_batches_of_what_the_norm_is_given():
    """The second norm sees what the first gives in training mode, without dropout, behind quantized weights."""
    model = quantize(net(), SAQQuantizationConfig(weight_bits=3, activation_bits=4))
    batches = [images(4, seed=1), images(8, seed=2), images(3, seed=3)]
    calibrate(model, batches)
    plain = copy.deepcopy(model).eval()
    first, _, second = plain[1].train(), plain[2], plain[4].train()
    given = {"1": [], "4": []}
    first.register_forward_pre_hook(lambda m, args: given["1"].append(args[0]))
    second.register_forward_pre_hook(lambda m, args: given["4"].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            plain(batch)
    model.train()
    assert reestimate_batch_norm(model, batches) is model
    for name, seen in given.items():
        norm = model.get_submodule(name)
        mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
        variance = torch.stack([x.var(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
        torch.testing.assert_close(norm.running_mean, mean, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(norm.running_var, variance, rtol=TOLERANCE, atol=0)
    assert model.training and model[2].training and [n.momentum for n in norms_of(model).values()] == [0.01, 0.1]


def test_only_statistics_change():
    model = calibrate(
        quantize(TRANSFORMERS_MODELS["resnet"](), SAQQuantizationConfig()), [{"pixel_values": images(8)}]
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate_batch_norm(model, [{"pixel_values": images(8)}])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.endswith(("running_mean", "running_var")) for name in changed)


def test_frozen_norms_stay_as_they_are():
    model = net().train()
    model[1].eval()
    before = statistics(model)
    reestimate_batch_norm(model, [images(4)])
    after = statistics(model)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("1."))
    assert not torch.equal(after["4.running_mean"], before["4.running_mean"])
    assert not model[1].training


@pytest.mark.parametrize("training", [False, True])
def test_a_momentum_of_zero_freezes_statistics(training):
    """Such a norm never takes over what it sees. What comes after it sees what it gives in evaluation."""
    model = net().train(training)
    model[1].momentum = 0.0
    with torch.no_grad():
        model[1].running_mean.fill_(3.0)
        given = nn.Sequential(*copy.deepcopy(model).eval()[:4])(images(4))
    reestimate_batch_norm(model, [images(4)])
    assert model[1].momentum == 0.0 and model[1].training is training
    assert model[1].running_mean.eq(3.0).all() and model[1].running_var.eq(1.0).all()
    torch.testing.assert_close(model[4].running_mean, given.mean(dim=(0, 2, 3)), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_model_in_evaluation_mode_has_no_frozen_norm():
    model = net().eval()
    before = statistics(model)
    reestimate_batch_norm(model, [images(4)])
    assert not torch.equal(statistics(model)["1.running_mean"], before["1.running_mean"])
    assert not any(m.training for m in model.modules())


def test_a_model_without_norms_is_not_run():
    model = nn.Linear(3, 2)
    assert reestimate_batch_norm(model, iter([])) is model


def broken():
    yield images(4)
    raise OSError("disk")


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ([], "`batches` is empty; expected at least one batch"),
        (broken(), "disk"),
        (["text"], "`batches` holds a str; expected a tensor"),
        (images(4), "`batches` is a Tensor; expected a list of batches"),
    ],
    ids=["none", "stops", "text", "tensor"],
)
def test_what_fails_leaves_the_statistics_of_before(batches, error: str):
    model = net().train()
    before = statistics(model)
    with pytest.raises((ValueError, OSError), match=error):
        reestimate_batch_norm(model, batches)
    after = statistics(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [n.momentum for n in norms_of(model).values()] == [0.01, 0.1] and model[2].training


def with_new_norm(seen: bool) -> nn.Sequential:
    """Its second convolution sees what the first gives, fifty times as small as after normalization."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.LazyLinear(3))
    nn.init.normal_(model[0].weight, std=0.004)
    model(images(2))  # LazyLinear
    model[1].reset_running_stats()
    if seen:
        model[1].running_mean.fill_(0.01)  # as of a converted model, which has counted nothing
    return model.eval()


@pytest.mark.parametrize("momentum", [0.0, 0.1])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seen", [False, True])
def test_norms_without_statistics_normalize_by_the_batch_while_ranges_are_found(training, seen, momentum):
    model = quantize(with_new_norm(seen), SAQQuantizationConfig(first_last_bits=None, activation_mode="signed"))
    model[1].momentum = momentum
    before, x = statistics(model), images(16, seed=1)
    calibrate(model.train(training), [x])
    assert all(torch.equal(before[name], value) for name, value in statistics(model).items())
    assert model.training == model[1].training == training
    reference = quantize(with_new_norm(seen), SAQQuantizationConfig(first_last_bits=None, activation_mode="signed"))
    if not seen:  # the variance of the whole sample instead of that which torch stores: 1 in some thousands
        reestimate_batch_norm(reference.train(), [x], run=lambda x: with_float_weight(reference, x))
    calibrate(reference.eval(), [x])
    for layer in (0, 2, 4):
        scale = model[layer].activation_quantizer.scale
        torch.testing.assert_close(scale, reference[layer].activation_quantizer.scale, rtol=0.01, atol=0)
    assert (model[2].activation_quantizer.scale > 0.1) != seen


def with_float_weight(model: nn.Sequential, x: torch.Tensor) -> None:
    model[1](nn.functional.conv2d(x, model[0].weight, model[0].bias))


def test_one_value_for_each_channel_is_not_normalized_by_itself():
    """A pooled map of a single image: torch refuses to take its variance."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
    )
    quantize(model, SAQQuantizationConfig())
    calibrate(model, [images(1)])
    assert model[4].activation_quantizer.initialized and model[2].num_batches_tracked == 0

"""Each way without perturbation, average or freezing is plain training, bit for bit; and what it does otherwise."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from torch import nn

from benchmarks.shared.digits_training import load_split
from benchmarks.shared.images import Images, shuffled_batches
from benchmarks.shared.training_loop import adamw, fit
from benchmarks.ways.averaging import LatentAverage
from benchmarks.ways.freezing import OscillationFreezing
from benchmarks.ways.rules import AgainstMomentum, ShapedTwoPasses
from benchmarks.ways.shapes import length_of, loss_budget, noisy, per_layer, tensors_of
from benchmarks.ways.tasks import TASKS
from benchmarks.ways.ways import WAYS, Way
from hf_saq import SharpnessAwareMinimizer
from hf_saq.sharpness import quantized_weights
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep

STEPS, RATE = 3, 0.004
NEUTRAL = {"decay": 0.0, "threshold": math.inf}
SAME_BATCHES = [name for name in WAYS if "echo" not in name and "twice" not in name]
ECHOED = [name for name in WAYS if name.startswith("echo 2")]
LAYER_NORM = ["full + clean scales", "momentum (MSAM)", "full + radius per layer"]
"""Ways that are tried on the tiny ViT as well."""
RADIUS = {"vit": 0.2, "cnn": 0.5}


@cache
def images() -> Images:
    return load_split(60, 1700)[0]


@cache
def calibrated(task: str) -> nn.Module:
    return TASKS[task].quantized(TASKS[task].build(0).state_dict(), images())


def model_of(task: str) -> nn.Module:
    return copy.deepcopy(calibrated(task))


def trained(task: str, way: Way, rho: float, own: dict[str, float]) -> dict[str, torch.Tensor]:
    model = model_of(task)
    optimizer = adamw(model, RATE, 0.05)
    average = LatentAverage(model, optimizer, own["decay"]) if way.extra == "average" else None
    if way.extra == "freeze":
        OscillationFreezing(model, optimizer, STEPS, own["threshold"])
    batches = shuffled_batches(images(), 20, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    fit(model, map(Images.as_batch, batches), STEPS, optimizer, way.config(rho, own))
    if average is not None:
        average.conclude()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@cache
def plain(task: str, name: str) -> dict[str, torch.Tensor]:
    return trained(task, WAYS[name], 0.0, {})


def equal(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, those[name]) for name, p in these.items())


@pytest.mark.parametrize(
    ("task", "name"),
    [*(("cnn", name) for name in [*SAME_BATCHES, *ECHOED]), *(("vit", name) for name in LAYER_NORM)],
)
def test_neutral_settings_are_plain_training(task, name):
    way = WAYS[name]
    own = way.settings[0].own if way.settings else {}
    neutral = {key: NEUTRAL.get(key, value) for key, value in own.items()}
    reference = plain(task, "qat, echoed batches" if name in ECHOED else "qat")
    assert equal(trained(task, way, 0.0, neutral), reference)
    if way.settings and way.extra != "freeze":  # in three steps nothing has oscillated
        assert not equal(trained(task, way, RADIUS[task], own), reference)


@pytest.mark.parametrize("of", ["full", "balanced"])
def test_an_own_rule_without_a_shape_is_the_schedule_of_the_package(of):
    own = Way(of, "", saq=WAYS[of].saq, rule=ShapedTwoPasses)
    assert equal(trained("cnn", own, RADIUS["cnn"], {}), trained("cnn", WAYS[of], RADIUS["cnn"], {}))


def climbed(rho=0.3):
    """An `eps` of the tiny ViT, its minimizer, and the gradient it was made of."""
    model = model_of("vit")
    minimizer = SharpnessAwareMinimizer(model, rho)
    batch = images().as_batch()
    with minimizer.ascent():
        nn.functional.cross_entropy(model(batch["pixels"]), batch["labels"]).backward()
    return minimizer.climb(), minimizer


def test_noise_keeps_the_radius_and_turns_the_direction_by_its_share():
    eps, minimizer = climbed()
    before = torch.cat([t.flatten().clone() for t in tensors_of(eps)])
    torch.manual_seed(0)
    after = torch.cat([t.flatten() for t in tensors_of(noisy(eps, minimizer, {"noise": 2.0}))])
    assert after.norm().item() == pytest.approx(0.3, rel=1e-4)
    cosine = (before @ after / (before.norm() * after.norm())).item()
    assert cosine == pytest.approx(1 / math.sqrt(1 + 2.0**2), abs=0.02)  # random directions are orthogonal in many


def test_the_loss_budget_bounds_the_first_order_rise():
    for share, expected in ((0.25, 0.25), (4.0, 1.0)):
        eps, minimizer = climbed()
        sigma = share * 0.3 * minimizer.ascent_norm
        assert length_of(tensors_of(loss_budget(eps, minimizer, {"sigma": sigma}))) == pytest.approx(
            expected * 0.3, rel=1e-4
        )


def test_radii_per_layer_are_proportional_to_weights():
    eps, minimizer = climbed()
    directions = [t / t.norm() for t in tensors_of(eps)]
    shaped = tensors_of(per_layer(eps, minimizer, {}))
    weights = {entry.quantizer: entry.weight for entry in quantized_weights(minimizer.model)}
    sizes = [q.fake_quantize(weights[q]).norm().item() for q in eps.outputs] + [p.norm().item() for p in eps.in_place]
    total = math.sqrt(sum(size**2 for size in sizes))
    for t, direction, size in zip(shaped, directions, sizes, strict=True):
        torch.testing.assert_close(t, 0.3 * size / total * direction.nan_to_num(0.0), rtol=1e-4, atol=1e-7)


def test_momentum_is_followed_with_a_minus_sign():
    """Of the first step the momentum is the gradient itself; of the second, 0.9 of it and the new one."""
    model = model_of("vit")
    minimizer = SharpnessAwareMinimizer(model, 0.3)
    step = ScheduledStep(minimizer, PerturbationSchedule())
    step.rule = rule = AgainstMomentum(minimizer, step.schedule)
    batch = images().as_batch()

    def backward(batch, reduce=True):  # noqa: ARG001
        loss = nn.functional.cross_entropy(model(batch["pixels"]), batch["labels"])
        loss.backward()
        return loss.detach()

    reference, _ = climbed()
    step.micro_batch(0, [batch], backward, 0, 2)
    for found, expected in zip(tensors_of(rule.eps), tensors_of(reference), strict=True):
        torch.testing.assert_close(found, -expected, rtol=1e-4, atol=1e-7)
    first = [t.clone() for t in rule._momentum]
    eps = rule.eps
    with minimizer.displaced(eps), minimizer.ascent():
        backward(batch)
    gradient = [t * minimizer.ascent_norm / 0.3 for t in tensors_of(minimizer.climb())]
    step.micro_batch(0, [batch], backward, 1, 2)
    expected = [0.9 * m + g for m, g in zip(first, gradient, strict=True)]
    length = length_of(expected)
    for found, momentum in zip(tensors_of(rule.eps), expected, strict=True):
        torch.testing.assert_close(found, -0.3 * momentum / length, rtol=1e-4, atol=1e-7)


def test_the_average_is_the_moving_average_of_weights():
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    average = LatentAverage(layer, optimizer, 0.5)
    expected, seen = layer.weight.detach().clone(), []
    for step in range(12):
        layer.weight.grad = torch.randn(3, 3)
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
        seen.append(layer.weight.detach().clone())
    average.conclude()
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert not torch.equal(layer.weight, seen[-1])


def test_a_weight_that_oscillates_is_frozen_where_it_was_most():
    model = model_of("cnn")
    entry = quantized_weights(model)[1]
    others = [p for p in model.parameters() if p is not entry.weight]
    optimizer = torch.optim.SGD([entry.weight], lr=1.0)
    total = 40
    scale = entry.quantizer.grid(entry.weight)[0].flatten()[0]
    rest = entry.weight.detach().clone()
    with torch.no_grad():
        entry.weight.view(-1)[0] = 0.4 * scale
    freezing = OscillationFreezing(model, optimizer, total, 0.05)
    for step in range(total):
        wanted = (0.9 if step % 4 == 0 else 0.4) * scale  # code 1 in every fourth step, else 0
        entry.weight.grad = torch.zeros_like(entry.weight)
        with torch.no_grad():
            entry.weight.grad.view(-1)[0] = entry.weight.view(-1)[0] - wanted
        optimizer.step()
    assert freezing.frozen_share * sum(w.is_frozen.numel() for w in freezing._weights) == 1
    assert entry.weight.view(-1)[0].item() == 0.0
    assert torch.equal(entry.weight.view(-1)[1:], rest.view(-1)[1:])
    assert all(p.grad is None for p in others)

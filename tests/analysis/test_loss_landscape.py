"""Landscapes against the closed form of a linear model, whose loss is a parabola along every direction."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from labelled_models import labelled_images, labelled_vectors, nothing_changes, quantized_linear_net, quantized_vit
from tiny_models import conv_net, images, linear_net
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_saq import SAQQuantizationConfig, calibrate, dequantize, quantize
from hf_saq.analysis import landscape
from hf_saq.analysis.directions import filter_normalized
from hf_saq.analysis.weight_point import WeightPoint

W4 = SAQQuantizationConfig(weight_bits=4, activation_bits=None)
W2 = SAQQuantizationConfig(weight_bits=2, activation_bits=None, first_last_bits=None)


def half_square(model: nn.Module, batch) -> torch.Tensor:
    """`L(W) = mean_i |W x_i|^2 / 2 = tr(W C W') / 2` with `C = X'X/n`."""
    return model(batch).square().sum(1).mean() / 2


def linear_model() -> tuple[nn.Module, list[torch.Tensor], torch.Tensor]:
    net = quantize(nn.Sequential(nn.Linear(5, 4, bias=False)).double(), W2)
    batches = [torch.randn(n, 5, dtype=torch.float64) for n in (20, 10)]
    return net, batches, sum(x.mT @ x for x in batches) / 30


def normalized(seed_of: torch.Generator, w_q: torch.Tensor) -> torch.Tensor:
    """The direction by hand: rows of normal numbers with the norms of the rows of `w_q`."""
    d = torch.randn(w_q.shape, generator=seed_of).double()
    return d / d.norm(dim=1, keepdim=True) * w_q.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_linear_model_has_the_landscape_of_its_closed_form(dimensions: int):
    """At `Q(w) + d` and at `Q(w + d)`; tolerance 1e-9 in float64."""
    net, batches, c = linear_model()
    layer = net[0]
    w_q, w = layer.quantized_weight().detach(), layer.weight.detach()
    generator = torch.Generator().manual_seed(3)
    d, e = normalized(generator, w_q), normalized(generator, w_q)
    found = landscape(
        net,
        batches,
        loss=half_square,
        dimensions=dimensions,
        span=0.5,
        points=5,
        places=("quantized", "latent"),
        seed=3,
    )
    assert found.steps == (-0.5, -0.25, 0, 0.25, 0.5)

    def loss(weight: torch.Tensor) -> float:
        return (weight @ c * weight).sum().item() / 2

    grid = [(a, b) for a in found.steps for b in (found.steps if dimensions == 2 else (0,))]
    after, before = found.surfaces
    assert after.flat() == pytest.approx([loss(w_q + a * d + b * e) for a, b in grid], rel=1e-9)
    expected = [loss(layer.weight_quantizer(w + a * d + b * e).detach()) for a, b in grid]
    assert before.flat() == pytest.approx(expected, rel=1e-9)
    assert after.flat() != pytest.approx(before.flat(), rel=1e-3)


def test_models_of_another_scale_have_the_same_landscape():
    """A ReLU net whose first layer is twice as large and whose last is half as large computes the same, and so do both
    when each filter is moved by its norm. Tolerance 1e-5 in float32."""
    nets = {}
    for name, factor in (("one", 1.0), ("two", 2.0)):
        net = linear_net()
        net[3] = nn.ReLU()
        with torch.no_grad():
            for parameter in net[0].parameters():
                parameter.mul_(factor)
            net[2].weight.div_(factor)
        nets[name] = net
    one, two = landscape(nets, labelled_vectors(), points=5, span=3).surfaces
    assert (one.name, two.name) == ("one", "two")
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    assert max(one.losses) > 1.1 * min(one.losses)  # else everything would be equal


@pytest.mark.parametrize("order", [1, -1], ids=["quantized first", "float first"])
def test_a_float_model_moves_as_the_quantized_one_beside_it(order: int):
    """Both stand at `Q(w)`, and one function has one landscape. Embeddings, which nobody quantizes, do not move.

    A layer that only one of them has quantized does not move either. Tolerance 1e-4 in float32.
    """
    model = quantized_vit(activation_bits=None)
    partly = quantize(dequantize(model), W4.replace(modules_to_not_convert=["*.fc1"]))
    models = {"quantized": model, "partly": partly, "float": dequantize(model)}
    found = landscape(dict(list(models.items())[::order]), labelled_images(), points=3, span=2)
    by_name = {surface.name: surface.losses for surface in found.surfaces}
    assert by_name["partly"] == pytest.approx(by_name["quantized"], rel=1e-4)
    assert by_name["float"] == pytest.approx(by_name["quantized"], rel=1e-4)
    two = landscape({"quantized": model, "float": models["float"]}, labelled_images(), points=3, span=2)
    assert two.surfaces[0].losses == landscape(model, labelled_images(), points=3, span=2).surfaces[0].losses
    assert two.surfaces[1].losses == pytest.approx(two.surfaces[0].losses, rel=1e-4)
    assert max(two.surfaces[0].losses) > 1.1 * min(two.surfaces[0].losses)


def test_filters_of_layers_with_inputs_first_are_those_of_their_outputs():
    """transformers' Conv1D has the weight `(inputs, outputs)`. In float it was moved by rows, quantized by columns;
    kernels of transposed convolutions, which nobody quantizes, belong to dimension 1 as well."""
    plain = nn.Sequential(Conv1D(6, 4), nn.ReLU(), nn.Linear(6, 3))
    quantized = quantize(copy.deepcopy(plain), W2.replace(weight_bits=8))
    models = {"float": dequantize(quantized), "quantized": quantized}
    of_float, of_quantized = landscape(models, [torch.randn(9, 4)], loss=half_square, points=3).surfaces
    assert of_float.losses == pytest.approx(of_quantized.losses, rel=1e-5)
    point = WeightPoint("test", nn.Sequential(nn.ConvTranspose2d(2, 5, 3)), ("weight",))
    (direction,) = filter_normalized(point, torch.Generator().manual_seed(0))
    norms = [t.movedim(1, 0).flatten(1).norm(dim=1) for t in (direction, point.values()[0])]
    torch.testing.assert_close(*norms)


def test_models_in_which_nothing_moves_alike_are_refused():
    first, last = (
        quantize(linear_net(), W2.replace(modules_to_not_convert=kept)) for kept in (["2", "4"], ["0", "2"])
    )
    with pytest.raises(ValueError, match=r"selects no tensor that moves in each of \['first', 'last'\]; expected"):
        landscape({"first": first, "last": last}, labelled_vectors(), points=3)


def test_every_filter_is_moved_by_its_norm_and_vectors_stay():
    net = conv_net()
    quantize(net, W2)
    calibrate(net, [images(2, size=8)])
    point = WeightPoint("test", net.eval(), ("weight", "bias", "norm"))
    direction = filter_normalized(point, torch.Generator().manual_seed(0))
    for part, value in zip(direction, point.values(), strict=True):
        if part.ndim == 1:
            assert not part.any()
        else:
            torch.testing.assert_close(part.flatten(1).norm(dim=1), value.flatten(1).norm(dim=1))
    assert {part.ndim for part in direction} == {1, 2, 4}


@pytest.mark.parametrize("make", [quantized_linear_net, quantized_vit], ids=["pairs", "transformers"])
def test_the_model_is_left_as_it_was(make):
    model = make()
    batches = labelled_vectors() if make is quantized_linear_net else labelled_images()
    with nothing_changes(model):
        found = landscape(model, batches, points=3, places=("latent", "quantized"))
    latent, quantized = found.surfaces
    assert latent.losses[1] == quantized.losses[1]  # no step, no difference
    assert latent.losses[0] != quantized.losses[0]


@pytest.mark.parametrize("dimensions", [1, 2])
def test_the_result_prints_draws_and_becomes_json(dimensions: int, tmp_path):
    models = {"QAT": quantized_linear_net(2), "SAQ": quantized_linear_net(4)}
    found = landscape(models, labelled_vectors(), points=3, dimensions=dimensions)
    assert "QAT, Q(w) + d" in str(found) and f"{found.surfaces[1].flat()[3**dimensions // 2]:.4g}" in str(found)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["surfaces"][1]["name"] == "SAQ" and found.seconds > 0
    found.plot(tmp_path / "landscape.png")
    assert (tmp_path / "landscape.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_wrong_is_said():
    net = quantized_linear_net()
    with pytest.raises(ValueError, match=r"points=4; expected an odd number >= 3"):
        landscape(net, labelled_vectors(), points=4)
    with pytest.raises(ValueError, match=r"places=\['w'\]; expected some of \['quantized', 'latent'\]"):
        landscape(net, labelled_vectors(), places=["w"])
    with pytest.raises(ValueError, match=r"dimensions=3; expected 1 or 2"):
        landscape(net, labelled_vectors(), dimensions=3)
    with pytest.raises(ValueError, match=r"`models` is empty"):
        landscape({}, labelled_vectors())

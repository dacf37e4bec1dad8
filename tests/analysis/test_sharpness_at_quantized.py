"""Sharpness and curvature against closed forms of a quadratic and exact Hessians of small nets."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from labelled_models import (
    labelled_images,
    labelled_vectors,
    nothing_changes,
    quantized_linear_net,
    quantized_vit,
)
from tiny_models import linear_net
from torch import nn

from hf_saq import SAQQuantizationConfig, dequantize, pack, quantize
from hf_saq.analysis import sharpness
from hf_saq.analysis.batch_losses import LabelledBatches
from hf_saq.analysis.curvature import hessian_trace, largest_eigenvalue, random_vector
from hf_saq.analysis.weight_point import WeightPoint
from hf_saq.layers import QuantizedLayer

RHO = 0.3


def half_square(model: nn.Module, batch) -> torch.Tensor:
    """`L(W) = mean_i |W x_i|^2 / 2`, so that with `C = X'X/n` the gradient is `W C` and the Hessian `I x C`."""
    return model(batch).square().sum(1).mean() / 2


def quadratic() -> tuple[nn.Module, torch.Tensor, list[torch.Tensor]]:
    """A linear net in float64 with weights of 2 bits, that quantized weight, and batches of different sizes."""
    net = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    quantize(net, SAQQuantizationConfig(weight_bits=2, activation_bits=None, first_last_bits=None))
    batches = [torch.randn(n, 5, dtype=torch.float64) * torch.arange(1, 6) for n in (20, 10)]
    return net, net[0].quantized_weight().detach(), batches


def test_a_quadratic_has_the_sharpness_of_its_closed_form():
    """Tolerance 1e-9, in float64; 1e-3 where power iteration stops."""
    net, w_q, batches = quadratic()
    assert not torch.allclose(w_q, net[0].weight, atol=0.05)  # else the test could not tell Q(w) from w
    found = sharpness(net, batches, RHO, loss=half_square, random_directions=400, power_iterations=200, tolerance=1e-5)
    covariances = [x.mT @ x / len(x) for x in batches]
    shares = [2 / 3, 1 / 3]

    def rise(eps: torch.Tensor, c: torch.Tensor) -> float:
        return ((w_q @ c * eps).sum() + (eps @ c * eps).sum() / 2).item()

    def steepest(c: torch.Tensor) -> torch.Tensor:
        return RHO * w_q @ c / (w_q @ c).norm()

    def adaptive(c: torch.Tensor) -> torch.Tensor:
        t = w_q.abs() + 0.01
        return RHO * t**2 * (w_q @ c) / (t * (w_q @ c)).norm()

    mean = sum(s * c for s, c in zip(shares, covariances, strict=True))
    assert found.loss == pytest.approx((w_q @ mean * w_q).sum().item() / 2, rel=1e-9)
    for measured, expected in (
        (found.steepest, [rise(steepest(c), c) for c in covariances]),
        (found.adaptive, [rise(adaptive(c), c) for c in covariances]),
        (found.common, [rise(steepest(mean), c) for c in covariances]),
    ):
        assert measured.of_batches == pytest.approx(expected, rel=1e-9)
        assert measured.mean == pytest.approx(sum(s * e for s, e in zip(shares, expected, strict=True)), rel=1e-9)
        assert measured.spread == pytest.approx(abs(expected[0] - expected[1]) / math.sqrt(2), rel=1e-9)
    # Half of rho^2 trace / n in expectation; the slope of single directions averages out over 400 of them.
    trace = 4 * mean.trace().item()
    slope = RHO * (w_q @ mean).norm().item() / math.sqrt(20)
    assert abs(found.random.mean - RHO**2 * trace / 20 / 2) < 4 * slope / math.sqrt(400)
    assert found.random.mean < found.common.mean
    assert found.eigenvalue == pytest.approx(torch.linalg.eigvalsh(mean)[-1].item(), rel=1e-3)
    assert found.trace == pytest.approx(trace, abs=4 * found.trace_error)
    assert found.elements == 20


def exact_hessian(net: nn.Module, batches: list) -> torch.Tensor:
    """The Hessian of the mean loss by torch.func, of a copy whose float weights are `Q(w)`."""
    plain = copy.deepcopy(net).eval()
    for layer in [m for m in plain.modules() if isinstance(m, QuantizedLayer) and m.weight_quantizer is not None]:
        w_q, layer.weight_quantizer = layer.quantized_weight().detach(), None
        layer.weight.data = w_q
    names = [k for k, p in plain.named_parameters() if k.endswith("weight")]
    names += [k for k, _ in plain.named_parameters() if k.endswith("bias")]
    parameters = dict(plain.named_parameters())
    sizes = [parameters[k].numel() for k in names]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = {k: part.view_as(parameters[k]) for k, part in zip(names, flat.split(sizes), strict=True)}
        total = sum(
            nn.functional.cross_entropy(torch.func.functional_call(plain, parts, (x,)), y, reduction="sum")
            for x, y in batches
        )
        return total / sum(len(y) for _, y in batches)

    flat = torch.cat([parameters[k].detach().flatten() for k in names])
    return torch.func.jacrev(torch.func.jacrev(loss))(flat)


@pytest.mark.parametrize("activation_bits", [None, 4], ids=["float activations", "4-bit activations"])
def test_curvature_is_that_of_the_exact_hessian(activation_bits: int | None):
    """Also where activations are rounded, straight through; products within 1e-9 in float64."""
    net = quantized_linear_net(2, activation_bits).double().eval()
    batches = labelled_vectors(dtype=torch.float64)
    hessian = exact_hessian(net, batches)
    eigenvalues = torch.linalg.eigvalsh(hessian)
    data = LabelledBatches("test", batches)
    point = WeightPoint("test", net, ("weight", "bias"))
    generator = torch.Generator().manual_seed(0)
    v = random_vector(point, generator)
    product = torch.cat([part.flatten() for part in point.hessian_product(data, v)])
    torch.testing.assert_close(product, hessian @ torch.cat([p.flatten() for p in v]), rtol=1e-9, atol=1e-9)
    value, residual = largest_eigenvalue(point, data, 300, 1e-6, generator)
    assert value == pytest.approx(eigenvalues[-1].item(), rel=1e-3)
    assert (eigenvalues - value).abs().min() <= residual + 1e-9
    trace, error, blocks = hessian_trace(point, data, 100, generator)
    assert abs(trace - hessian.trace().item()) < 4 * error
    assert error < 0.06 * eigenvalues.abs().sum()  # else the line above says nothing
    assert sum(blocks) == pytest.approx(trace) and len(blocks) == 6


def test_the_largest_eigenvalue_is_not_the_one_of_largest_magnitude():
    """`L = sum(a w^2) / 2` has the eigenvalues `a`."""
    net = quantized_linear_net().double()
    a = torch.linspace(-5, 2, 48, dtype=torch.float64).view(8, 6)

    def loss(model: nn.Module, batch) -> torch.Tensor:
        # The columns of the first weight, seen through the layer at the unit vectors.
        w = (model[0].compute(torch.eye(6, dtype=torch.float64), model[0].quantized_weight(), None)).mT
        return (a * w**2).sum() / 2

    found = sharpness(net, [0], RHO, loss=loss, power_iterations=500, tolerance=1e-7, perturb=("weight",))
    assert found.eigenvalue == pytest.approx(2, rel=1e-2)
    assert found.trace == pytest.approx(a.sum().item(), rel=1e-9)  # signs see the diagonal exactly


@pytest.mark.parametrize("seed", range(3))
def test_the_tolerance_is_that_of_the_largest_eigenvalue(seed: int):
    """Where a negative one is five times as large, and the iteration is shifted by it. Within 1 %."""

    class Valley(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, factors: torch.Tensor) -> torch.Tensor:
            return (factors * self.w**2).sum() / 2

    factors = torch.tensor([0.2, -1.0, 0.1, -0.3], dtype=torch.float64)
    found = sharpness(Valley(), [factors], RHO, loss=lambda m, batch: m(batch), power_iterations=500, seed=seed)
    assert found.eigenvalue == pytest.approx(0.2, rel=1e-2)


def test_a_product_through_attention_is_a_difference_of_gradients():
    """Central differences in float64, of a float copy that has `Q(w)` as its weights; within 1e-5 of the norm."""
    model = quantized_vit(activation_bits=None).double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in labelled_images()[0].items()}
    data = LabelledBatches("test", [batch])
    point = WeightPoint("test", model, ("weight", "bias", "norm"))
    v = random_vector(point, torch.Generator().manual_seed(1))
    names = {p: name for name, p in model.named_parameters()}
    names |= {entry.weight: f"{entry.name}.weight" for entry in point.tensors.weights}
    plain = dequantize(model)
    parameters = [plain.get_parameter(names[getattr(key, "weight", key)]) for key in point.keys]
    here = [p.detach().clone() for p in parameters]
    step = 1e-4
    gradients = []
    for sign in (step, -step):
        for p, value, part in zip(parameters, here, v, strict=True):
            p.data = value + sign * part
        gradients.append(torch.autograd.grad(data.loss(plain, 0), parameters))
    difference = torch.cat([((a - b) / (2 * step)).flatten() for a, b in zip(*gradients, strict=True)])
    product = torch.cat([part.flatten() for part in point.hessian_product(data, v)])
    assert product.norm() > 1
    assert (product - difference).norm() < 1e-5 * product.norm()


@pytest.mark.parametrize("make", [quantized_linear_net, quantized_vit], ids=["pairs", "transformers"])
def test_the_model_is_left_as_it_was(make):
    model = make()
    batches = labelled_vectors() if make is quantized_linear_net else labelled_images()
    with nothing_changes(model):
        found = sharpness(model, batches, RHO, random_directions=1, power_iterations=2, trace_samples=2)
    assert found.steepest.mean > found.random.mean


def test_the_steepest_direction_is_taken_at_the_quantized_weights_and_not_through_the_clip():
    """Where `w` is clipped the gradient of the latent weight is zero; `g_q` is not."""
    net, _, batches = quadratic()
    with torch.no_grad():
        net[0].weight[0] *= 100  # far beyond the grid
    w_q = net[0].quantized_weight().detach()
    c = batches[0].mT @ batches[0] / len(batches[0])
    eps = RHO * w_q @ c / (w_q @ c).norm()
    found = sharpness(net, batches[:1], RHO, loss=half_square)
    assert found.steepest.mean == pytest.approx(((w_q @ c * eps).sum() + (eps @ c * eps).sum() / 2).item(), rel=1e-9)


def test_a_float_model_is_measured_at_its_float_weights():
    net = linear_net()
    found = sharpness(net, labelled_vectors(), RHO, trace_samples=2)
    assert found.elements == sum(p.numel() for p in net.parameters())
    assert found.loss == pytest.approx(
        sum(nn.functional.cross_entropy(net(x), y, reduction="sum").item() for x, y in labelled_vectors()) / 12
    )


def test_a_float_model_beside_a_quantized_one_moves_what_is_in_scope_there():
    """One function, one point, one sharpness: embeddings, weights of the float model alone, made it another."""
    model, batches = quantized_vit(activation_bits=None), labelled_images()
    names = WeightPoint("test", model, ("weight", "bias", "norm")).names
    few = dict(power_iterations=1, random_directions=1, trace_samples=2)
    one, two, all_of_it = (
        sharpness(each, batches, 0.1, only=only, **few)
        for each, only in ((model, None), (dequantize(model), names), (dequantize(model), None))
    )
    assert one.elements == two.elements < all_of_it.elements
    assert two.steepest.mean == pytest.approx(one.steepest.mean, rel=1e-4)
    assert all_of_it.steepest.mean != pytest.approx(one.steepest.mean, rel=1e-3)


def test_the_result_prints_draws_and_becomes_json(tmp_path):
    found = sharpness(quantized_linear_net(), labelled_vectors(), RHO, trace_samples=2)
    assert "rise: steepest, rho=0.3" in str(found) and f"{found.eigenvalue:.4g}" in str(found)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["steepest"]["of_batches"] == list(found.steepest.of_batches)
    found.plot(tmp_path / "sharpness.png")
    assert (tmp_path / "sharpness.png").read_bytes().startswith(b"\x89PNG")


def test_one_kind_of_tensors_by_its_name():
    one, listed = (
        sharpness(quantized_linear_net(), labelled_vectors(), RHO, perturb=perturb, random_directions=1)
        for perturb in ("weight", ["weight"])
    )
    assert str(one) == str(listed)


def test_what_is_wrong_is_said():
    net = quantized_linear_net()
    with pytest.raises(ValueError, match=r"sharpness: rho=0; expected a finite number > 0"):
        sharpness(net, labelled_vectors(), 0)
    with pytest.raises(ValueError, match=r"sharpness: eta=nan; expected a finite number >= 0"):
        sharpness(net, labelled_vectors(), RHO, eta=float("nan"))
    with pytest.raises(ValueError, match="`batches` is empty; expected at least one batch of inputs with labels"):
        sharpness(net, [], RHO)
    with pytest.raises(ValueError, match=r"`batches` is a Tensor; expected a list of batches"):
        sharpness(net, torch.zeros(3, 6), RHO)
    with pytest.raises(ValueError, match=r"`batches` holds a Tensor; expected a dict .* or a pair"):
        sharpness(net, [torch.zeros(3, 6)], RHO)
    with pytest.raises(ValueError, match=r"trace_samples=1; expected at least 2"):
        sharpness(net, labelled_vectors(), RHO, trace_samples=1)
    with pytest.raises(ValueError, match=r"is packed, .*expected a trainable model. Pass `hf_saq.unpack\(model\)`"):
        sharpness(pack(net), labelled_vectors(), RHO)
    with pytest.raises(ValueError, match=r"perturb=\['norm'\] selects no trainable tensor of Sequential"):
        sharpness(net, labelled_vectors(), RHO, perturb=["norm"])
    with pytest.raises(ValueError, match=r"The loss of batch 0 has shape \(8, 3\); expected a tensor with one number"):
        sharpness(net, labelled_vectors(), RHO, loss=lambda model, batch: model(batch[0]))
    with pytest.raises(ValueError, match=r"computed no loss from a batch with \['pixel_values'\]"):
        sharpness(quantized_vit(), [{"pixel_values": labelled_images()[0]["pixel_values"]}], RHO)

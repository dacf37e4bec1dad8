"""Sensitivities against models in which one operand is quantized by the ordinary way, and estimates by hand."""

from __future__ import annotations

import json

import pytest
import torch
from labelled_models import (
    labelled_images,
    labelled_vectors,
    nothing_changes,
    quantized_linear_net,
    quantized_vit,
)
from scipy.stats import spearmanr
from tiny_models import linear_net
from torch import Tensor, nn

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.analysis import sensitivity
from hf_saq.analysis.agreement import signal_to_noise
from hf_saq.analysis.batch_losses import LabelledBatches
from hf_saq.analysis.bits.candidates import Candidates, observe_activations, observed, quantized_operands, replaced
from hf_saq.analysis.bits.layer_sensitivity import rank_correlation
from hf_saq.conversion.observing import PassThrough
from hf_saq.quantizers import Quantizer

NAMES = ["0", "2", "4"]


def mean_loss(net: nn.Module, batches: list) -> float:
    with torch.no_grad():
        total = sum(nn.functional.cross_entropy(net(x), y, reduction="sum").item() for x, y in batches)
    return total / sum(len(y) for _, y in batches)


def one_operand(name: str, operand: str, bits: int, batches: list) -> nn.Module:
    """A net in which only this is quantized, built by `quantize` and `calibrate`."""
    config = SAQQuantizationConfig(
        weight_bits=bits if operand == "weight" else None,
        activation_bits=bits if operand == "activation" else None,
        first_last_bits=None,
        modules_to_not_convert=[other for other in NAMES if other != name],
    )
    return calibrate(quantize(linear_net(), config), [x for x, _ in batches])


def test_each_entry_is_what_a_model_with_this_operand_quantized_shows():
    """All but those of the bits that the model has, whose scales are its own; tolerance 1e-6."""
    batches = labelled_vectors(batches=4)
    found = sensitivity(quantized_linear_net(3, 4), batches, candidates=(2, 5), passes=1000)
    plain = linear_net()
    assert found.loss == pytest.approx(mean_loss(plain, batches), abs=1e-6) and found.batches_measured == 4
    assert len(found.entries) == 3 * 2 * 2
    logits = torch.cat([plain(x) for x, _ in batches])
    for entry in found.entries:
        net = one_operand(entry.name, entry.operand, entry.bits, batches)
        assert entry.loss_rise == pytest.approx(mean_loss(net, batches) - found.loss, abs=1e-6)
        changed = torch.cat([net(x) for x, _ in batches])
        assert entry.agreement == (changed.argmax(1) == logits.argmax(1)).double().mean().item()
        ratio = (logits.square().sum() / (logits - changed).square().sum()).item()
        assert 10 ** (entry.snr / 10) == pytest.approx(ratio, rel=1e-3)
        assert entry.present_bits == (3 if entry.operand == "weight" else 4)
    assert {e.agreement for e in found.entries} != {1.0}


def test_a_planted_bad_layer_is_found_first():
    """One huge weight, whose input is always zero, leaves the others of its layer no steps, and does nothing else."""
    net = linear_net()
    with torch.no_grad():
        net[2].weight[0, 0] = 50.0
        net[0].weight[0], net[0].bias[0] = 0.0, 0.0
    config = SAQQuantizationConfig(weight_bits=8, activation_bits=8, first_last_bits=None, scale_init="mean")
    batches = [(x, net(x).argmax(1)) for x, _ in labelled_vectors(64)]  # right in float, so that any change harms
    calibrate(quantize(net, config), [batches[0][0]])
    found = sensitivity(net, batches, candidates=(2, 4), passes=200)
    assert found.ranking()[0] == ("2", "weight")
    estimates = {e.name: e.estimate for e in found.entries if e.operand == "weight" and e.bits == 2}
    assert max(estimates, key=lambda name: estimates[name]) == "2"


def test_base_quantized_measures_what_more_bits_would_win():
    batches = labelled_vectors(batches=3)
    net = quantized_linear_net(2, 3)
    found = sensitivity(net, batches, base="quantized", candidates=(2, 3, 8), passes=1000)
    assert found.loss == pytest.approx(mean_loss(net.eval(), batches), abs=1e-6)
    for name in NAMES:  # its own bits: nothing changes
        for operand, bits in (("weight", 2), ("activation", 3)):
            entry = found.entry(name, operand, bits)
            assert entry.loss_rise == 0 and entry.estimate == 0
    config = SAQQuantizationConfig(
        weight_bits=2, activation_bits=3, first_last_bits=None, overrides={"2": {"weight_bits": 8}}
    )
    more = calibrate(quantize(linear_net(), config), [torch.cat([x for x, _ in labelled_vectors(batches=1)])])
    for name in NAMES:  # the scales of activations of the first net
        more[int(name)].activation_quantizer = net[int(name)].activation_quantizer
    assert found.entry("2", "weight", 8).loss_rise == pytest.approx(mean_loss(more, batches) - found.loss, abs=1e-6)


def half_square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum(1).mean() / 2


def test_the_estimate_of_a_quadratic_with_equal_curvatures_is_exact():
    """With `X'X/n = I` all curvatures are equal, and the second order is all there is; 1e-9 in float64."""
    net = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    quantize(net, SAQQuantizationConfig(weight_bits=4, activation_bits=None, first_last_bits=None))
    x = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64))[0] * 20**0.5
    found = sensitivity(net, [x], loss=half_square, candidates=(2, 3), passes=100)
    for entry in found.entries:
        assert entry.loss_rise != 0
        assert entry.estimate == pytest.approx(entry.loss_rise, rel=1e-9)
    assert found.rank_correlation == {"weight": pytest.approx(1.0)}


def test_the_estimate_for_activations_is_that_of_gradients_of_single_examples():
    """By hand, one example after the other; tolerance 1e-6."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    quantize(net, SAQQuantizationConfig(weight_bits=None, activation_bits=4, first_last_bits=None))
    x = torch.randn(12, 5, dtype=torch.float64)
    calibrate(net, [x])
    found = sensitivity(net, [x[:8], x[8:]], loss=half_square, candidates=(4,), passes=100)
    hidden = net[0].compute(x, net[0].weight, net[0].bias)
    delta = (net[1].activation_quantizer(hidden) - hidden).detach()
    # y = V h + c, loss |y|^2 / 2, so that its gradient for h is V'(V h + c)
    slopes = ((hidden @ net[1].weight.mT + net[1].bias) @ net[1].weight * delta).sum(1).detach()
    expected = (slopes.mean() + slopes.square().mean() / 2).item()
    assert found.entry("1", "activation", 4).estimate == pytest.approx(expected, abs=1e-6)
    assert abs(expected) > 1e-4


def test_estimates_rank_like_measurements():
    found = sensitivity(quantized_linear_net(), labelled_vectors(32, batches=4), candidates=(2, 3, 4), passes=500)
    assert found.rank_correlation["weight"] > 0.5
    measured = [e.loss_rise for e in found.entries if e.operand == "weight"]
    estimated = [e.estimate for e in found.entries if e.operand == "weight"]
    assert found.rank_correlation["weight"] == pytest.approx(spearmanr(estimated, measured).statistic)


def test_the_cost_is_bounded_and_counted():
    net = quantized_linear_net()
    batches = labelled_vectors(4, batches=60)
    forwards = 0

    def count(module, args):
        nonlocal forwards
        forwards += 1

    net.register_forward_pre_hook(count)
    found = sensitivity(net, batches, candidates=(2, 3, 4, 6, 8), passes=20)
    assert forwards <= 20 * 60
    assert found.passes <= 20
    assert found.batches_measured > 10
    entries = len(found.entries)
    assert forwards >= found.batches_measured * (entries + 1)
    few = sensitivity(net, batches[:2], passes=1)  # every measurement needs a batch
    assert few.batches_measured == 1 and few.passes > 1


@pytest.mark.parametrize("size", [40, 20, 7])
def test_few_images_in_few_batches_are_cut_so_that_all_passes_fit(size: int):
    """Estimates on all of one batch would take more than everything, and leave one example to each measurement."""
    net, (x, y) = quantized_linear_net(), labelled_vectors(40)[0]
    batches = list(zip(x.split(size), y.split(size), strict=True))
    seen = 0

    def count(module, args):
        nonlocal seen
        seen += len(args[0])

    net.register_forward_pre_hook(count)
    found = sensitivity(net, batches, candidates=(2, 3, 4), passes=16)
    assert found.passes <= 16 and seen <= 16 * 40
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(linear_net()(a[None]), b[None]).item() for a, b in zip(x, y, strict=True)
        ]
    assert min(abs(found.loss - loss) for loss in losses) > 1e-4  # not that of a single example


@pytest.mark.parametrize(
    ("make", "base"),
    [(quantized_linear_net, "float"), (quantized_linear_net, "quantized"), (quantized_vit, "float")],
    ids=["pairs-float", "pairs-quantized", "transformers"],
)
def test_the_model_is_left_as_it_was(make, base):
    fields = {"quantize_attention": True} if make is quantized_vit else {}
    model = make(**fields)
    batches = labelled_vectors() if make is quantized_linear_net else labelled_images()
    with nothing_changes(model):
        found = sensitivity(model, batches, base=base, candidates=(2, 4), trace_samples=2)
    if make is quantized_vit:
        products = [e for e in found.entries if e.name.endswith("saq_products") or "products" in e.name]
        assert products and {e.operand for e in products} == {"activation"}
        assert all(e.estimate == e.estimate for e in products)
    kinds = {(e.name, e.operand) for e in found.entries}
    assert len(found.entries) == 2 * len(kinds)


def test_a_float_model_is_what_predictions_are_compared_with():
    other = linear_net(seed=3)
    batches = labelled_vectors()
    with nothing_changes(other):
        found = sensitivity(quantized_linear_net(), batches, other, candidates=(8,), passes=500)
    logits = torch.cat([linear_net()(x) for x, _ in batches])
    expected = (logits.argmax(1) == torch.cat([other(x) for x, _ in batches]).argmax(1)).double().mean().item()
    assert expected < 1
    assert found.entry("4", "weight", 8).agreement == pytest.approx(expected, abs=0.1)


def test_frozen_weights_are_measured_and_not_estimated():
    net = quantized_linear_net()
    net[2].weight.requires_grad = False
    found = sensitivity(net, labelled_vectors(), candidates=(2,))
    assert found.to_dict()["entries"][2]["estimate"] is None
    assert found.entry("0", "weight", 2).estimate == found.entry("0", "weight", 2).estimate
    assert found.entry("2", "weight", 2).loss_rise != 0


def test_an_operand_of_several_layers_names_them_all(tmp_path):
    """What query, key and value read is quantized once: that is no number of the query alone, but of the three."""
    shared, apart = quantized_vit(share_inputs=True), quantized_vit()
    batches, query = labelled_images(), "vit.layers.0.attention.q_proj"
    others = tuple(query.replace("q_", name) for name in ("k_", "v_"))
    found = sensitivity(shared, batches, candidates=(2,), passes=500)
    entry = found.entry(query, "activation", 2)
    assert entry.shared_with == others and found.entry(query, "weight", 2).shared_with == ()
    assert all(e.shared_with == () for e in sensitivity(apart, batches, candidates=(2,), passes=500).entries)
    candidates = Candidates(observe_activations(apart, LabelledBatches("test", batches))[0])
    three = [o for o in quantized_operands(apart) if o.name in (query, *others) and o.operand == "activation"]
    together = {old: new for operand in three for old, new in candidates.of(operand, 2).items()}
    off = {m: PassThrough() for m in apart.modules() if isinstance(m, Quantizer)}
    with torch.no_grad(), observed(off), replaced(together):
        rises = [apart(**batch).loss.item() for batch in batches]
    assert entry.loss_rise == pytest.approx(sum(rises) / 2 - found.loss, abs=1e-5)
    assert f"{query} + k_proj, v_proj  activation" in str(found)
    found.plot(tmp_path / "sensitivity.png")


def test_ranks_and_ratios():
    a, b = [3.0, 1.0, 1.0, 5.0, -2.0], [1.0, 0.0, 2.0, 2.0, 2.0]
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert signal_to_noise([torch.tensor([1.1])], [torch.tensor([1.0])]) == pytest.approx(20, abs=1e-4)
    assert signal_to_noise([torch.ones(2)], [torch.ones(2)]) == float("inf")


def test_the_result_prints_draws_and_becomes_json(tmp_path):
    found = sensitivity(quantized_linear_net(), labelled_vectors(), candidates=(2, 8))
    worst, operand = found.ranking()[0]
    assert str(found).splitlines()[1].split()[:2] == [worst, operand]
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    found.plot(tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_wrong_is_said():
    net = quantized_linear_net()
    with pytest.raises(ValueError, match=r"sensitivity: candidates=9; expected an integer from 2 to 8"):
        sensitivity(net, labelled_vectors(), candidates=(2, 9))
    with pytest.raises(ValueError, match=r"base='qat'; expected 'float' or 'quantized'"):
        sensitivity(net, labelled_vectors(), base="qat")
    with pytest.raises(ValueError, match=r"Sequential has no quantizer; expected a model made by `quantize`"):
        sensitivity(linear_net(), labelled_vectors())
    with pytest.raises(ValueError, match=r"is packed, and integers have no gradient|no quantizer"):
        sensitivity(pack(quantized_linear_net(activation_bits=None)), labelled_vectors())
    with pytest.raises(KeyError, match="0 has no entry for 5 bits of its weight"):
        sensitivity(net, labelled_vectors(), candidates=(2,)).entry("0", "weight", 5)

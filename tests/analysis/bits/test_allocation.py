"""Bits for a budget: the integer program against all choices, budgets, constraints, and models built of the result."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache

import pytest
import torch
from labelled_models import (
    labelled_images,
    labelled_vectors,
    nothing_changes,
    quantized_linear_net,
    quantized_vit,
)
from quantized_models import bits as bits_of
from tiny_models import linear_net, vectors, vit
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, cost, quantize
from hf_saq.analysis import Allocation, LayerBits, Sensitivity, allocate_bits, sensitivity
from hf_saq.analysis.bits.allocation import LEFT_BY_TRAINING
from hf_saq.analysis.bits.integer_program import Option, solve
from hf_saq.analysis.bits.prices import never_rising
from hf_saq.layers.packing import packed_size

W3A3 = SAQQuantizationConfig(weight_bits=3, activation_bits=3, first_last_bits=None)


@cache
def measured_once() -> Sensitivity:
    """What the tests allocate by that do not ask how it was measured."""
    return sensitivity(quantized_linear_net(3, 3), labelled_vectors(batches=4), passes=500)


def best_of_all(layers: list[list[Option]], budget: int, alike=()) -> float | None:
    """The smallest loss by trying every choice."""
    losses = [
        sum(o.loss for o in choice)
        for choice in itertools.product(*layers)
        if sum(o.cost for o in choice) <= budget
        and all(len({choice[k].activation_bits for k in group}) == 1 for group in alike)
    ]
    return min(losses) if losses else None


@pytest.mark.parametrize("seed", range(20))
def test_the_integer_program_finds_what_trying_everything_finds(seed: int):
    rng = random.Random(seed)
    macs = [rng.randint(1, 10**6) for _ in range(4)]
    layers = [
        [Option(w, a, m * w * a, rng.uniform(-0.1, 1) / w + rng.uniform(0, 1) / a) for w in (2, 4, 8) for a in (2, 3)]
        for m in macs
    ]
    alike = [[0, 2, 3]] if seed % 2 else []
    least, most = (sum(f(o.cost for o in layer) for layer in layers) for f in (min, max))
    for budget in (least - 1, least, (least + most) // 3, most):
        chosen, expected = solve(layers, budget, alike), best_of_all(layers, budget, alike)
        if expected is None:
            assert chosen is None
            continue
        assert all(option in layer for option, layer in zip(chosen, layers, strict=True))
        assert sum(option.cost for option in chosen) <= budget
        assert sum(option.loss for option in chosen) == pytest.approx(expected, abs=1e-8)
        assert all(len({chosen[k].activation_bits for k in group}) == 1 for group in alike)


def test_a_budget_is_kept_to_the_last_operation():
    """One operation too many is within the tolerance of the solver; it must not be taken."""
    large = 10**9
    layers = [[Option(2, None, large, 1.0), Option(3, None, large + 1, 0.0)]] * 2
    assert sum(o.cost for o in solve(layers, 2 * large + 1)) == 2 * large + 1
    assert sum(o.cost for o in solve(layers, 2 * large)) == 2 * large


def test_more_bits_never_count_as_worse():
    assert never_rising({8: 0.1, 2: 1.0, 4: 0.05, 3: 0.2}) == {8: 0.1, 4: 0.1, 3: 0.2, 2: 1.0}


def built(allocation: Allocation, make=linear_net, x=None, config=W3A3) -> nn.Module:
    return calibrate(quantize(make(), allocation.applied_to(config)), [vectors(64, seed=5) if x is None else x])


@pytest.mark.parametrize("budget", ["3 bits", "0.8x", "1.5x", 2000])
def test_a_model_built_of_the_result_costs_what_it_says(budget):
    net = quantized_linear_net(3, 3)
    batches = labelled_vectors(batches=4)
    found = allocate_bits(net, batches, budget, found=measured_once())
    before = cost(net, vectors(1)).bops
    assert found.cost_before == before == (48 + 64 + 24) * 9
    expected = {"3 bits": before, "0.8x": int(0.8 * before), "1.5x": int(1.5 * before), 2000: 2000}[budget]
    assert found.budget == expected and found.cost <= found.budget
    model = built(found)
    assert cost(model, vectors(1)).bops == found.cost
    assert bits_of(model) == {layer.name: (layer.weight_bits, layer.activation_bits) for layer in found.layers}


EVERY_PAIR = tuple(itertools.product((2, 3, 4, 6, 8), repeat=2))


def latencies_of_a_machine(pairs=EVERY_PAIR):
    """A machine on which the second layer takes no less time with fewer bits."""
    return {name: {(w, a): 50.0 if name == "2" else 10.0 * w * a for w, a in pairs} for name in ("0", "2", "4")}


def test_a_budget_of_time_gives_bits_where_they_cost_none():
    net, batches = quantized_linear_net(3, 3), labelled_vectors(batches=4)
    arguments = {"unit": "ns", "found": measured_once(), "by": "noise"}
    found = allocate_bits(net, batches, "1x", latencies=latencies_of_a_machine(), **arguments)
    chosen = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in found.layers}
    assert chosen["2"] == (8, 8) and found.cost <= found.budget == found.cost_before == 2 * 90 + 50
    with pytest.raises(ValueError, match="unit='ns' needs `latencies`"):
        allocate_bits(net, batches, "1x", **arguments)
    few = latencies_of_a_machine(((3, 3), (4, 4)))
    with pytest.raises(ValueError, match=r"latencies\['0'\]\[\(3, 2\)\] is None; expected nanoseconds > 0"):
        allocate_bits(net, batches, "1x", latencies=few, **arguments)


def test_it_is_the_best_of_all_choices():
    """Of 3^6 allocations to three layers, by the entries of the sensitivity; tolerance 1e-8."""
    net, batches = quantized_linear_net(3, 3), labelled_vectors(batches=4)
    measured = measured_once()
    macs = {"0": 48, "2": 64, "4": 24}
    for by in ("noise", "measured", "estimated"):
        found = allocate_bits(net, batches, "1.5x", candidates=(2, 4, 8), found=measured, by=by)
        layers = []
        for name, count in macs.items():
            losses = {}
            for kind in ("weight", "activation"):
                entries = {b: measured.entry(name, kind, b) for b in (2, 4, 8)}
                share = LEFT_BY_TRAINING if kind == "weight" else 1
                kinds = {"noise": lambda e: share * 10 ** (-e.snr / 10), "measured": lambda e: e.loss_rise}  # noqa: B023
                rises = {b: kinds.get(by, lambda e: e.estimate)(e) for b, e in entries.items()}
                losses[kind] = {b: max(rises[other] for other in rises if other >= b) for b in rises}
            layers.append(
                [Option(w, a, count * w * a, losses["weight"][w] + losses["activation"][a])
                 for w, a in itertools.product((2, 4, 8), repeat=2)]
            )  # fmt: skip
        assert found.objective == pytest.approx(best_of_all(layers, found.budget), abs=1e-8)
        for budget, rise in found.curve:
            assert rise == pytest.approx(best_of_all(layers, budget), abs=1e-8)
        assert len(found.curve) > 3 and [r for _, r in found.curve] == sorted(
            [r for _, r in found.curve], reverse=True
        )


def test_bytes_count_packed_weights_and_leave_activations():
    net = quantized_linear_net(4, 4)
    found = allocate_bits(net, labelled_vectors(), "0.75x", unit="bytes", passes=500)
    sizes = {"0": 48, "2": 64, "4": 24}
    assert found.cost_before == sum(size // 2 for size in sizes.values())
    assert found.cost == sum(packed_size(sizes[e.name], e.weight_bits) for e in found.layers) <= found.budget
    assert all(set(fields) == {"weight_bits"} for fields in found.overrides.values())
    model = built(found, config=W3A3.replace(activation_bits=4))
    assert {a for _, a in bits_of(model).values()} == {4}
    # That activations have 4 bits, which no byte depends on, does not keep weights from a budget of 3 bits.
    uniform = allocate_bits(net, labelled_vectors(), "3 bits", unit="bytes", passes=500)
    assert uniform.cost <= uniform.budget == sum(packed_size(size, 3) for size in sizes.values())


def test_constraints_hold():
    net, batches, measured = quantized_linear_net(3, 3), labelled_vectors(), measured_once()
    found = allocate_bits(
        net, batches, 1e6, found=measured, fixed=["0"], minimum_bits={"2": 4}, candidates=(2, 3, 4, 6)
    )
    assert "0" not in found.overrides and found.layers[0].why == "fixed" and found.layers[0].cost == 48 * 9
    assert max(found.overrides["4"].values()) <= 6
    least = sum(option for option in (48 * 9, 64 * 16, 24 * 4))
    found = allocate_bits(net, batches, least, found=measured, fixed=["0"], minimum_bits={"2": 4})
    assert found.overrides == {
        "2": {"weight_bits": 4, "activation_bits": 4},
        "4": {"weight_bits": 2, "activation_bits": 2},
    }
    for budget in ("2 bits", "0.7x", "1x", "2x"):
        together = allocate_bits(net, batches, budget, found=measured, alike=[["0", "2"], ["2", "4"]])
        assert len({fields["activation_bits"] for fields in together.overrides.values()}) == 1
        assert "activations like" in together.layers[0].why


def partners(layer: LayerBits) -> list[str]:
    return layer.why.rpartition("activations like ")[2].split(", ")


def test_first_and_last_layers_keep_their_bits_and_layers_that_share_an_input_its_bits():
    model = quantized_vit(quantize_attention=True)
    batches = labelled_images()
    measured = sensitivity(model, batches, candidates=(2, 4), trace_samples=2)
    before = bits_of(model)
    with nothing_changes(model):
        found = allocate_bits(model, batches, "4 bits", candidates=(2, 4), found=measured)
    fixed = [layer.name for layer in found.layers if layer.why == "fixed"]
    assert fixed == model.quantization_report.first_last_modules and len(fixed) == 2
    queries = [name for name in before if "q_proj" in name or name.endswith("query")]
    assert len(queries) == 2
    for name in queries:
        layer = next(e for e in found.layers if e.name == name)
        assert len(partners(layer)) == 2  # key and value
        for other in partners(layer):
            assert found.overrides[other]["activation_bits"] == layer.activation_bits
    config = SAQQuantizationConfig(quantize_attention=True)
    x = batches[0]["pixel_values"]
    new = built(found, vit, x, config)
    counted = cost(new, x[:1])
    assert sum(layer.bops for layer in counted.layers) == found.cost <= found.budget == found.cost_before
    now = bits_of(new)
    assert {name: now[name] for name in fixed} == {name: before[name] for name in fixed}


def test_overrides_are_added_to_those_of_a_configuration():
    found = allocate_bits(quantized_linear_net(3, 3), labelled_vectors(), "1x", found=measured_once())
    config = W3A3.replace(overrides={"0": {"quantizer": "pact", "weight_bits": 8}, "*": {"weight_bits": 7}})
    applied = found.applied_to(config)
    assert applied.overrides["0"] == {"quantizer": "pact", **found.overrides["0"]}
    model = quantize(linear_net(), applied)
    assert [w for w, _ in bits_of(model).values()] == [layer.weight_bits for layer in found.layers]
    assert config.overrides["0"]["weight_bits"] == 8  # as given


def test_the_result_prints_draws_and_becomes_json(tmp_path):
    found = allocate_bits(quantized_linear_net(3, 3), labelled_vectors(), "1x")
    assert f"{found.cost:,} of 1,224 bops (1,224 before)" in str(found)
    assert "less would add" in str(found)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain and plain["overrides"] == found.overrides
    found.plot(tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("by", "head", "name"),
    [
        ("noise", "noise to signal", "noise to signal of the logits, a tenth of it for weights"),
        ("measured", "measured rise", "sum of measured rises of the loss"),
        ("estimated", "estimated rise", "sum of estimated rises of the loss"),
    ],
)
def test_what_was_kept_small_is_named_for_what_it_is(by, head, name, tmp_path, monkeypatch):
    """The noise was called a predicted loss. Its value is the sum over the entries, by hand."""
    import matplotlib.axes

    measured = measured_once()
    found = allocate_bits(quantized_linear_net(3, 3), labelled_vectors(), "1x", found=measured, by=by)

    def alone(layer: LayerBits, kind: str, bits: int) -> float:
        entries = [measured.entry(layer.name, kind, more) for more in (2, 3, 4, 6, 8) if more >= bits]
        share = 0.1 if kind == "weight" else 1.0
        return max(
            {"noise": share * 10 ** (-e.snr / 10), "measured": e.loss_rise, "estimated": e.estimate}[by]
            for e in entries
        )

    for layer in found.layers:
        expected = alone(layer, "weight", layer.weight_bits) + alone(layer, "activation", layer.activation_bits)
        assert layer.objective == pytest.approx(expected)
    assert found.objective == pytest.approx(sum(layer.objective for layer in found.layers))
    assert head in str(found).splitlines()[0] and str(found).endswith(f"{name}: {found.objective:.4g}")
    plain = found.to_dict()
    assert plain["by"] == by and plain["objective"] == found.objective and "loss" not in "".join(plain)
    labels = []
    monkeypatch.setattr(matplotlib.axes.Axes, "set_ylabel", lambda axes, text: labels.append(text))
    found.plot(tmp_path / "bits.png")
    assert labels == [name]


def test_a_sensitivity_that_was_given_needs_no_bits_that_no_layer_may_get():
    net, batches = quantized_linear_net(3, 3), labelled_vectors(batches=4)
    measured = sensitivity(net, batches, candidates=(4, 8), passes=500)
    arguments = {"found": measured, "candidates": (2, 4, 8)}
    found = allocate_bits(net, batches, "8 bits", minimum_bits=4, **arguments)
    assert {layer.weight_bits for layer in found.layers} <= {4, 8}
    with pytest.raises(ValueError, match="no entry for 2 bits of the weight of 4"):
        allocate_bits(net, batches, "8 bits", minimum_bits={"0": 4, "2": 4, "4": 2}, **arguments)


def test_what_is_wrong_is_said(monkeypatch):
    net, batches, measured = quantized_linear_net(3, 3), labelled_vectors(), measured_once()
    with pytest.raises(ValueError, match=r"no choice keeps to budget=100 \(100 bops\); expected at least 544"):
        allocate_bits(net, batches, 100, found=measured)
    for wrong in ("80%", 0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"expected a number > 0, such as 1e9, or '0.8x', or '3 bits'"):
            allocate_bits(net, batches, wrong, found=measured)
    with pytest.raises(ValueError, match=r"budget='5 bits', but not every layer can have 5 bits"):
        allocate_bits(net, batches, "5 bits", found=measured)
    with pytest.raises(ValueError, match=r"allocate_bits: fixed: 'head' matches no module"):
        allocate_bits(net, batches, 1e6, found=measured, fixed=["head"])
    vit_net, pairs = quantized_vit(), labelled_images()
    with pytest.raises(ValueError, match=r"fixed: '\*.mlp' matches vit.layers.0.mlp, and none of the layers inside"):
        allocate_bits(vit_net, pairs, "0.8x", fixed=["*.mlp"])
    with pytest.raises(ValueError, match=r"minimum_bits: '\*.attention' matches .* Expected '\*.attention.\*'"):
        allocate_bits(vit_net, pairs, "0.8x", minimum_bits={"*.attention": 4})
    for group in (["0", "two"], ["0", ""]):
        with pytest.raises(ValueError, match=rf"alike names '{group[1]}', which is no layer of Sequential"):
            allocate_bits(net, batches, 1e6, found=measured, alike=[group])
    with pytest.raises(ValueError, match=r"alike names '0', which is no layer .*; expected some of \[\]"):
        allocate_bits(quantized_linear_net(3, None), batches, 1e6, found=measured, alike=[["0", "2"]])
    with pytest.raises(ValueError, match=r"0 needs 8 bits at least, but candidates=\[2, 4\]"):
        allocate_bits(net, batches, 1e6, found=measured, candidates=(2, 4), minimum_bits=8)
    for budget in (1e6, 100):  # before it is asked whether the budget is enough
        with pytest.raises(ValueError, match=r"`found` has no entry for 5 bits of the weight of 0; expected one for"):
            allocate_bits(net, batches, budget, found=measured, candidates=(5,))
    with pytest.raises(ValueError, match=r"cannot cut one example out of a tuple"):
        allocate_bits(net, [("x", torch.zeros(1))], 1e6, found=measured, alike=[])
    monkeypatch.setattr("hf_saq.analysis.bits.integer_program.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"scipy is not installed; .*pip install '\.\[analysis\]'"):
        allocate_bits(net, batches, 1e6, found=measured)

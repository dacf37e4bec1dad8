"""`measure_latencies`: every layer with every pair of bits, equal times where exports are equal, and no traces."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import pytest
import torch
from labelled_models import nothing_changes, quantized_linear_net
from tiny_models import seeded, vectors
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.analysis import LatencyTable, allocate_bits, measure_latencies
from hf_saq.analysis.bits import change_bits
from hf_saq.analysis.bits.export_forms import forms_of, pairs_of
from hf_saq.analysis.bits.measured_latency import _operands
from hf_saq.analysis.bits.noise import medians_apart
from hf_saq.export import export_onnx
from hf_saq.export.checks.spans import find_span, nodes_between
from hf_saq.timing.nodes import turns

LARGE, SMALL = "2", ("0", "5")
"""The large one has 512 times the multiply-accumulates of the other convolution, and more of the last layer."""
CANDIDATES = (4, 8)
PAIRS = set(itertools.product(CANDIDATES, repeat=2))


def cnn() -> nn.Module:
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 512, 3, padding=1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, 3),
        )


def pictures(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 1, 24, 24, generator=torch.Generator().manual_seed(3))


def quantized_cnn(bits: int = 4) -> nn.Module:
    config = SAQQuantizationConfig(weight_bits=bits, activation_bits=bits, first_last_bits=None)
    return calibrate(quantize(cnn(), config), [pictures()])


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[nn.Module, LatencyTable]:
    """One table, measured where nothing may change and nothing may be left."""
    pytest.importorskip("onnxruntime")
    model, directory = quantized_cnn(), tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(directory))
        patch.setattr(turns, "SECONDS", 0.01)
        patch.chdir(directory)
        with nothing_changes(model):
            table = measure_latencies(model, pictures(), candidates=CANDIDATES, rounds=10, progress=False)
    assert list(directory.iterdir()) == []
    return model, table


def test_it_has_every_layer_with_every_pair_of_bits(measured):
    _, table = measured
    assert set(table) == {LARGE, *SMALL} and len(table) == 3
    assert all(set(table[name]) == PAIRS and min(table[name].values()) > 0 for name in table)
    with pytest.raises(KeyError):
        table["1"]


def test_a_layer_with_a_hundred_times_the_work_takes_the_largest_time(measured):
    _, table = measured
    for pair in PAIRS:
        assert table[LARGE][pair] > max(table[name][pair] for name in SMALL)
    large, small = (sum(table[name][4, 4] for name in names) for names in ([LARGE], SMALL))
    assert 0.5 < table.attributed < 1 and table.other_ns < large + small


def test_only_what_an_export_holds_otherwise_has_another_time(measured):
    """Products of weights and inputs of 8 bits are split; inputs of 8 bits are not clipped; nothing else differs."""
    _, table = measured
    assert table.exports == 3
    for name in table:
        assert table[name][4, 4] == table[name][8, 4]
        assert len(set(table[name].values())) <= 3
    assert table[LARGE][8, 8] >= table[LARGE][4, 4]  # twice the products; equal if a busy machine hides that
    forms = {(e.weight_bits, e.activation_bits): e.form for e in table.entries if e.name == LARGE}
    assert "two halves" in forms[8, 8] and not any("two halves" in forms[pair] for pair in PAIRS - {(8, 8)})
    assert "clipped" in forms[8, 4] == forms[4, 4] and "whole" in forms[4, 8]


def test_a_budget_of_measured_time_is_kept(measured):
    pytest.importorskip("scipy")
    model, table = measured
    batches = [(pictures(8), torch.arange(8) % 3)]
    fixed = {"candidates": CANDIDATES, "unit": "ns", "latencies": table, "passes": 20, "progress": False}
    found = allocate_bits(model, batches, "1x", **fixed)
    assert found.cost_before == sum(round(table[name][4, 4]) for name in table) >= found.cost
    assert all(layer.weight_bits == 8 for layer in found.layers if layer.activation_bits == 4)  # they cost nothing
    least = sum(round(min(table[name].values())) for name in table)
    assert allocate_bits(model, batches, least, **fixed).cost == least
    with pytest.raises(ValueError, match=r"latencies\['0'\]\[\(4, 6\)\] is None.*Measure with the same candidates"):
        allocate_bits(model, batches, "1x", **{**fixed, "candidates": (4, 6)})


def test_it_prints_and_goes_through_json(measured):
    _, table = measured
    back = LatencyTable.from_dict(json.loads(json.dumps(table.to_dict(), allow_nan=False)))
    assert back == table and back[LARGE] == table[LARGE]
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "W", "A", "form", "us"] and len(lines) == 1 + 3 * 3 + 2
    assert "onnxruntime, weights int8, for cpu, batch 1, threads 1" in lines[-1]


def test_times_that_noise_could_have_made_are_one():
    steady, noisy = [10.0, 11, 10, 11, 10, 11, 10, 11, 10, 11], [11.0, 10, 11, 10, 11, 10, 11, 10, 11, 12]
    slower = [time + 2 for time in noisy[:9]] + [9.0]  # in nine of ten rounds
    found = medians_apart({"slower": slower, "steady": steady, "noisy": noisy})
    assert found["steady"] == found["noisy"] == 11 and found["slower"] == median(slower)
    assert medians_apart({"a": [1.0, 2.0]}) == {"a": 1.5}


def wide_net(count: int, quantizer: str) -> nn.Module:
    """Layers side by side in one sequence, one for each pair of bits."""
    with seeded(0):
        net = nn.Sequential(*(layer for _ in range(count) for layer in (nn.Linear(6, 6), nn.GELU())))
    config = SAQQuantizationConfig(weight_bits=4, activation_bits=4, first_last_bits=None, quantizer=quantizer)
    return calibrate(quantize(net, config), [vectors(16, seed=1)])


@pytest.mark.parametrize(
    ("quantizer", "weights"), [("lsq", "int8"), pytest.param("dorefa", "int4", marks=pytest.mark.slow)]
)
def test_forms_are_what_exports_hold(quantizer, weights, tmp_path):
    """Layers have the same form exactly if their nodes and stored types in a real export are the same."""
    onnx, ir = pytest.importorskip("onnx"), pytest.importorskip("onnx_ir")
    pairs = list(itertools.product((4, 8), (7, 8)))
    net = wide_net(len(pairs), quantizer)
    names = list(_operands(net))
    assert set(pairs_of(_operands(net)["0"], (2, 8))) == set(itertools.product((4, 2, 8), repeat=2))
    forms = {
        name: forms_of(net.get_submodule(name), name, [pair], weights, "cpu")[pair]
        for name, pair in zip(names, pairs, strict=True)
    }
    fields = [{"weight_bits": weight, "activation_bits": activation} for weight, activation in pairs]
    change_bits(net, dict(zip(names, fields, strict=True)))
    calibrate(net, [vectors(16, seed=1)])
    export_onnx(net, tmp_path, weights=weights, example=vectors(2), check=False)
    graph = ir.from_proto(onnx.load(tmp_path / "onnx/model_quantized.onnx"))
    held = {}
    for name in names:
        span = find_span(graph, name, net.get_submodule(name).activation_quantizer.has_offset)
        nodes = nodes_between(span.input, span.output)
        constants = [v for node in nodes for v in node.inputs if v is not None and v.const_value is not None]
        kinds = sorted(str((v.const_value.dtype, v.const_value.shape)) for v in constants)
        held[name] = (sorted(node.op_type for node in nodes), kinds)
    for a, b in itertools.combinations(names, 2):
        assert (forms[a] == forms[b]) == (held[a] == held[b]), (forms[a], forms[b], held[a], held[b])
    assert len(set(forms.values())) > 2


REFUSED = [
    ({"engine": "tflite"}, r"engine='tflite'; expected one of"),
    ({"target": "gpu"}, r"target='gpu'; expected one of \['cpu', 'cpu-vnni'\]"),
    ({"weights": "int2"}, r"weights='int2'; expected one of"),
    ({"candidates": ()}, r"`candidates` is empty"),
    ({"candidates": (4, 9)}, r"measure_latencies: candidates=9; expected"),
    ({"candidates": (1,)}, r"measure_latencies: candidates=1; expected"),
    ({"rounds": 0}, r"rounds=0; expected a positive integer"),
    ({"batch_size": 1.5}, r"batch_size=1.5; expected a positive integer"),
    ({"threads": 10**6}, r"threads=1000000; this process may use"),
    ({"inputs": {"labels": torch.ones(2)}}, r"`inputs` holds NoneType; expected a float tensor"),
    ({"inputs": torch.ones(2, 4, dtype=torch.int64)}, r"`inputs` holds torch.int64 \(2, 4\)"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused(changes, message):
    pytest.importorskip("onnxruntime")
    arguments = {"inputs": vectors(4), **changes}
    with pytest.raises(ValueError, match=message):
        measure_latencies(quantized_linear_net(), arguments.pop("inputs"), **arguments)


def test_models_without_grids_are_refused():
    pytest.importorskip("onnxruntime")
    waiting = quantize(cnn(), SAQQuantizationConfig(weight_bits=4, activation_bits=4))
    with pytest.raises(RuntimeError, match="^measure_latencies: .* is not calibrated"):
        measure_latencies(waiting, pictures())
    for model in (cnn(), pack(quantized_cnn())):
        with pytest.raises(ValueError, match="has no quantizer of weights.*not packed"):
            measure_latencies(model, pictures())


def test_a_missing_library_says_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"onnxruntime is needed .*\[onnx\]"):
        measure_latencies(quantized_linear_net(), vectors(4))


def test_nothing_is_left_if_an_export_fails(monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fails(*_, **__):
        assert len(list(Path(tmp_path).iterdir())) == 1
        raise RuntimeError("no graph")

    monkeypatch.setattr("hf_saq.analysis.bits.measured_latency.export_onnx", fails)
    with nothing_changes(model := quantized_cnn()), pytest.raises(RuntimeError, match="no graph"):
        measure_latencies(model, pictures(), progress=False)
    assert list(tmp_path.iterdir()) == []

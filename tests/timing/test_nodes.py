"""Times of nodes by the profilers of engines, and the layers that they are attributed to."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from labelled_models import quantized_vit
from tiny_models import images

from hf_saq.export import export_onnx
from hf_saq.layers import QuantAttentionProducts, QuantizedLayer
from hf_saq.timing.nodes import RunningNode, layer_times, owners_of_nodes, time_nodes, turns

pytest.importorskip("onnxruntime")
ATTENTION = "vit.layers.0.attention"


@cache
def vit():
    return quantized_vit(quantize_attention=True, first_last_bits=None)


def layers_and_scales():
    modules = dict(vit().named_modules())
    layers = {name: False for name, module in modules.items() if isinstance(module, QuantizedLayer)}
    kinds = ("query", "key", "probability", "value")
    products = [name for name, module in modules.items() if isinstance(module, QuantAttentionProducts)]
    return layers, {name: [f"{name}.{kind}_quantizer.scale" for kind in kinds] for name in products}


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> bytes:
    directory = tmp_path_factory.mktemp("export") / "vit"
    export_onnx(vit(), directory, example=images(2), check=False)
    return (directory / "onnx/model_quantized.onnx").read_bytes()


def test_every_nanosecond_of_the_profile_goes_to_a_layer_or_to_the_rest(graph, tmp_path, monkeypatch):
    """Against the events of the file: those whose start is inside a call. Tolerance: rounding.

    A turn is two calls here, of which the second counts, and the first turn does not.
    """
    monkeypatch.setattr(turns, "SECONDS", 0.0)
    found = time_nodes({"a": graph, "b": graph}, images(1).numpy(), tmp_path, rounds=3)["a"]
    (file,) = tmp_path.glob("a_*.json")
    events = json.loads(file.read_text())
    calls = [event for event in events if event["name"] == "model_run"]
    nodes = [event for event in events if event["cat"] == "Node"]
    assert len(calls) == 8 and len(found.turns) == 3
    layers, scales = layers_and_scales()
    owners = owners_of_nodes(graph, found.nodes, layers, scales)
    for call, turn in zip(calls[3::2], found.turns, strict=True):
        inside = [n["dur"] for n in nodes if call["ts"] <= n["ts"] < call["ts"] + call["dur"]]
        by_layer, other = layer_times(turn, owners)
        assert set(by_layer) == {*layers, *scales} and len(inside) == len(found.nodes)
        assert sum(by_layer.values()) + other == pytest.approx(1000 * sum(inside), rel=1e-9)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_nodes_belong_to_the_layers_whose_work_they_do(graph, tmp_path, monkeypatch, engine):
    pytest.importorskip(engine)
    monkeypatch.setattr(turns, "SECONDS", 0.0)
    found = time_nodes({"vit": graph}, images(1).numpy(), tmp_path, engine=engine, rounds=1)["vit"]
    layers, scales = layers_and_scales()
    owners = owners_of_nodes(graph, found.nodes, layers, scales)
    assert {layer for of_node in owners.values() for layer in of_node} == {*layers, *scales}
    kinds = {node.op_type for node in found.nodes if node.name not in owners}
    multiply = {
        "MatMulIntegerToFloat",
        "QLinearMatMul",
        "MatMul",
        "FullyConnected",
        "Convolution",
        "Conv",
        "FusedConv",
    }
    assert not kinds & multiply  # every product in this model is quantized
    assert kinds & {"LayerNormalization", "MVN"}
    if engine == "onnxruntime":
        stored = {
            node.name: name.removesuffix(".codes")
            for node in found.nodes
            for name in node.inputs
            if name.endswith(".codes")
        }
        assert set(stored.values()) >= set(layers) - {"vit.embeddings.patch_embeddings.projection"}
        assert all(owners[node] == (layer,) for node, layer in stored.items())
        shared = {f"{ATTENTION}.{kind}_proj" for kind in "qkv"}
        assert [set(of_node) for of_node in owners.values()].count(shared) == 2  # QuantizeLinear and Clip
    assert list(tmp_path.glob("*")) == [] or engine == "onnxruntime"


def test_a_shared_node_counts_in_equal_parts():
    times, other = layer_times({"x": 3.0, "y": 4.0, "z": 5.0}, {"x": ("a", "b"), "y": ("b",)})
    assert times == {"a": 1.5, "b": 5.5} and other == 5.0


def test_a_profile_that_lacks_calls_is_refused(monkeypatch, tmp_path):
    class Forgetful:
        nodes = (RunningNode("a", "Add", (), ()),)

        def __init__(self, *_):
            pass

        def run(self, _):
            pass

        def finish(self):
            return [{"a": 1.0}]

    monkeypatch.setitem(turns.PROFILERS, "forgetful", Forgetful)
    monkeypatch.setattr(turns, "SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="holds 1 calls of 6; measure fewer rounds"):
        time_nodes({"a": b""}, torch.ones(1).numpy(), tmp_path, engine="forgetful", rounds=2)

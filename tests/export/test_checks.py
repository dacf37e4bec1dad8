"""The checks of an export: what they find in damaged graphs and unfaithful engines, and what they count."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
import torch
from quantized_models import quantized
from tiny_models import conv_net, images, linear_net, vectors
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize
from hf_saq.export import ExportCheckError, export_onnx
from hf_saq.export.checks import sessions, verification, whole_model
from hf_saq.export.checks.sessions import integer_layers
from hf_saq.export.checks.whole_model import Agreement, own_logits
from hf_saq.export.extras import needed
from hf_saq.export.integer_copy import integer_copy
from hf_saq.export.passes import run_in_integers
from hf_saq.export.tracing import trace

FILE = "onnx/model_quantized.onnx"
X = images(4, 8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with folded normalizations, its integer copy and its graph."""
    directory = tmp_path_factory.mktemp("checked")
    model = quantized(conv_net, X, weight_granularity="channel")
    model[1].weight.data[::2] *= -1  # a normalization that turns the sign of a channel
    report = export_onnx(model, directory, example=X)
    return model, integer_copy(model, "int8"), (directory / FILE).read_bytes(), report


def damaged(content: bytes, change) -> bytes:
    """Change the constants of a graph: `change` gets name -> array and returns those that become others."""
    graph_model = onnx.load_from_string(content)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph_model.graph.initializer}
    changed = change(arrays)
    assert changed
    for tensor in graph_model.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(onnx.numpy_helper.from_array(changed[tensor.name], tensor.name))
    return graph_model.SerializeToString()


def assert_refused(exported, change, message: str) -> None:
    model, copied, content, _ = exported
    with pytest.raises(ExportCheckError, match=message):
        verification.verify(
            model, copied, damaged(content, change), {"0": "1", "3": "4"}, X, ["onnxruntime", "openvino"]
        )


def test_a_good_export_says_what_was_found(exported):
    model, copied, content, report = exported
    found = verification.verify(model, copied, content, {"0": "1", "3": "4"}, X, ["onnxruntime", "openvino"]).found
    assert found == report.checks
    assert found["codes and scales"] == "equal in 3 layers"
    assert found["integers"] == "3 of 3 layers run in integers in ONNX Runtime"
    for engine in ("ONNX Runtime, optimizations off", "ONNX Runtime", "OpenVINO"):
        assert found[engine].startswith("3 layers alone within one step; logits differ by")
        assert found[engine].endswith("4 of 4 top-1 equal")
    assert "integers: 3 of 3 layers" in str(report)


def test_a_code_that_differs(exported):
    def change(arrays):
        codes = arrays["3.codes"].copy()
        codes.flat[0] += 1
        return {"3.codes": codes}

    assert_refused(exported, change, r"codes and scales are not those of the model. 3: 1 of \d+ codes differ")


def test_a_scale_that_differs(exported):
    def change(arrays):
        scale = arrays["7.scale"].copy()
        scale[1] = np.nextafter(scale[1], 1)
        return {"7.scale": scale}

    assert_refused(exported, change, "7: a scale is off by a factor of")


def test_a_folded_scale_that_differs(exported):
    assert_refused(exported, lambda arrays: {"0.scale": arrays["0.scale"] * np.float32(1.0001)}, "0: a scale is off")


def test_the_grid_of_an_input_that_differs(exported):
    def scale(arrays):
        return {"3.activation.scale": np.nextafter(arrays["3.activation.scale"], np.float32(1))}

    assert_refused(exported, scale, "3: the scale of the input is")


def test_a_bias_that_differs(exported):
    """No stored code or scale is wrong, but the layer is."""

    def change(arrays):
        name = next(name for name in arrays if name.startswith("3") and name.endswith("bias"))
        return {name: arrays[name] + np.float32(2)}

    assert_refused(exported, change, "layers do not compute what the model's do. 3: its output differs by up to")


@pytest.mark.parametrize("engine", ["ONNX Runtime", "OpenVINO"])
def test_an_engine_that_fuses_unfaithfully(exported, engine: str, monkeypatch):
    """What saturating products would do: outputs that are wrong with optimizations on alone."""
    model, copied, content, _ = exported

    def saturating(run, content, inputs):
        return {name: y * 0.5 for name, y in run(content, inputs).items()}

    for one in (engine, sessions.EXACT):
        monkeypatch.setitem(sessions.RUNS, one, partial(saturating, sessions.RUNS[one]))
    with pytest.raises(ExportCheckError, match=f"{engine} computes something else .* integer products saturate"):
        verification.verify(model, copied, content, {"0": "1", "3": "4"}, X, ["onnxruntime", "openvino"])
    verification.verify(model, copied, content, {"0": "1", "3": "4"}, X, [])


@pytest.mark.parametrize("steps", [1, 9])
def test_an_input_between_two_codes_may_be_rounded_to_either(steps: int, monkeypatch):
    """One value of a layer's input in the next code, which moves outputs by some of theirs; not in a far one."""
    x = torch.randn(4, 20, 6)
    model = quantized(lambda: nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)), x)
    copied = integer_copy(model, "int8")
    graph_model = trace(copied, x)
    run_in_integers(graph_model)
    content = needed("onnx_ir").to_proto(graph_model).SerializeToString()
    run, scale = sessions.RUNS["OpenVINO"], float(model[1].activation_quantizer.grid()[0])
    moved = []

    def with_a_tie(content, inputs):
        inputs = {name: value.copy() for name, value in inputs.items()}
        for value in (value for name, value in inputs.items() if name.startswith("1/")):
            moved.append(value[1, 2, 3])
            value[1, 2, 3] -= np.sign(value[1, 2, 3]) * steps * scale
        return run(content, inputs)

    monkeypatch.setitem(sessions.RUNS, "OpenVINO", with_a_tie)
    if steps == 1:
        verification.verify(model, copied, content, {}, x, ["openvino"])
    else:
        with pytest.raises(ExportCheckError, match="OpenVINO computes something else .* 1: its output differs by"):
            verification.verify(model, copied, content, {}, x, ["openvino"])
    assert len(moved) == 1


class Brittle(nn.Module):
    """Takes a branch by the values of its input, which tracing cannot follow: it keeps the one that it saw."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.layer(x)
        return y if torch.compiler.is_exporting() else 2 * y


def test_what_tracing_gets_wrong_is_not_written(tmp_path):
    model = calibrate(quantize(Brittle(), SAQQuantizationConfig(first_last_bits=None)), [vectors()]).eval()
    with pytest.raises(ExportCheckError, match="although its layers are right: something between them"):
        export_onnx(model, tmp_path / "out", example=vectors())
    assert not (tmp_path / "out").exists()
    export_onnx(model, tmp_path / "out", example=vectors(), check=False)
    assert (tmp_path / "out" / FILE).exists()


def test_layers_that_do_not_run_in_integers_are_not_counted(tmp_path):
    model = quantized(linear_net, vectors(), overrides={"2": {"activation_bits": None}})
    report = export_onnx(model, tmp_path, example=vectors())
    assert report.checks["integers"] == "2 of 3 layers run in integers in ONNX Runtime"
    assert integer_layers((tmp_path / FILE).read_bytes()) == 2


def test_logits_of_another_model_are_refused_however_noisy_it_is():
    assert Agreement(difference=0.3, own_noise=0.1, same_top1=0, count=1).holds
    assert not Agreement(difference=0.6, own_noise=0.4, same_top1=1, count=1).holds
    assert not Agreement(difference=3e-3, own_noise=1e-7, same_top1=1, count=1).holds
    assert not Agreement(difference=np.nan, own_noise=0.1, same_top1=1, count=1).holds


def test_a_model_is_as_far_from_itself_as_its_roundings_flip():
    """With 2 bits a flip is a large step; with a float model there is none."""
    coarse = quantized(conv_net, X, weight_bits=2, activation_bits=2, first_last_bits=None)
    fine = quantized(conv_net, X, activation_bits=None, first_last_bits=None)
    assert own_logits(coarse, X)[1] > 1e-3 > 1e-6 > own_logits(fine, X)[1]


def test_predictions_of_maps_are_counted_pixel_by_pixel(monkeypatch):
    """An export of a segmentation model said, and its card with it, that 512 of 2 were equal."""
    logits = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    other = logits.copy()
    other[0, :, 1, 2] = np.roll(other[0, :, 1, 2], 1)  # another class in one pixel
    monkeypatch.setattr(whole_model, "run_graph", lambda *_: {whole_model.OUTPUT: other})
    found = whole_model.agreement(b"", logits, 0.1, torch.zeros(2, 1), "x", "")
    assert (found.same_top1, found.count) == (39, 40)

"""`export_onnx`: the graph computes what the model does, and the directory is what other tools expect."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from quantized_models import codes, quantized
from test_integer_layers import HAVE_PRODUCTS, MODELS, inputs_of
from tiny_models import VIT_SIZES, images, linear_net, resnet, vectors, vit
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, ViTImageProcessor, YolosConfig, YolosForObjectDetection

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.export import export_onnx
from hf_saq.export.extras import needed
from hf_saq.outputs import logits_of
from hf_saq.quantizers.methods.lsq_plus import LSQPlusQuantizer

FILE = "onnx/model_quantized.onnx"


def run(directory, x: torch.Tensor) -> np.ndarray:
    """Evaluate the graph in numpy, node by node."""
    evaluator = ReferenceEvaluator(str(directory / FILE))
    # The sigmoid of onnx's reference computes the branch that it does not take as well, which overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        return evaluator.run(None, {evaluator.input_names[0]: x.numpy()})[0]


def assert_predicts(directory, model: nn.Module, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        expected = logits_of(model(x)).numpy()
    np.testing.assert_allclose(run(directory, x), expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with all that a transformer can have, and what was written of it."""
    directory = tmp_path_factory.mktemp("exported") / "vit"
    model = quantized(vit, quantize_attention=True, weight_granularity="channel", activation_bits=5)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    report = export_onnx(model, directory, processor=processor)
    return model, directory, report


def test_the_graph_predicts_what_the_model_does(exported):
    model, directory, _ = exported
    onnx.checker.check_model(directory / FILE, full_check=True)
    for count in (1, 5):  # neither is the batch that it was traced with
        assert_predicts(directory, model, images(count, seed=3))


def test_the_layout_is_that_of_the_ecosystem(exported):
    model, directory, report = exported
    files = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert files == {"config.json", "preprocessor_config.json", FILE}
    assert AutoConfig.from_pretrained(directory).id2label == model.config.id2label
    assert AutoImageProcessor.from_pretrained(directory).size["height"] == 16
    record = json.loads((directory / "config.json").read_text())["hf_saq_export"]
    assert record["file"] == FILE and record["weights"] == report.weights == "int8"
    graph = onnx.load(directory / FILE).graph
    assert [value.name for value in graph.input] == ["pixel_values"]
    assert [value.name for value in graph.output] == ["logits"]
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, 16, 16]


def test_weights_are_integers_and_nothing_else_is_stored(exported):
    model, directory, report = exported
    graph = onnx.load(directory / FILE).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    expected = codes(model)
    assert len(expected) == len(report.layers) == 14
    for name, own in expected.items():
        found = stored[f"{name}.codes"]
        assert found.dtype == np.int8
        own = own.flatten(1)  # patches are cut out before the product
        found = found.reshape(len(own), -1) if found.ndim == 4 else found.T
        if found.shape[1] == 2 * own.shape[1]:  # two halves, against saturation
            found = found[:, : own.shape[1]] + found[:, own.shape[1] :]
        assert np.array_equal(found, own.numpy())
        scale = model.get_submodule(name).weight_quantizer.scale.detach().reshape(-1)
        assert np.array_equal(stored[f"{name}.scale"].reshape(-1), scale.numpy())
    floats = sum(array.size for array in stored.values() if array.dtype == np.float32)
    weights = sum(own.numel() for own in expected.values())
    assert floats < sum(p.numel() for p in model.parameters()) - weights + 10  # a constant here and there
    assert not graph.value_info and not any(node.metadata_props for node in graph.node)


def test_four_bits_take_four(tmp_path):
    model = quantized(linear_net, vectors(), quantizer="dorefa")
    sizes = {}
    for weights in ("int8", "int4"):
        report = export_onnx(model, tmp_path / weights, weights=weights, example=vectors(), check=False)
        assert_predicts(tmp_path / weights, model, vectors(2))
        sizes[weights] = sum(len(tensor.raw_data) for tensor in onnx.load(tmp_path / weights / FILE).graph.initializer)
        assert {layer.stored for layer in report.layers[1:-1]} == {weights}
        assert {report.layers[0].stored, report.layers[-1].stored} == {"int8"}
    body = sum(own.numel() for own in list(codes(model).values())[1:-1])
    assert sizes["int8"] - sizes["int4"] == pytest.approx(body / 2 - 4)  # which has an offset


IN_ONE_RUN = {("conv_net", "liq", "int4"), ("conv_net", "lsq_plus", "int8")}
"""Tracing takes seconds; `make test-slow` has the rest."""


@pytest.mark.filterwarnings("ignore:ONNX Runtime rounds biases")  # whether that moves a random model, CPUs decide
@pytest.mark.parametrize(
    ("name", "kind", "weights"),
    [
        pytest.param(*cell, id="-".join(cell), marks=() if cell in IN_ONE_RUN else pytest.mark.slow)
        for cell in product(MODELS, ("lsq", "lsq_plus", "pact", "dorefa", "liq"), ("int8", "int4"))
    ],
)
def test_every_family_with_every_quantizer(name: str, kind: str, weights: str, tmp_path):
    x = inputs_of(name)
    fields = {"quantize_attention": True} if name in HAVE_PRODUCTS else {}
    model = quantized(MODELS[name], x=x, quantizer=kind, **fields)
    export_onnx(pack(model), tmp_path, weights=weights, example=x)
    assert_predicts(tmp_path, model, x)


def test_the_offset_of_the_next_layer_is_no_bias_of_this_one(tmp_path):
    """Nothing is between them: what the second subtracts before it quantizes must not count for the first."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    x = inputs_of("conv_net")
    model = quantized(lambda: net, x=x, quantizer="lsq_plus")
    assert export_onnx(model, tmp_path, example=x).checks  # it verifies each layer alone
    assert_predicts(tmp_path, model, x)


def test_an_affine_grid_that_begins_at_zero(tmp_path):
    """Calibrated behind a ReLU, LSQ+ has an offset of zero, which no node of the graph subtracts."""
    x = images(4, seed=3)
    model = calibrate(quantize(resnet(), SAQQuantizationConfig(quantizer="lsq_plus")), [x]).eval()
    offsets = [m.offset.item() for m in model.modules() if isinstance(m, LSQPlusQuantizer) and m.offset is not None]
    assert 0.0 in offsets and any(offsets)
    assert export_onnx(model, tmp_path, example=x, engines=["onnxruntime"]).checks
    assert_predicts(tmp_path, model, x)


# What is refused ---------------------------------------------------------------------------------------------------


def refused(model, directory, message: str, kind=ValueError, **arguments) -> None:
    with pytest.raises(kind, match=message):
        export_onnx(model, directory, **arguments)
    assert not directory.exists() or not any(directory.iterdir())


def test_models_that_cannot_be_exported(tmp_path):
    target = tmp_path / "out"
    refused(vit(), target, "ViTForImageClassification has no quantized layer; expected a model made by `quantize`")
    waiting = quantize(vit(), SAQQuantizationConfig())
    message = r"^export_onnx: .* not calibrated: 14 quantizers have no range yet, for example .*activation_quantizer"
    refused(waiting, target, message, RuntimeError)
    model = quantized(linear_net, vectors())
    refused(model, target, r"images is in no configuration; pass image_size=\(height, width\)")
    refused(model, target, r"example is int; expected a float tensor", example=3)
    refused(model, target, r"both given", example=vectors(), image_size=3)
    message = r"engine='tvm'; expected one of \['onnxruntime', 'openvino'\]"
    refused(model, target, message, engines=["tvm"], example=vectors())
    refused(quantized(vit), target, r"image_size=-1; expected a positive number", image_size=-1)
    refused(model, target, r"weights='int3'; expected one of \['int8', 'int4'\]", weights="int3", example=vectors())


def test_a_detector_is_refused_rather_than_exported_without_its_boxes(tmp_path):
    """Its box head in float has no codes that are missed; a graph of classes alone was written, called verified."""
    sizes = {**VIT_SIZES, "image_size": [16, 16], "num_hidden_layers": 1, "num_detection_tokens": 4}
    model = quantized(
        lambda: YolosForObjectDetection(YolosConfig(**sizes)).eval(), modules_to_not_convert=["bbox_predictor"]
    )
    message = "YolosForObjectDetection cannot be exported: besides logits it predicts pred_boxes, .* a classifier"
    refused(model, tmp_path / "out", message, engines=["onnxruntime"])


def test_targets(tmp_path):
    """Full 8-bit codes with 8-bit inputs: split for any CPU, told of by name for others."""
    model = linear_net()
    model[2].weight.data[0, :2] = model[2].weight.abs().max()
    model = calibrate(quantize(model, SAQQuantizationConfig(weight_bits=8, activation_bits=8)), [vectors()]).eval()
    report = export_onnx(model, tmp_path / "cpu", example=vectors())
    assert {layer.name: layer.notes for layer in report.layers}["2"] == ("two halves, for CPUs without VNNI",)
    assert report.checks["integers"] == "3 of 3 layers run in integers in ONNX Runtime"
    assert_predicts(tmp_path / "cpu", model, vectors())
    with pytest.warns(UserWarning, match=r"'cpu-vnni': \d layers .* without a word: .*2.*Export with target='cpu'"):
        report = export_onnx(model, tmp_path / "vnni", target="cpu-vnni", example=vectors(), check=False)
    assert not any(layer.notes for layer in report.layers)
    refused(model, tmp_path / "out", "target='tpu'; expected one of 'cpu' .any CPU", target="tpu", example=vectors())


def test_a_grid_that_does_not_fit(tmp_path):
    model = quantized(linear_net, vectors(), weight_granularity="channel")
    quantizer = model[2].weight_quantizer
    quantizer.scale = nn.Parameter(torch.ones(8, 8))
    message = r"^2: weight scales of shape \(8, 8\) .* Choose weight_granularity='tensor' or 'channel'"
    refused(model, tmp_path / "out", message, example=vectors())


def test_files_that_are_there_stay(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    model = quantized(linear_net, vectors())
    with pytest.raises(ValueError, match="holds files already; name another directory or pass overwrite=True"):
        export_onnx(model, tmp_path, example=vectors())
    assert (tmp_path / "config.json").read_text() == "{}"
    export_onnx(model, tmp_path, example=vectors(), overwrite=True)
    assert_predicts(tmp_path, model, vectors())


def test_a_library_that_is_missing(monkeypatch):
    monkeypatch.setattr("hf_saq.export.extras.EXTRA_OF", {"no_such_library": "onnx"})
    with pytest.raises(ImportError, match=r"no_such_library is needed .* pip install '\.\[onnx\]'"):
        needed("no_such_library")


def test_a_residual_model_runs_in_integers_where_it_is_tuned_for_the_engine(tmp_path):
    """All but the first layer, whose windows have three channels."""
    model = quantized(resnet, weight_granularity="channel", activation_bits=8)
    plain, tuned = (
        export_onnx(model, tmp_path / str(engine), tuned_for=engine, example=images()).checks["integers"].split()
        for engine in (None, "onnxruntime")
    )
    assert int(plain[0]) < int(tuned[0]) >= int(tuned[2]) - 1
    with pytest.raises(ValueError, match="tuned_for='tensorrt'; expected one of"):
        export_onnx(model, tmp_path / "x", tuned_for="tensorrt")

"""What goes wrong before, while and after an export is written: one sentence that says what to do, nothing written."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch
from quantized_models import quantized
from safetensors.torch import save_file
from test_checks import FILE, X
from tiny_models import conv_net, images, linear_net, resnet, vectors, vit
from torch import nn
from transformers import ViTImageProcessor

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize, unpack
from hf_saq.cli import main
from hf_saq.export import ExportCheckError, ExportedClassifier, export_onnx
from hf_saq.export.checks import sessions
from hf_saq.export.checks.sessions import onnxruntime_session
from hf_saq.export.layout import check_free, write_export
from hf_saq.export.report import ExportReport
from hf_saq.storage import load_saved


class Changed(nn.Module):
    """Two linear layers, and a change of what they compute."""

    def __init__(self, change):
        super().__init__()
        self.first, self.last, self.change = nn.Linear(6, 8), nn.Linear(8, 3), change

    def forward(self, x):
        return self.change(x, self.last(torch.relu(self.first(x))))


def changed(change) -> nn.Module:
    torch.manual_seed(0)
    return calibrate(quantize(Changed(change), SAQQuantizationConfig()), [vectors()]).eval()


def test_a_model_that_computes_with_the_size_of_its_batch(tmp_path):
    """As a number of its own, or by a branch that two inputs do not take; checked or not, with two inputs alone."""
    fixed = changed(lambda x, y: y.reshape(int(x.shape[0]), 3))
    with pytest.raises(ValueError, match="traced for batches of 2 only: its forward makes a number"):
        export_onnx(fixed, tmp_path / "a", example=vectors(2), check=False)
    branching = changed(lambda x, y: y * 2 if x.shape[0] > 3 else y)
    with pytest.raises(ExportCheckError, match="another number of inputs .* a batch of 5: logits differ by 5.0e-01"):
        export_onnx(branching, tmp_path / "a", example=vectors(2), engines=["onnxruntime"])
    assert not (tmp_path / "a").exists()
    report = export_onnx(changed(lambda x, y: y.reshape(x.shape[0], 3)), tmp_path / "a", example=vectors(5))
    assert report.checks["other batch"].startswith("3 inputs; ")


def test_a_weight_that_is_nan(tmp_path):
    """No integer stands for it: where nothing was checked, the graph gave numbers."""
    model = changed(lambda x, y: y)
    with torch.no_grad():
        model.first.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="^first: its weight has NaN"):
        export_onnx(model, tmp_path / "a", example=vectors(2), check=False)
    assert not (tmp_path / "a").exists()


def test_what_is_traced_otherwise_between_layers(tmp_path):
    """A third more than the model answers, of a model whose own noise is half as much."""
    model = changed(lambda x, y: y * 1.35 if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() else y)
    with pytest.raises(ExportCheckError, match="not predict what the model predicts .* logits differ by 3.5e-01"):
        export_onnx(model, tmp_path / "a", example=vectors())


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (
            lambda: quantized(vit),
            {"image_size": 32},
            r"does not run on inputs of shape \(2, 3, 32, 32\): .*image_size",
        ),
        (lambda: changed(lambda x, y: {"out": y}), {"example": vectors()}, "returns a dict without `logits`"),
        (
            lambda: changed(lambda x, y: y * 2 if y.sum() > 0 else y),
            {"example": vectors()},
            "Changed cannot be traced: ",
        ),
        (lambda: quantized(vit), {"engines": "onnxruntime"}, r"engines='onnxruntime'; expected a list of engines"),
        (
            lambda: quantized(vit),
            {"engines": []},
            r"engines=\[\]; expected a list .* or check=False to verify nothing",
        ),
    ],
    ids=["image size", "no logits", "values", "engines as text", "no engines"],
)
def test_bad_input(build, arguments, message: str, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        export_onnx(build(), tmp_path / "a", **arguments)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_an_engine_that_cannot_run_the_graph(tmp_path, monkeypatch):
    def fails(content, inputs):
        raise RuntimeError("no such operator\n  at line 7")

    monkeypatch.setitem(sessions.RUNS, "OpenVINO", fails)
    model = quantized(linear_net, vectors())
    with pytest.raises(
        ExportCheckError,
        match=r"OpenVINO cannot run the graph: no such operator at line 7\. To export .* engines=\['onnxruntime'\]",
    ):
        export_onnx(model, tmp_path / "a", example=vectors(), engines=["onnxruntime", "openvino"])
    export_onnx(model, tmp_path / "a", example=vectors(), engines=["onnxruntime"])


def test_weights_alone_stay_so(tmp_path):
    """Inputs in float are quantized by nobody: ONNX Runtime would, in products with weights that it recognizes."""
    model, x = quantized(vit, activation_bits=None), images()
    report = export_onnx(model, tmp_path, example=x)
    assert {layer.stored for layer in report.layers} == {"int8"}
    session = onnxruntime_session((tmp_path / FILE).read_bytes(), saved_as=tmp_path / "optimized.onnx")
    assert not any("NBits" in node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    expected = model(x).logits.detach().numpy()
    np.testing.assert_allclose(session.run(None, {"pixel_values": x.numpy()})[0], expected, atol=1e-5)


def test_inputs_alone_and_norms_without_factors(tmp_path):
    model = quantized(linear_net, vectors(), weight_bits=None, first_last_bits=None)
    report = export_onnx(model, tmp_path / "inputs", example=vectors())
    assert {layer.stored for layer in report.layers} == {"float"}

    def plain_norm() -> nn.Module:
        net = conv_net()
        net[1] = nn.BatchNorm2d(net[1].num_features, affine=False)
        net[1].running_mean += 0.1
        return net

    export_onnx(quantized(plain_norm, X), tmp_path / "norms", example=X)


def test_the_report_says_what_is_stored(tmp_path):
    """A code of -8 that a negative factor turns to 8 has no place in 4 bits."""
    net = conv_net()
    net[1].weight.data *= -1
    model = calibrate(quantize(net, SAQQuantizationConfig(first_last_bits=None, weight_granularity="channel")), [X])
    scale = model[0].weight_quantizer.scale
    scale.data = -model[0].weight.detach().flatten(1).amin(1).reshape(scale.shape) / 8
    report = export_onnx(model.eval(), tmp_path, example=X, weights="int4", check=False)
    types = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in onnx.load(tmp_path / FILE).graph.initializer}
    assert {layer.name: layer.stored for layer in report.layers} == {
        name.removesuffix(".codes"): kind.lower() for name, kind in types.items() if name.endswith(".codes")
    }
    assert {layer.stored for layer in report.layers} == {"int4", "int8"}


def test_what_an_export_may_write_over(tmp_path):
    """An earlier export, of which no image processor is left over, and the model's own files; no other model's."""
    model, processor = quantize(vit(), SAQQuantizationConfig()), ViTImageProcessor(size={"height": 16, "width": 16})
    report = ExportReport(FILE, 5, "int8", "cpu", ())

    def write(directory, model, processor=None):
        check_free(directory, True, model)
        write_export(directory, b"graph", report, model.config, processor)
        return {path.name for path in directory.iterdir()}

    assert "preprocessor_config.json" in write(tmp_path / "a", model, processor)
    with pytest.raises(ValueError, match="holds files already; .*overwrite=True"):
        check_free(tmp_path / "a", overwrite=False)
    assert write(tmp_path / "a", resnet()) == {"config.json", "onnx"}
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    for _ in range(2):
        assert "preprocessor_config.json" in write(tmp_path / "own", model)
    vit().save_pretrained(tmp_path / "float")
    before = (tmp_path / "float" / "config.json").read_text()
    with pytest.raises(ValueError, match="holds another model, whose config.json differs in quantization_config"):
        export_onnx(model, tmp_path / "float", check=False, overwrite=True)
    assert (tmp_path / "float" / "config.json").read_text() == before


def test_a_graph_beside_saved_weights_leaves_them_loadable(tmp_path):
    """Whatever they are stored as; and another quantized model is not written over, nor one by a plain module."""
    model = quantized(resnet, {"pixel_values": images(8)})
    pack(copy.deepcopy(model)).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    export_onnx(model, tmp_path, example=images(2), check=False, overwrite=True)
    loaded, _ = load_saved(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), pack(model).buffers(), strict=True))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.pop("hf_saq_export")["format_version"] == 1 and written == json.loads(config)
    # A trainer leaves `use_cache` there, which configurations of image models do not have, and losses `problem_type`.
    fields = {**json.loads(config), "use_cache": False, "problem_type": "regression"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    check_free(tmp_path, True, model)
    (tmp_path / "config.json").write_text(json.dumps({**fields, "quantization_config": "saq"}))
    with pytest.raises(ValueError, match="differs in quantization_config; name another directory"):
        check_free(tmp_path, True, model)
    (tmp_path / "config.json").write_text(config)
    other = quantized(vit, {"pixel_values": images(8)})
    with pytest.raises(ValueError, match="holds another model, whose config.json differs in model_type"):
        export_onnx(other, tmp_path, example=images(2), check=False, overwrite=True)
    with pytest.raises(ValueError, match="holds another model"):
        export_onnx(quantized(conv_net, X), tmp_path, example=X, check=False, overwrite=True)
    wider = quantized(lambda: resnet(seed=1), {"pixel_values": images(8)}, weight_bits=8)
    with pytest.raises(ValueError, match="differs in quantization_config; name another directory"):
        export_onnx(wider, tmp_path, example=images(2), check=False, overwrite=True)


@pytest.mark.parametrize("storage", [pytest.param("float", marks=pytest.mark.slow), "packed"])
def test_a_graph_does_not_pass_for_weights_that_are_saved_over_its_own(storage, tmp_path):
    """Saved by hand, not by the trainer: the graph is of the weights before, and nothing says any more that it is."""
    model = quantized(vit)
    stored = pack(model) if storage == "packed" else model
    stored.save_pretrained(tmp_path / "model")
    export_onnx(model, tmp_path / "model", example=images(2), overwrite=True, check=False)
    ExportedClassifier.from_pretrained(tmp_path / "model")
    loaded, _ = load_saved(str(tmp_path / "model"))
    trained = unpack(loaded) if storage == "packed" else loaded
    with torch.no_grad():
        trained.classifier.weight.neg_()
    (pack(trained) if storage == "packed" else trained).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="config.json has no 'hf_saq_export'; expected a directory"):
        ExportedClassifier.from_pretrained(tmp_path / "model")


def test_a_float_model_has_no_record_of_a_graph(tmp_path):
    model = quantized(vit)
    model.save_pretrained(tmp_path / "model")
    export_onnx(model, tmp_path / "model", example=images(2), overwrite=True, check=False)
    main(["dequantize", str(tmp_path / "model"), str(tmp_path / "float")])
    assert "hf_saq_export" in json.loads((tmp_path / "model/config.json").read_text())
    assert "hf_saq_export" not in json.loads((tmp_path / "float/config.json").read_text())


def test_an_export_of_an_export(tmp_path, capsys):
    export_onnx(quantized(linear_net, vectors()), tmp_path / "a", example=vectors(), check=False)
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "is an export, a graph without the weights of a model; expected the saved model" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_inputs_that_an_export_does_not_take(engine: str, tmp_path):
    export_onnx(quantized(conv_net, X), tmp_path, example=X, check=False)
    loaded = ExportedClassifier.from_pretrained(tmp_path, engine=engine)
    with pytest.raises(
        ValueError, match=rf"{engine} failed on pixel_values of shape \(2, 3, 9, 8\); expected the height"
    ):
        loaded(torch.zeros(2, 3, 9, 8))
    with pytest.raises(ValueError, match="pixel_values has NaN"):
        loaded(torch.full((2, 3, 8, 8), float("nan")))


@pytest.mark.parametrize("packed", [True, False])
def test_a_graph_is_not_put_beside_weights_of_another_training(packed, tmp_path):
    """Their configurations are the same."""
    model = quantized(resnet, {"pixel_values": images(8)})
    (pack(copy.deepcopy(model)) if packed else model).save_pretrained(tmp_path)
    check_free(tmp_path, True, model)
    check_free(tmp_path, True, pack(copy.deepcopy(model)))
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).weight.add_(1e-3)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds other weights of this ResNet.*: resnet.*weight differs. Save the"):
        export_onnx(model, tmp_path, example=images(2), check=False, overwrite=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("damage", [None, "", '{"model_type": "res'], ids=["missing", "empty", "cut off"])
def test_a_graph_is_not_put_beside_weights_of_an_unknown_model(damage, tmp_path):
    """Even of this very model: what would be written does not say how they are stored."""
    model = quantized(resnet, {"pixel_values": images(8)})
    pack(copy.deepcopy(model)).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    if damage is not None:
        (tmp_path / "config.json").write_text(damage)
    with pytest.raises(ValueError, match="holds weights without a config.json that can be read"):
        export_onnx(model, tmp_path, example=images(2), check=False, overwrite=True)


def test_plain_modules_are_compared_too(tmp_path):
    model, other = quantized(conv_net, X), quantize(vit(), SAQQuantizationConfig())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    check_free(tmp_path, True, model)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(ValueError, match="holds other weights of this"):
        check_free(tmp_path, True, model)
    save_file(other.state_dict(), tmp_path / "model.safetensors")  # nothing of which is in the model
    with pytest.raises(ValueError, match="holds other weights of this"):
        check_free(tmp_path, True, model)


def test_packed_codes_are_compared_where_both_are_packed(tmp_path):
    model = pack(quantized(resnet, {"pixel_values": images(8)}))
    model.save_pretrained(tmp_path)
    check_free(tmp_path, True, model)
    codes = next(b for b in model.buffers() if b.dtype == torch.uint8 and b.numel() > 8)
    codes[..., 0] ^= 1
    with pytest.raises(ValueError, match="holds other weights of this"):
        check_free(tmp_path, True, model)

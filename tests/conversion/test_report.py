"""The report of a conversion as text."""

from __future__ import annotations

from tiny_models import (
    linear_net,
    vectors,
)
from torch import nn

from hf_saq import SAQQuantizationConfig, calibrate, quantize

W4A4 = SAQQuantizationConfig()


def test_the_report_as_text():
    config = SAQQuantizationConfig(weight_bits=3, activation_bits=None, modules_to_not_convert=["2"])
    model = quantize(linear_net(), config)
    assert str(model.quantization_report).splitlines() == [
        "module  type    W      A      sign of A  quantizer  note",
        "0       Linear  8      float  -          lsq        first layer or head",
        "2       Linear  float  float  -          -          listed in modules_to_not_convert",
        "4       Linear  8      float  -          lsq        first layer or head",
        "2 layers quantized, 1 left in float",
    ]


def test_the_report_says_which_signs_calibration_found():
    overrides = {"2": {"activation_mode": "signed"}, "4": {"quantizer": "lsq_plus"}}
    net = nn.Sequential(*linear_net(), nn.ReLU(), nn.Linear(3, 3))
    model = quantize(net, W4A4.replace(overrides=overrides))
    assert [layer.sign for layer in model.quantization_report.layers] == ["auto", "signed", "affine", "auto"]
    calibrate(model, [vectors()])
    assert [layer.sign for layer in model.quantization_report.layers] == ["signed", "signed", "affine", "unsigned"]

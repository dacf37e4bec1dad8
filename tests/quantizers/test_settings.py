"""The settings of a quantizer are one value: checked once, passed on whole."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_saq
from hf_saq.layers import PackedLayer, QuantLinear
from hf_saq.layers.packing import pack_codes
from hf_saq.quantizers import QUANTIZERS, LSQQuantizer, QuantizerSettings, check_bits, quantizer_class

every_name = pytest.mark.parametrize("name", sorted(QUANTIZERS))

WRONG = [
    ({"bits": 1}, "QuantizerSettings.bits=1; expected an integer from 2 to 8."),
    ({"bits": 9}, "QuantizerSettings.bits=9; expected an integer from 2 to 8."),
    ({"bits": 4.0}, "QuantizerSettings.bits=4.0; expected an integer from 2 to 8."),
    ({"bits": True}, "QuantizerSettings.bits=True; expected an integer from 2 to 8."),
    ({"bits": None}, "QuantizerSettings.bits=None; expected an integer from 2 to 8."),
    ({"role": "bias"}, "QuantizerSettings.role='bias'; expected one of ['weight', 'activation']."),
    ({"signed": "auto"}, "QuantizerSettings.signed='auto'; expected True, False or None."),
    ({"signed": 1}, "QuantizerSettings.signed=1; expected True, False or None."),
    ({"scale_shape": ()}, "QuantizerSettings.scale_shape=(); expected positive integers"),
    ({"scale_shape": 8}, "QuantizerSettings.scale_shape=8; expected positive integers"),
    ({"scale_shape": (0, 1)}, "QuantizerSettings.scale_shape=(0, 1); expected positive integers"),
    ({"scale_init": "max"}, "QuantizerSettings.scale_init='max'; expected one of ['mse', 'mean']."),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_each_field_is_checked(changes: dict, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        QuantizerSettings(**{"bits": 4, "role": "weight", **changes})
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(QuantizerSettings(4, "weight"), **changes)


def test_settings_are_a_value():
    settings = QuantizerSettings(4, "weight", scale_shape=torch.Size([6, 1]))
    assert settings == QuantizerSettings(4, "weight", True, [6, 1]) and len({settings, settings}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.bits = 2


def test_one_check_of_bits_serves_settings_configurations_and_packing():
    for call in (
        lambda: QuantizerSettings(9, "weight"),
        lambda: hf_saq.SAQQuantizationConfig(first_last_bits=9),
        lambda: hf_saq.SAQQuantizationConfig(overrides={"*": {"weight_bits": 9}}),
        lambda: pack_codes(torch.zeros(1, dtype=torch.int8), 9, signed=True),
    ):
        with pytest.raises(ValueError, match="bits=9; expected an integer from 2 to 8"):
            call()
    check_bits("here", None, none_is_float=True)
    with pytest.raises(ValueError, match="here=9; expected an integer from 2 to 8, or None for float"):
        check_bits("here", 9, none_is_float=True)
    package = Path(hf_saq.__file__).parent
    defined = [
        path.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and "check_bits" in node.name
    ]
    assert defined == ["settings.py"]


@every_name
def test_a_quantizer_takes_settings_and_nothing_else(name: str):
    with pytest.raises(TypeError, match=r"Quantizer: settings=4; expected a QuantizerSettings"):
        quantizer_class(name)(4)


@every_name
@pytest.mark.parametrize("signed", [None, True, False])
def test_blank_copies_have_the_settings_whole(name: str, signed: bool | None):
    """Also an affine activation quantizer, whose sign was left open."""
    quantizer = quantizer_class(name)(QuantizerSettings(3, "activation", signed, scale_init="mean"))
    quantizer.path = "somewhere"
    quantizer.initialize(torch.rand(20))
    blank = quantizer.blank_copy()
    assert type(blank) is type(quantizer) and blank.settings is quantizer.settings
    assert blank.path == "somewhere" and not blank.initialized
    assert blank.has_offset == quantizer.has_offset
    blank.load_state_dict(quantizer.state_dict())
    assert torch.equal(blank(torch.linspace(-1, 2, 9)), quantizer(torch.linspace(-1, 2, 9)))


def test_packed_layers_keep_them():
    settings = QuantizerSettings(3, "weight", scale_shape=(6, 1))
    quantizer = LSQQuantizer(settings)
    layer = QuantLinear.from_float(nn.Linear(4, 6), quantizer, None)
    quantizer.initialize(layer.weight)
    packed = PackedLayer.from_quantized(layer)
    assert packed.settings is settings and packed.bits == 3 and packed.weight_scale.shape == (6, 1)
    unpacked = packed.to_quantized()
    assert unpacked.weight_quantizer.settings is settings

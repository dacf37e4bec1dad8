"""`hf-saq` on directories with damaged files: one sentence that names the file, status 1, never a traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from quantized_models import quantized
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_saq import pack
from hf_saq.cli import main

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """One model as `float`, as `packed`, and packed in `parts` with an index."""
    directory = tmp_path_factory.mktemp("saved")
    model = quantized()
    model.save_pretrained(directory / "float")
    pack(model).save_pretrained(directory / "packed")
    pack(model).save_pretrained(directory / "parts", max_shard_size="2KB")
    return directory


def outcome(capsys, *argv: Any) -> str:
    """What a failing command says, after checks that it is one line."""
    capsys.readouterr()
    status = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert status == 1 and out == "", (status, out)
    assert err.startswith("hf-saq: error: ") and err.count("\n") == 1
    return err


def content(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_bytes(data)


def field(name: str, value: Any, of: str | None = None) -> Callable[[Path], Any]:
    """Another value of one field of `config.json`, or of an object inside of it."""

    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (config if of is None else config[of])[name] = value
        (directory / "config.json").write_text(json.dumps(config))

    return change


def setting(name: str, value: Any) -> Callable[[Path], Any]:
    return field(name, value, of="quantization_config")


def tensors(change: Callable[[str, Tensor], Tensor | None]) -> Callable[[Path], Any]:
    def rewrite(directory: Path) -> None:
        found = {name: change(name, tensor) for name, tensor in load_file(directory / WEIGHTS).items()}
        save_file({name: tensor for name, tensor in found.items() if tensor is not None}, directory / WEIGHTS)

    return rewrite


CONFIGS = {
    "empty": (content("config.json", b""), r"config.json is not JSON .*cut off or damaged"),
    "not_json": (content("config.json", b"{oops"), "config.json is not JSON"),
    "not_text": (content("config.json", b'{"a": "\xff"}'), "config.json is not JSON"),
    "deep": (content("config.json", b"[" * 100_000), "config.json is not JSON .*recursion"),
    "null": (content("config.json", b"null"), "config.json holds a NoneType; expected a JSON object"),
    "list": (content("config.json", b"[1]"), "config.json holds a list; expected a JSON object"),
    "no_model": (field("model_type", None), "config.json: .*model type `None`"),
    "model_type": (field("model_type", [1]), "config.json is not read as .*damaged"),
    "number_of_class": (field("architectures", 3), "architectures is 3; expected a list with the name of a model"),
    "name_of_class": (field("architectures", "ViT"), "architectures is 'ViT'; expected a list"),
    "other_class": (
        field("architectures", ["ResNetForImageClassification"]),
        "config.json makes no model .*embedding",
    ),
    "type_of_size": (field("hidden_size", "x"), "config.json is not read as .*'hidden_size'"),
    "size": (field("hidden_size", 0), "config.json makes no model"),
    "other_size": (field("hidden_size", 18), r"has shape \(16,\) .*expected shape \(18,\)"),
    "depth": (field("num_hidden_layers", 3), "encoder.layer.2.*weight is in no weight file"),
    "function": (field("hidden_act", "nope"), "config.json makes no model .*'nope'"),
    "labels": (field("id2label", "x"), "config.json is not read as"),
    "dtype": (field("dtype", "float99"), "config.json is not read as .*float99"),
    "quantization_list": (field("quantization_config", [1]), r"quantization_config is \[1\]; expected 'saq'"),
    "quantization_name": (field("quantization_config", "x"), "quantization_config is 'x'; expected 'saq'"),
    "no_quantization": (field("quantization_config", None), "quant_method is None; expected 'saq'"),
    "method": (setting("quant_method", [1]), r"quant_method is \[1\]; expected 'saq'"),
    "newer": (setting("format_version", 99), "config.json: .*format_version is 99, .*install a newer one"),
    "version": (setting("format_version", "2"), "config.json: .*format_version='2'; expected an integer"),
    "bits": (setting("weight_bits", [4]), r"config.json: .*weight_bits=\[4\]; expected an integer"),
    "other_bits": (setting("weight_bits", 3), "packed_weight has shape .*expected shape"),
    "storage": (setting("storage", "float"), r"weight has shape \(0,\)"),
    "overrides": (setting("overrides", [1]), r"config.json: .*overrides=\[1\]; expected"),
    "modules": (setting("first_last_modules", ["nope"]), "config.json: .*none of .*'nope'.* is a module"),
}
FILES = {
    "no_header": (content(WEIGHTS, b"abcd"), "model.safetensors cannot be read .*cut off or damaged"),
    "header": (content(WEIGHTS, (4).to_bytes(8, "little") + b"oops"), "model.safetensors cannot be read"),
    "pointer": (content(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), "model.safetensors cannot be read"),
    "no_tensor": (content(WEIGHTS, (2).to_bytes(8, "little") + b"{}"), "weight is in no weight file"),
    "no_scale": (tensors(lambda name, t: None if "scale" in name else t), "weight_scale is in no weight file"),
    "empty_scale": (tensors(lambda name, t: t[:0] if "scale" in name else t), r"scale has shape \(0,\)"),
    "type_of_scale": (tensors(lambda name, t: t.int() if "weight_scale" in name else t), "type torch.int32"),
}
INDICES = {
    "not_json": (content(INDEX, b"{oops"), "index.json is not JSON"),
    "list": (content(INDEX, b"[]"), "index.json holds a list; expected a JSON object"),
    "no_map": (content(INDEX, b"{}"), "weight_map is None; expected tensors' names and their files"),
    "numbers": (content(INDEX, b'{"weight_map": {"x": 3}}'), "weight_map is {'x': 3}; expected"),
    "elsewhere": (content(INDEX, b'{"weight_map": {"x": "../packed/model.safetensors"}}'), r"not there: \.\./packed"),
    "absent": (lambda d: (d / "model-00002-of-00004.safetensors").unlink(), "not there: model-00002-of-00004.safet"),
    "no_index": (lambda d: (d / INDEX).unlink(), "in several files, but not model.safetensors.index.json"),
}
CASES = [
    pytest.param(form, *case, id=f"{where}-{name}")
    for where, form, cases in (
        ("config", "packed", CONFIGS),
        ("weights", "packed", FILES),
        ("index", "parts", INDICES),
    )
    for name, case in cases.items()
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("form", "damage", "message"), CASES)
def test_inspect_and_card_say_what_is_damaged(form: str, damage, message: str, saved, tmp_path, capsys):
    directory = tmp_path / "damaged"
    shutil.copytree(saved / form, directory)
    damage(directory)
    said = outcome(capsys, "inspect", directory)
    assert str(directory) in said
    assert re.search(message, said), said
    assert outcome(capsys, "card", directory) == said and not (directory / "README.md").exists()


@pytest.mark.parametrize("command", ["pack", "dequantize"])
@pytest.mark.parametrize(
    "damage",
    [CONFIGS["depth"][0], CONFIGS["function"][0], CONFIGS["other_class"][0], FILES["no_tensor"][0]],
    ids=["depth", "function", "other_class", "no_tensor"],
)
def test_nothing_is_written_from_damaged_files(command: str, damage, saved, tmp_path, capsys):
    """Float storage has no seal: layers that no file has would be packed at random values."""
    shutil.copytree(saved / "float", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    outcome(capsys, command, tmp_path / "damaged", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("form", ["float", "packed", "parts"])
def test_what_belongs_to_others_is_not_looked_at(form: str, saved, tmp_path, capsys):
    """Files of a training run and an index left behind by an earlier save in parts."""
    directory = tmp_path / "whole"
    shutil.copytree(saved / form, directory)
    for name in ("trainer_state.json", "training_args.bin", "optimizer.pt", *([] if form == "parts" else [INDEX])):
        (directory / name).write_text("{oops")
    assert main(["inspect", str(directory), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert all(layer["weight_bytes"] and layer["scales"] for layer in layers)

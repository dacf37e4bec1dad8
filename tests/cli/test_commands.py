"""`hf-saq`: what it prints and writes, and its exit status. Repositories are in `hub/test_commits.py`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from processes import HANGS, environment
from tiny_models import deit_with_teacher, images, vit
from transformers import (
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    DeiTForImageClassificationWithTeacher,
    ViTImageProcessor,
)

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.cli import main
from hf_saq.cli.arguments import make_parser
from hf_saq.cli.commands import COMMANDS
from hf_saq.conversion.forms import is_packed
from hf_saq.layers import PackedLayer
from hf_saq.storage.inspection import inspect_checkpoint


def quantized(build=vit, **fields):
    model = quantize(build(), SAQQuantizationConfig(**{"weight_bits": 3, "activation_bits": 5, **fields}))
    return calibrate(model, [images(8)]).eval()


@pytest.fixture(scope="module")
def model():
    return quantized(modules_to_not_convert=["*.fc1"])


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """`float` and `packed`, each with an image processor."""
    directory = tmp_path_factory.mktemp("saved")
    for name, form in (("float", model), ("packed", pack(model))):
        form.save_pretrained(directory / name)
        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(directory / name)
    return directory


def run(capsys, *argv) -> tuple[int, str, str]:
    status = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    return status, out, err


def logits(directory) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForImageClassification.from_pretrained(directory).eval()(images(seed=2)).logits


# inspect -------------------------------------------------------------------------------------------------------------


def test_inspect_reads_no_weights(saved, monkeypatch, capsys):
    monkeypatch.setattr(PackedLayer, "codes", None)
    monkeypatch.setattr(AutoModelForImageClassification, "from_pretrained", None)
    assert run(capsys, "inspect", saved / "packed")[0] == 0


def test_inspect_prints_a_table(saved, capsys):
    status, out, _ = run(capsys, "inspect", saved / "packed")
    lines = out.splitlines()
    size = (saved / "packed" / "model.safetensors").stat().st_size
    assert status == 0
    assert lines[0].endswith("packed: ViTForImageClassification")
    assert lines[1] == "storage packed, format version 2, quantizer lsq"
    assert lines[2] == f"model.safetensors: {size / 1024:,.1f} KiB"
    fc1, fc2, head = (
        next(line.split() for line in lines if line.startswith(name))
        for name in ("vit.layers.0.mlp.fc1", "vit.layers.0.mlp.fc2", "classifier")
    )
    assert fc1[2:4] == ["float", "float"] and fc1[4] == f"{16 * 32 * 4:,}" and "modules_to_not_convert" in fc1
    assert fc2[2:6] == ["3", "5", f"{16 * 32 * 3 // 8}", "1"]
    assert head[2:5] == ["8", "8", f"{16 * 3}"]


def test_inspect_as_json(saved, model, capsys):
    status, out, _ = run(capsys, "inspect", saved / "float", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["quantization_config"] == model.config.quantization_config.to_dict()
    assert [layer["name"] for layer in found["layers"]] == [p.name for p in model.quantization_report.layers]


# pack, dequantize, card ----------------------------------------------------------------------------------------------


def test_pack(saved, tmp_path, capsys):
    target = tmp_path / "new" / "packed"
    status, out, _ = run(capsys, "pack", saved / "float", target)
    assert status == 0
    assert out == f"{target}: {(target / 'model.safetensors').stat().st_size / 1024:,.1f} KiB of packed weights\n"
    assert {file.name for file in target.iterdir()} == {file.name for file in (saved / "packed").iterdir()}
    assert torch.equal(logits(target), logits(saved / "packed"))


def test_dequantize(saved, tmp_path, capsys):
    status, _, _ = run(capsys, "dequantize", saved / "packed", tmp_path / "plain")
    assert status == 0
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    packed = AutoModelForImageClassification.from_pretrained(saved / "packed")
    assert not hasattr(plain.config, "quantization_config") and not is_packed(plain)
    assert torch.equal(plain.classifier.weight, packed.classifier.quantized_weight())
    assert (tmp_path / "plain" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("command", ["pack", "dequantize"])
def test_a_tokenizer_goes_with_a_model_of_images_and_text(command, tmp_path, capsys):
    """CLIP could not be run by a pipeline any more. Nothing else goes along: training arguments hold a token."""
    tower = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = dict(**tower, vocab_size=8, max_position_embeddings=8, bos_token_id=6, eos_token_id=7)
    config = CLIPConfig(text_config=text, vision_config=dict(**tower, image_size=8, patch_size=4))
    model = quantize(CLIPModel(config), SAQQuantizationConfig())
    calibrate(model, [{"pixel_values": torch.randn(2, 3, 8, 8), "input_ids": torch.tensor([[6, 1, 7], [6, 2, 7]])}])
    model.save_pretrained(tmp_path / "saved")
    vocabulary = {text: k for k, text in enumerate(["a", "b", "c", "a</w>", "b</w>", "c</w>", "<s>", "</s>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], bos_token="<s>", eos_token="</s>", unk_token="a")
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/training_args.bin").write_text("secret")
    assert run(capsys, command, tmp_path / "saved", tmp_path / "out")[0] == 0
    processor = CLIPProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer("a b")["input_ids"] == tokenizer("a b")["input_ids"]
    assert not (tmp_path / "out/training_args.bin").exists()


def test_the_class_it_was_saved_from_is_kept(tmp_path, capsys):
    """Not the one that `AutoModelForImageClassification` would take, which has one head less."""
    quantized(deit_with_teacher).save_pretrained(tmp_path / "float")
    assert run(capsys, "pack", tmp_path / "float", tmp_path / "packed")[0] == 0
    again, info = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"] and is_packed(again)


def test_card(saved, tmp_path, capsys):
    pack(quantized()).save_pretrained(tmp_path)
    status, out, _ = run(capsys, "card", tmp_path, "--repo-id", "me/small")
    text = (tmp_path / "README.md").read_text()
    assert status == 0 and out == f"{tmp_path / 'README.md'}\n"
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["quantized", "saq", "w3a5", "lsq"]
    assert f"{(tmp_path / 'model.safetensors').stat().st_size / 1024:,.1f} KiB" in text
    assert 'from_pretrained("me/small")' in text
    assert "## Results" not in text and "## Training" not in text and "model-index" not in text
    full = 4 * sum(p.numel() for p in vit().parameters())
    assert f"| weights on disk | {full / 1024:,.1f} KiB |" in text
    status, _, err = run(capsys, "card", tmp_path)
    assert status == 1 and "README.md exists" in err
    assert run(capsys, "card", tmp_path, "--force")[0] == 0
    assert f'from_pretrained("{tmp_path.name}")' in (tmp_path / "README.md").read_text()


def test_a_card_uses_the_results_beside_the_files(tmp_path, capsys):
    """What `Trainer.save_metrics` left there, and a picture of the landscape."""
    pack(quantized()).save_pretrained(tmp_path)
    results = tmp_path / "eval_results.json"
    results.write_text('{"eval_top1": 0.8125, "eval_samples": 450, "eval_runtime": 3.25, "epoch": 2.0, "note": "x"}')
    (tmp_path / "landscape.png").write_bytes(b"")
    assert run(capsys, "card", tmp_path)[0] == 0
    text = (tmp_path / "README.md").read_text()
    assert "Measured by whoever wrote eval_results.json beside the weights (450 images)." in text
    assert "| top-1 accuracy | weights on disk |" in text and "| 0.8125 |" in text and "3.25" not in text
    assert yaml.safe_load(text.split("---\n")[1])["model-index"] and "](landscape.png)" in text
    for wrong, said in (
        ("[1]", "holds a list; expected an object of metrics"),
        ("{", "eval_results.json is not JSON"),
    ):
        results.write_text(wrong)
        status, _, err = run(capsys, "card", tmp_path, "--force")
        assert status == 1 and said in err and err.count("\n") == 1


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(saved, model, tmp_path) -> Path:
    """Directories that are not what is asked for, by what is wrong with them."""
    vit().save_pretrained(tmp_path / "unquantized")
    for name in ("cut", "weightless"):
        pack(model).save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    file.unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "{}/unquantized"], "quantization_config.quant_method is None; expected 'saq'"),
        (["inspect", "{}/cut"], "model.safetensors cannot be read"),
        (["inspect", "{}/weightless"], "has no weight file"),
        (["inspect", "{}/empty"], "has no config.json; expected that of a saved model."),
        (["inspect", "{}"], "has no config.json; did you mean one of its folders: "),
        (["inspect", "{}/file"], "is a file; expected the directory of a saved model or a repository"),
        *[
            ([command, "{}/nowhere", *more], "/nowhere: no such directory, and no name that a repository on the Hub")
            for command, *more in (("inspect",), ("pack", "{}/new"), ("eval", "--data", "digits"), ("benchmark",))
        ],
        (["pack", "{}/unquantized", "{}/new"], "quantization_config.quant_method is None"),
        (["pack", "{}/cut", "{}/new"], "model.safetensors"),
        (["pack", "{}/unquantized", "{}/cut"], "exists and is not an empty directory; name a new one"),
        (["dequantize", "{}/unquantized", "{}/new"], "quantization_config.quant_method is None"),
        (["card", "{}/nowhere"], "is not a directory"),
    ],
    ids=lambda value: "-".join(value).replace("{}/", "") if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_1(broken, argv, message, capsys):
    status, out, err = run(capsys, *(argument.format(broken) for argument in argv))
    assert status == 1 and out == ""
    assert err.startswith("hf-saq: error: ") and err.count("\n") == 1
    assert message in err


def test_packing_what_is_packed(saved, tmp_path, capsys):
    status, _, err = run(capsys, "pack", saved / "packed", tmp_path / "again")
    assert status == 1 and "is packed already" in err
    assert not (tmp_path / "again").exists()


def test_the_commands_of_the_readme_exist():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    commands = re.findall(r"^hf-saq (.*?) *(?:#.*)?$", readme, flags=re.MULTILINE)
    parsed = [make_parser().parse_args(command.split()) for command in commands]
    assert {args.command for args in parsed} == set(COMMANDS) and len(commands) == len(COMMANDS)


@pytest.mark.parametrize("argv", [[], ["shrink"], ["pack", "only-one"], ["inspect", "x", "--yaml"]])
def test_wrong_arguments_are_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage: hf-saq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["exprot", "a", "b"], "invalid choice: 'exprot' .*; did you mean export?"),
        (["export", "a", "b", "--wieghts", "int4"], "unrecognized arguments: --wieghts int4; did you mean --weights?"),
        (["export", "a", "b", "--overw"], "unrecognized arguments: --overw"),  # no abbreviations
        (["pack", "a", "b", "--zzz"], "unrecognized arguments: --zzz\n"),
        (["export", "--engines", "onnxruntime", "a", "b"], "required: .*; DIR OUT must come before --engines, which"),
        (["benchmark", "--threads", "2", "a"], "invalid int value: 'a'; DIR must come before --threads, which"),
        (["export", "a", "--engines", "b"], "required: OUT; DIR OUT must come before --engines, which"),
        (["benchmark", "a", "--rounds", "b"], "invalid int value: 'b'\n"),
        (["export", "a", "--overwrite"], "required: OUT\n"),
    ],
)
def test_what_is_mistyped_is_answered_with_what_there_is(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert re.search(message.replace("?", "[?]"), capsys.readouterr().err)


def test_the_installed_script(saved):
    script = Path(sys.executable).with_name("hf-saq")
    outcome = subprocess.run(
        [script, "inspect", saved / "packed", "--json"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert outcome.returncode == 0 and outcome.stderr == ""
    assert json.loads(outcome.stdout) == inspect_checkpoint(str(saved / "packed")).to_dict()


def test_a_name_that_is_nothing_is_named(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["inspect", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("hf-saq: error: nowhere is not a directory here and could not be had")


# export --------------------------------------------------------------------------------------------------------------


def test_export(saved, model, tmp_path, capsys):
    from onnx.reference import ReferenceEvaluator

    target = tmp_path / "out"
    status, out, err = run(capsys, "export", saved / "packed", target, "--weights", "int4")
    assert status == 0, err
    assert out.endswith(f"{target}: exported\n") and "vit.layers.0.mlp.fc2" in out
    assert (target / "preprocessor_config.json").exists()
    evaluator = ReferenceEvaluator(str(target / "onnx" / "model_quantized.onnx"))
    found = evaluator.run(None, {"pixel_values": images(seed=2).numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), logits(saved / "packed"), atol=1e-5, rtol=1e-5)
    status, _, err = run(capsys, "export", saved / "packed", target)
    assert status == 1 and "holds files already" in err

"""The README's code runs, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import hf_saq
from hf_saq.quantizers import QUANTIZERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_marked_snippet_runs(capsys):
    marked = re.findall(r"<!-- runs as a test -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(marked) == 1
    namespace: dict = {}
    exec(marked[0], namespace)
    assert "2 layers quantized" in capsys.readouterr().out
    assert namespace["small"](namespace["images"]).shape == (16, 10)


def test_the_first_two_snippets_run_from_data_to_a_pipeline(tmp_path, monkeypatch, capsys):
    """Word for word, but for the names of model and data, which are of tiny local ones, and the number of steps."""
    marked = r"<!-- runs as a test, on a small model and a few images -->\n```python\n(.*?)```"
    (train,) = re.findall(marked, README, flags=re.DOTALL)
    (load,) = re.findall(r"<!-- runs after it -->\n```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("validation", 3)):
        for k in range(count):
            directory = tmp_path / "beans" / split / "abc"[k % 3]
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(directory / f"{k}.png")
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save("leaf.jpg")
    tiny = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=8,
        )
    )
    tiny.save_pretrained("tiny")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained("tiny")
    for given, local in (
        ('"google/vit-base-patch16-224"', '"tiny"'),
        ('load_dataset("AI-Lab-Makerere/beans")', 'load_dataset("imagefolder", data_dir="beans")'),
        ("num_train_epochs=10", 'max_steps=2, report_to="none", use_cpu=True, dataloader_pin_memory=False'),
        ('rows["labels"]', 'rows["label"]'),  # what image folders call it
    ):
        assert given in train
        train = train.replace(given, local)
    exec(train, {})
    capsys.readouterr()
    exec(load, {})
    assert "score" in capsys.readouterr().out


def test_the_quantizer_of_the_readme_is_one_class_and_one_line(monkeypatch):
    """Everything else of the package takes it as it is: calibration, training, packing, a float copy."""
    source = next(block for block in blocks("python") if "class MyQuantizer" in block)
    namespace: dict = {}
    exec(source, namespace)
    monkeypatch.setitem(QUANTIZERS, "mine", namespace["MyQuantizer"])

    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    config = hf_saq.SAQQuantizationConfig(
        weight_bits=3, quantizer="mine", weight_granularity="channel", first_last_bits=None
    )
    hf_saq.calibrate(hf_saq.quantize(model, config), [images])
    assert isinstance(model[0].weight_quantizer, namespace["MyQuantizer"])
    minimizer = hf_saq.SharpnessAwareMinimizer(model, rho=0.1)
    with minimizer.ascent():
        model(images).square().mean().backward()
    with minimizer.perturbed():
        model(images).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    expected = model.eval()(images)
    packed = hf_saq.pack(model)
    torch.testing.assert_close(packed(images), expected)
    weight = model[0].quantized_weight()
    assert torch.equal(hf_saq.dequantize(model)[0].weight, weight)
    assert weight[0].unique().numel() <= 8


def test_every_python_block_compiles():
    for block in blocks("python"):
        compile(block, "README.md", "exec")


def test_the_table_names_the_quantizers():
    row = next(line for line in README.splitlines() if line.startswith("| `quantizer`"))
    assert set(re.findall(r"`([a-z_]+)`", row)) - {"quantizer"} == set(QUANTIZERS)


def test_scripts_and_files_exist():
    for path in set(re.findall(r"(?:examples|docs|hf_saq)/[\w./]+\.(?:py|txt|md|yaml)", README)):
        assert (ROOT / path).exists(), path

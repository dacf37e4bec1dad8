"""The README's code runs, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

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

"""Pages of the documentation: what says that it runs does, links lead somewhere, quoted errors are those there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import hf_saq
from hf_saq.layers import QUANTIZED_LAYERS
from hf_saq.quantizers import QUANTIZERS
from hf_saq.sharpness.schedules import SCHEDULES, PerturbationSchedule, ScheduledStep

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = {path: path.read_text() for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]}
RUNS = re.compile(r"<!-- runs as a test -->\n```python\n(.*?)```", flags=re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run(page: str) -> dict:
    """Run the marked blocks of a page, one after the other; returns what they define."""
    namespace: dict = {"__name__": "page"}
    for block in RUNS.findall((ROOT / "docs" / page).read_text()):
        exec(block, namespace)
    return namespace


# Code ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_every_python_block_compiles(path):
    for block in re.findall(r"```python\n(.*?)```", TEXTS[path], flags=re.DOTALL):
        compile(block, name(path), "exec")


def test_pages_with_marked_blocks():
    """A new one wants a test below."""
    assert {path.name for path in PAGES if RUNS.search(TEXTS[path])} == {
        "quickstart.md",
        "training_loops.md",
        "extending.md",
    }


def test_the_quickstart_without_training(capsys):
    found = run("quickstart.md")
    assert found["small"](found["batches"][0]).shape == (16, 10)
    assert "bit operations" in capsys.readouterr().out


def test_training_loops(capsys):
    found = run("training_loops.md")
    assert "2 layers quantized" in capsys.readouterr().out
    images = found["images"]
    assert found["outcome"].loss.isfinite() and found["small"](images).shape == (16, 10)
    assert torch.equal(found["again"][0].quantized_weight(), found["float_model"][0].weight)


def test_a_quantizer_a_layer_and_a_schedule(monkeypatch):
    """One class and one line each: calibration, training, packing and a float copy take them as they are."""
    found = run("extending.md")
    monkeypatch.setitem(QUANTIZERS, "mine", found["MyQuantizer"])
    monkeypatch.setitem(QUANTIZED_LAYERS, nn.ConvTranspose1d, found["QuantConvTranspose1d"])
    monkeypatch.setitem(SCHEDULES, "descent", found["Descent"])

    x = torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.ConvTranspose1d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    config = hf_saq.SAQQuantizationConfig(weight_bits=3, quantizer="mine", first_last_bits=None)
    hf_saq.calibrate(hf_saq.quantize(model, config), [x])
    assert isinstance(model[0].weight_quantizer, found["MyQuantizer"])

    def backward(batch, reduce=True):
        loss = model(batch).square().mean()
        loss.backward()
        return loss

    minimizer = hf_saq.SharpnessAwareMinimizer(model, rho=0.1)
    step = ScheduledStep(minimizer, PerturbationSchedule(reuse="descent"))
    for number in range(2):
        step.micro_batch(0, [x], backward, number, 2)
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    expected = model.eval()(x)
    torch.testing.assert_close(hf_saq.pack(model)(x), expected)
    weight = model[0].quantized_weight()
    assert torch.equal(hf_saq.dequantize(model)[0].weight, weight) and weight.unique().numel() <= 8
    # What a reader copies holds in bfloat16 too, and for every layer of that class. Rounding of two types: 5 %.
    odd = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
    model = nn.Sequential(odd, nn.Linear(14, 3)).bfloat16()
    plain = model(x.bfloat16())
    config = config.replace(weight_bits=8, activation_bits=8)
    quantized = hf_saq.calibrate(hf_saq.quantize(model, config), [x.bfloat16()])(x.bfloat16())
    assert quantized.dtype == torch.bfloat16 and (quantized - plain).norm() < 0.05 * plain.norm()


def test_the_table_of_settings_names_the_quantizers():
    row = next(line for line in TEXTS[ROOT / "docs" / "settings.md"].splitlines() if line.startswith("| `quantizer`"))
    assert set(re.findall(r"`([a-z_]+)`", row)) - {"quantizer"} == set(QUANTIZERS)


# Links ---------------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """What headings are called in a link, on the site and on code hosts alike."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    plain = [re.sub(r"[`*]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading)) for heading in plain}


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_every_internal_link_leads_somewhere(path):
    text = re.sub(r"```.*?```", "", TEXTS[path], flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://|mailto:", link)]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{name(path)} links to {link}"
        if path.parent != ROOT:
            assert target.is_relative_to(ROOT / "docs"), f"{name(path)} links to {link}, which is not on the site"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{name(path)} links to {link}, which has no such heading"


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    absent = [path for path in PAGES if f": {path.relative_to(ROOT / 'docs').as_posix()}\n" not in menu]
    assert len(PAGES) > 15 and not absent


# Errors --------------------------------------------------------------------------------------------------------------


def test_errors_that_are_quoted_are_those_of_the_code():
    """Fragments of messages, each in one string of the sources; messages of other libraries say so."""
    sources = [*sorted((ROOT / "hf_saq").rglob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]
    said = []
    for source in sources:
        tree = ast.parse(source.read_text())
        said += [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and type(node.value) is str]
    text = TEXTS[ROOT / "docs" / "troubleshooting.md"]
    quoted = [
        q for line in re.findall(r"^\*\*(.*)\*\*$", text, flags=re.MULTILINE) for q in re.findall(r'"(.*?)"', line)
    ]
    of_others = {"Unknown quantization type, got saq"}
    assert len(quoted) > 12 and of_others <= set(quoted)
    for fragment in set(quoted) - of_others:
        assert any(fragment in text for text in said), fragment

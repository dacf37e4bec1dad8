"""The README's code runs, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_the_quantizer_of_the_readme_works():
    source = next(block for block in blocks("python") if "class MyQuantizer" in block)
    namespace: dict = {}
    exec(source, namespace)
    import torch

    quantizer, x = namespace["MyQuantizer"](4, "weight"), torch.randn(8, 8)
    quantizer.initialize(x)
    torch.testing.assert_close(quantizer(x), quantizer.dequantize(quantizer.quantize(x)))


def test_every_python_block_compiles():
    for block in blocks("python"):
        compile(block, "README.md", "exec")


def test_the_table_names_the_quantizers():
    row = next(line for line in README.splitlines() if line.startswith("| `quantizer`"))
    assert set(re.findall(r"`([a-z_]+)`", row)) - {"quantizer"} == set(QUANTIZERS)


def test_scripts_and_files_exist():
    for path in set(re.findall(r"(?:examples|docs|hf_saq)/[\w./]+\.(?:py|txt|md|yaml)", README)):
        assert (ROOT / path).exists(), path

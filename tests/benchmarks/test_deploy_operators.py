"""Where the time of an export goes: how times of nodes are added up, and what the page says of them."""

from __future__ import annotations

import pytest

from benchmarks.deploy import operators
from benchmarks.shared.markdown import write_between
from hf_saq.timing.nodes import NodeTimes, RunningNode


def test_times_are_added_up_by_operator_turn_by_turn():
    nodes = [RunningNode(name, kind, (), ()) for name, kind in (("a", "MatMul"), ("b", "Add"), ("c", "MatMul"))]
    turns = [{"a": 1e6, "b": 5e6, "c": 2e6}, {"a": 4e6, "b": 1e6, "c": 2e6}, {"a": 9e6, "b": 2e6, "c": 9e6}]
    found = operators.by_operator(NodeTimes(nodes, turns))
    assert found == {"MatMul": {"ms": 6.0, "nodes": 2}, "Add": {"ms": 2.0, "nodes": 1}}


def test_the_table_adds_up_what_is_small():
    outcome = {
        "operators": {
            "onnx-float": {"Gemm": {"ms": 10.0, "nodes": 3}, "Shape": {"ms": 0.04, "nodes": 1}},
            "onnx-int8": {"MatMulIntegerToFloat": {"ms": 4.0, "nodes": 3}, "Add": {"ms": 1.02, "nodes": 3}},
        },
        "machine": {"cpu": "a CPU"},
        "versions": {"onnxruntime": "1"},
    }
    text = operators.table("m", outcome)
    assert "All of them take 0.50 of float's time" in text
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert rows == [
        "| MatMulIntegerToFloat | - | 4.00 (3) |",
        "| Add | - | 1.02 (3) |",
        "| Gemm | 10.00 (3) | - |",
        "| others | 0.04 | 0.00 |",
        "| all | 10.04 | 5.02 |",
    ]


def test_text_is_written_between_marks_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a <!-- b --> old <!-- e --> z")
    write_between(page, "<!-- b -->", "<!-- e -->", "new")
    assert page.read_text() == "a <!-- b -->\n\nnew\n<!-- e --> z"
    with pytest.raises(ValueError, match=r"page\.md has not the two marks 'x' and '<!-- e -->', once each"):
        write_between(page, "x", "<!-- e -->", "new")

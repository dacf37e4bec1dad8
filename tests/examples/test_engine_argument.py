"""`--engine` of the example: every quantized model is exported, checked and scored on the engine that will run it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_image_classification as script  # noqa: E402
from image_results import Row, format_table  # noqa: E402
from test_run_image_classification import SMALL  # noqa: E402


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_exported_model_is_scored(engine, tmp_path, capsys):
    rows = script.main([*SMALL, f"--output_dir={tmp_path}", "--methods=qat", "--weight_bits=4", f"--engine={engine}"])
    trained = rows[1]
    assert rows[0].engine_top1 is None
    assert abs(trained.engine_top1 - trained.top1) <= 1 / 64  # of 64 images, one may lie on an edge
    assert f"{engine} top-1 %" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())[1]["engine_top1"] == trained.engine_top1
    assert (tmp_path / "qat-w4a4" / "onnx" / "model_quantized.onnx").is_file()
    assert "## Integer inference" in (tmp_path / "qat-w4a4" / "README.md").read_text()


def test_what_cannot_be_exported_is_said_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        script.main([f"--output_dir={tmp_path}", "--engine=tensorrt"])
    assert "--engine 'tensorrt'; expected one of ['none', 'onnxruntime', 'openvino']" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(SystemExit):
        script.main([f"--output_dir={tmp_path}", "--engine=openvino"])
    assert "--engine openvino: openvino is needed" in (said := capsys.readouterr().err) and "install it with" in said
    with pytest.raises(SystemExit, match="--engine exports what is trained: give --do_train"):
        script.main([f"--output_dir={tmp_path}", "--engine=onnxruntime", "--do_train=false"])
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_a_column_for_an_engine_that_was_asked():
    rows = [Row("float", "W32A32", 0.9, 2048, 1.0), Row("qat", "W4A4", 0.8, 1024, 2.0, 0.8, engine_top1=0.7875)]
    with_engine, without = format_table(rows, "openvino").splitlines(), format_table(rows[:1], "openvino").splitlines()
    assert with_engine[0].endswith("  openvino top-1 %") and with_engine[3].split()[-1] == "78.75"
    assert with_engine[2].split()[-1] == "-" and without[0].endswith("reloaded top-1 %")

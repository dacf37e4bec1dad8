"""`SAQTrainer.export_onnx`: the graph beside the model, in its card and its pushes, and never of other weights."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from test_publishing_trainer import card, trainer_in
from tiny_models import linear_net, vit
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, quantize
from hf_saq.export import ExportedClassifier
from hf_saq.export.checks.whole_model import own_logits
from hf_saq.hub.card import model_card
from hf_saq.hub.card_facts import CardFacts

GRAPH = "onnx/model_quantized.onnx"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer whose model was exported, with what it printed."""
    directory = tmp_path_factory.mktemp("run")
    trainer = trainer_in(directory / "model")
    trainer.train()
    report = trainer.export_onnx(engines=["onnxruntime"])
    return trainer, directory, report


@pytest.fixture
def talking():
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    yield
    logging.set_verbosity(before)


def test_one_directory_holds_the_packed_model_and_its_graph(run):
    trainer, directory, report = run
    assert report.checks["codes and scales"].startswith("equal in ")
    assert "4 of 4 top-1 equal" in report.checks["ONNX Runtime"]  # the four images of `eval_dataset`
    x = torch.stack([trainer.eval_dataset[i]["pixel_values"] for i in range(4)])
    packed = AutoModelForImageClassification.from_pretrained(directory / "model").eval()
    expected, own_noise, _ = own_logits(trainer.model, x)
    graph = ExportedClassifier.from_pretrained(directory / "model", threads=1)
    with torch.no_grad():
        for found in (packed(x).logits, graph(x).logits):
            difference = (found - torch.from_numpy(expected)).square().mean().sqrt()
            assert difference <= max(4 * own_noise, 2e-3) * torch.from_numpy(expected).square().mean().sqrt()


def test_later_saves_take_the_graph_along(run):
    trainer, directory, _ = run
    graph = (directory / "model" / GRAPH).read_bytes()
    trainer.save_model(str(directory / "elsewhere"))
    trainer.save_model()  # writes another config.json over the one that named the graph
    for place in ("model", "elsewhere"):
        assert (directory / place / GRAPH).read_bytes() == graph
        ExportedClassifier.from_pretrained(directory / place, threads=1)
    trainer.save_model(str(directory / "checkpoint-1"), _internal_call=True)
    assert not (directory / "checkpoint-1" / "onnx").exists()


def test_the_card_describes_it(run):
    trainer, directory, report = run
    trainer.create_model_card()
    text = card(directory / "model")[1]
    section = text.split("## Integer inference\n")[1].split("\n## ")[0]
    assert f"`{GRAPH}` ({report.size / 1024:,.1f} KiB, int8 weights)" in section and "for any CPU (products" in section
    for name, found in report.checks.items():
        assert f"- {name}: {found}\n" in section + "\n"
    assert "layers run in integers" in section
    assert 'ExportedClassifier.from_pretrained("model", engine="onnxruntime")' in section
    assert 'pipeline("image-classification", "model", { dtype: "q8" })' in section


def test_the_card_of_a_repository_loads_from_its_branch():
    from hf_saq.export.report import ExportReport

    report = ExportReport(GRAPH, 2048, "int8", "gpu", (), {"integers": "3 of 4"})
    about = dict(name="m", architecture="X", config=None, load_from="me/m", revision="v2", export=report)
    text = str(model_card(CardFacts(**about, has_processor=True)))
    assert 'ExportedClassifier.from_pretrained("me/m", engine="onnxruntime", revision="v2")' in text
    assert 'AutoImageProcessor.from_pretrained("me/m", revision="v2")' in text
    assert '"me/m", { dtype: "q8", revision: "v2" }' in text and "GPUs and other accelerators, which" in text
    assert "```js" not in str(model_card(CardFacts(**about)))  # without a processor there is no pipeline


@pytest.mark.slow
def test_what_it_prints(tmp_path, capsys, talking):
    trainer = trainer_in(tmp_path / "model")
    trainer.save_model()
    assert f"trainer.export_onnx(), or hf-saq export {tmp_path / 'model'} OUT" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="which CPUs without VNNI get wrong"):
        trainer.export_onnx(check=False, weights="int4", target="gpu")
    told = capsys.readouterr().out
    assert f"{tmp_path / 'model' / GRAPH} (" in told and "transformers.js" in told
    assert json.loads((tmp_path / "model" / "config.json").read_text())["hf_saq_export"]["weights"] == "int4"
    # Training changes the weights: the next save has no graph, and no word of one.
    trainer.train()
    assert trainer.exported is None
    trainer.save_model(str(tmp_path / "later"))
    assert not (tmp_path / "later" / "onnx").exists()
    assert "hf_saq_export" not in json.loads((tmp_path / "later" / "config.json").read_text())
    trainer.create_model_card()
    assert "Integer inference" not in card(tmp_path / "model")[1]
    trainer.save_model()  # over the earlier weights: their graph does not stay beside these
    assert not (tmp_path / "model" / GRAPH).exists()


def test_a_process_that_does_not_save_reads_nothing_there(tmp_path, monkeypatch, talking):
    trainer = trainer_in(tmp_path / "model")
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("")  # as the process that saves has it while it writes
    monkeypatch.setattr(type(trainer.args), "should_save", False)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    for module in ("run_in_words", "exporting_trainer"):
        for read in ("weight_file_bytes", "read_json_object"):
            monkeypatch.setattr(f"hf_saq.hub.{module}.{read}", _must_not_run, raising=False)
    trainer.save_model()
    trainer.save_model(str(tmp_path / "model"), _internal_call=True)
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["config.json"]


def _must_not_run(*arguments):
    raise AssertionError(f"read {arguments}")


def test_a_graph_of_other_weights_goes_before_a_push_that_fails(tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path / "model")
    trainer.export_onnx(check=False)
    trainer.exported, trainer._graph = None, None  # as training does
    trainer.args.push_to_hub = True

    def no_connection(**arguments):
        raise ConnectionError("away")

    monkeypatch.setattr(trainer, "push_to_hub", no_connection)
    with pytest.raises(ConnectionError):
        trainer.save_model()
    assert not (tmp_path / "model" / GRAPH).exists()


def test_a_save_replaces_what_a_killed_one_left(tmp_path):
    trainer = trainer_in(tmp_path / "model")
    (tmp_path / "model" / "onnx").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["ViT')
    (tmp_path / "model" / GRAPH).write_bytes(b"of the weights that are replaced")
    trainer.save_model()
    AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / GRAPH).exists()


def test_clear_errors(tmp_path, monkeypatch):
    floating = trainer_in(tmp_path / "float", model=vit(), saq_config=SAQConfig(case=None))
    with pytest.raises(ValueError, match="ViTForImageClassification is not quantized; expected a quantized model"):
        floating.export_onnx()
    plain = SAQTrainer(quantize(linear_net(), SAQQuantizationConfig()), floating.args, saq_config=SAQConfig(case=None))
    with pytest.raises(ValueError, match="Sequential is a plain module.*hf_saq.export.export_onnx"):
        plain.export_onnx()
    fresh = trainer_in(tmp_path / "fresh", model=quantize(vit(), SAQQuantizationConfig()))
    with pytest.raises(RuntimeError, match="is not calibrated: .* have no range yet"):
        fresh.export_onnx()
    trainer = trainer_in(tmp_path / "model")
    with pytest.raises(ValueError, match="engine='tensorrt'; expected one of"):
        trainer.export_onnx(engines=["tensorrt"])
    with pytest.raises(ValueError, match="target='phone'"):
        trainer.export_onnx(target="phone")
    assert trainer.exported is None and not (tmp_path / "model" / "onnx").exists()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript is needed .* install it with pip install"):
        trainer_in(tmp_path / "missing").export_onnx()
    assert not (tmp_path / "missing" / "config.json").exists()

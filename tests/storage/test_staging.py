"""A save over an earlier one, killed at any moment, leaves one of the two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import load
from processes import SUPPORT, run_python
from quantized_models import quantized
from resume_runs import make_trainer
from save_runs import SAVES
from transformers import PreTrainedModel

from hf_saq.storage import dequantize_saved, pack_saved, rewriting
from hf_saq.storage.staging import STAGE, staged


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("killed")
    run_python(SUPPORT / "save_runs.py", directory)
    return directory


@pytest.mark.parametrize("saves", SAVES)
def test_a_killed_save_leaves_the_earlier_model_or_the_later(saves: str, killed: Path):
    states = {path.name: load(path).state_dict() for path in sorted((killed / saves).iterdir())}

    def is_equal(first: str, second: str) -> bool:
        a, b = states[first], states[second]
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    assert not is_equal("earlier", "later")
    moments = sorted((m for m in states if m.startswith("before_rename")), key=lambda m: int(m.rpartition("_")[2]))
    assert len(moments) > 3
    for moment in ("at_the_start", "half_way_through_the_weights", moments[0]):
        assert is_equal(moment, "earlier"), moment
    found = ["later" if is_equal(moment, "later") else "earlier" for moment in moments]
    assert all(is_equal(moment, kind) for moment, kind in zip(moments, found, strict=True))
    assert found == sorted(found)  # first one, then the other, and no way back
    assert (killed / saves / moments[-1] / "whole").exists() and found[-1] == "later"
    left = {path.name for path in (killed / saves / moments[-1]).iterdir()} - {"whole"}
    assert left == {path.name for path in (killed / saves / "later").iterdir()}


def test_a_save_that_fails_changes_nothing(tmp_path: Path, monkeypatch):
    trainer = make_trainer("vit", tmp_path, max_steps=1)
    trainer.calibrate_if_needed()
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    save = PreTrainedModel.save_pretrained

    def fail(self, directory, **kwargs):
        save(self, directory, **kwargs)
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with torch.no_grad():
        trainer.model.classifier.bias += 1
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not (tmp_path / STAGE).exists()


def test_files_of_others_and_of_subdirectories(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "schedule-0.safetensors").write_text("not a model")
    (tmp_path / STAGE).mkdir()
    (tmp_path / STAGE / "config.json").write_text("left by a killed save")
    with staged(tmp_path) as stage:
        (stage / "code").mkdir()
        (stage / "code" / "model.py").write_text("new")
        (stage / "model.safetensors").write_text("new")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["code/model.py", "model.safetensors", "notes.txt", "schedule-0.safetensors"]


@pytest.mark.parametrize("rewrite", [pack_saved, dequantize_saved])
def test_a_rewriting_that_stops_leaves_no_half_of_a_model(rewrite, tmp_path: Path, monkeypatch):
    """It left weights without what belongs beside them, which load; and the next one refused the directory."""
    source, target = tmp_path / "source", tmp_path / "target"
    quantized().save_pretrained(source)
    (source / "preprocessor_config.json").write_text("{}")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rewriting, "copy_files", stop)
        rewrite(str(source), target)
    assert not list(target.iterdir())
    (target / STAGE).mkdir()
    (target / STAGE / "model.safetensors").write_text("left by one that was killed")
    size = rewrite(str(source), target)
    names = {path.name for path in target.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert size == (target / "model.safetensors").stat().st_size
    load(target)

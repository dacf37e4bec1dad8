"""The picture of a training run."""

from __future__ import annotations

from matplotlib.figure import Figure
from PIL import Image

from hf_saq.hub import training_picture as curve_module
from hf_saq.hub.training_picture import curves, draw_training_curve

LOG = [
    {"loss": 2.5, "sharpness": 0.25, "step": 10},
    {"eval_loss": 2.25, "eval_top1": 0.125, "step": 10},
    {"loss": 1.5, "sharpness": 0.125, "step": 20},
    {"eval_loss": 1.25, "eval_top1": 0.375, "step": 20},
]


def test_curves():
    assert curves(LOG) == {
        "loss": {"training": [(10, 2.5), (20, 1.5)], "evaluation": [(10, 2.25), (20, 1.25)]},
        "accuracy": {"top-1": [(10, 0.125), (20, 0.375)]},
        "sharpness": {"of training steps": [(10, 0.25), (20, 0.125)]},
    }
    assert curves(LOG[:2]) == {}  # one point is no curve


def test_picture(tmp_path, monkeypatch):
    file = tmp_path / "curve.png"
    assert not draw_training_curve(LOG[:2], file) and not file.exists()
    assert draw_training_curve(LOG, file)
    picture = Image.open(file)
    assert picture.format == "PNG" and picture.size == (1200, 300)  # three panels
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 10  # something is drawn
    file.unlink()


def test_axes_begin_at_zero(tmp_path, monkeypatch):
    """A fall of the sharpness below zero is shown; accuracy goes up to one."""
    limits = {}
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: limits.update({a.get_title(): a.get_ylim() for a in self.axes})
    )
    log = [*LOG, {"sharpness": -0.5, "step": 30}]
    assert draw_training_curve(log, tmp_path / "curve.png")
    assert limits["loss"][0] == 0 and limits["accuracy"] == (0, 1) and limits["sharpness"][0] < -0.5


def test_without_matplotlib(tmp_path, monkeypatch):
    file = tmp_path / "curve.png"
    monkeypatch.setattr(curve_module, "find_spec", lambda name: None)  # as without matplotlib
    assert not draw_training_curve(LOG, file) and not file.exists()

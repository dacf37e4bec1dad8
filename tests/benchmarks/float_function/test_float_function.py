"""What conversion keeps of the float function: the script on a tiny model, and its claim on the real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

from benchmarks.float_function import measure as script

SHARED = Path(__file__).parents[4] / "shared" / "data"


def write_flowers(directory: Path, split: str, count: int) -> None:
    rng = np.random.default_rng(count)
    rows = {
        "image": [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(count)],
        "label": [i % 3 for i in range(count)],
    }
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b", "c"])})
    Dataset.from_dict(rows, features=features).to_parquet(str(directory / f"{split}-00000-of-00001.parquet"))


@pytest.fixture
def arguments(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_flowers(data, "train", 8)
    write_flowers(data, "test", 6)
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=5)
    MobileNetV2ForImageClassification(config).save_pretrained(tmp_path / "model")
    return [
        *("--data", str(data), "--weights", str(tmp_path / "model"), "--results", str(tmp_path / "results")),
        *("--document", str(tmp_path / "page.md"), "--images", "6", "--batch", "4", "--image_size", "32"),
        *("--small_image_size", "32", "--float_epochs", "1", "--epochs", "1"),
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*one weight scale for a whole tensor")
def test_a_run_and_what_a_restart_skips(arguments, tmp_path, monkeypatch):
    script.main(arguments)
    records = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(records) == {*map(script.file_name, script.CONVERSIONS), "training"}
    kept = records["a8"]["outcome"]
    page = (tmp_path / "page.md").read_text()
    assert f"| A8 | {kept['agreement']:.1f} | {kept['agreement with correct_biases']:.1f} |" in page
    before, after = (records["training"]["outcome"][f"QAT {moment}"] for moment in ("before", "after"))
    assert f"| QAT before training | {before[0]:.1f} | {before[1]:.1f} |" in page
    assert f"| QAT after training | {after[0]:.1f} | {after[1]:.1f} |" in page

    monkeypatch.setattr(script, "Conversion", None)  # a restart must not need it
    monkeypatch.setattr(script, "training", None)
    (tmp_path / "page.md").unlink()
    script.main(arguments)
    assert (tmp_path / "page.md").read_text() == page


def test_missing_data_is_named(arguments):
    with pytest.raises(SystemExit, match="absent is not a directory; name the data with --data"):
        script.main([*arguments, "--data", "absent"])


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "mobilenet_v2-imagenet").is_dir(), reason="needs the weights in ../shared/data")
@pytest.mark.skipif(not (SHARED / "flowers102").is_dir(), reason="needs the images in ../shared/data")
def test_eight_bit_weights_keep_the_real_models_function():
    arguments = script.FunctionArguments(
        data=str(SHARED / "flowers102"), weights=str(SHARED / "mobilenet_v2-imagenet"), images=300
    )
    outcome = script.Conversion(arguments).measure(script.CONVERSIONS["W8 per channel"])
    assert outcome["agreement with correct_biases"] >= 98

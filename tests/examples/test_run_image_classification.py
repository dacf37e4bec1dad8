"""The example script: its arguments, its data, and one whole small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_saq import data

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import image_model  # noqa: E402
import run_image_classification as script  # noqa: E402

SMALL = [
    "--float_epochs=1",
    "--num_train_epochs=1",
    "--max_train_samples=128",
    "--max_eval_samples=64",
    "--disable_tqdm=true",
    "--use_cpu",
]


@pytest.fixture
def folders(tmp_path):
    """`train` and `val` with two classes of six images."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("dark", "light")):
            directory = tmp_path / split / name
            directory.mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 100, (12, 12, 3)) + 120 * label
                Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{i}.png")
    return tmp_path


def test_the_default_run_end_to_end(tmp_path, capsys):
    rows = script.main([*SMALL, f"--output_dir={tmp_path}", "--weight_bits", "4", "2"])
    assert [(row.method, row.bits) for row in rows] == [
        ("float", "W32A32"),
        ("qat", "W4A4"),
        ("saq", "W4A4"),
        ("qat", "W2A2"),
        ("saq", "W2A2"),
    ]
    for row in rows[1:]:
        assert row.reloaded_top1 == row.top1  # what comes back from disk is what was measured
    sizes = [row.bytes for row in rows]
    assert sizes[0] > 4 * sizes[1] > 4 * sizes[3]
    table = capsys.readouterr().out
    assert "top-1 %" in table and "reloaded" in table
    assert (tmp_path / "results.txt").read_text().strip() in table
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5
    for stage in ("qat-w4a4", "saq-w2a2"):
        config = json.loads((tmp_path / stage / "config.json").read_text())
        assert config["quantization_config"]["storage"] == "packed"


def test_a_packed_checkpoint_is_evaluated_and_pushed_once(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(script.SAQTrainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/model"))

    def push(self, **_):
        pushed.append(self.args.hub_model_id)
        self.create_model_card()

    monkeypatch.setattr(script.SAQTrainer, "push_to_hub", push)
    rows = script.main([*SMALL, f"--output_dir={tmp_path}", "--weight_bits=4", "--methods=saq", "--push_to_hub"])
    assert pushed == [f"{tmp_path.name}-saq-w4a4"]
    packed = tmp_path / "saq-w4a4"
    card = (packed / "README.md").read_text()
    assert f"| float | W32A32 | {rows[0].top1:.4f} |" in card and f"| **SAQ** | W4A4 | {rows[1].top1:.4f} |" in card
    assert "on scikit-learn's digits (64 held-out images)" in card and "QAT" not in card
    arguments = [f"--model_name_or_path={packed}", "--do_train=false", f"--output_dir={tmp_path / 'again'}"]
    assert script.main([*SMALL, *arguments])[0].top1 == rows[-1].top1


def test_image_folders_and_a_pipeline(folders, tmp_path, capsys):
    from transformers import pipeline

    rows = script.main(
        [
            *SMALL,
            f"--train_dir={folders / 'train'}",
            f"--validation_dir={folders / 'val'}",
            f"--output_dir={tmp_path / 'out'}",
            "--do_train",
            "--image_size=8",
            "--methods=saq",
            "--rho=0.1",
            "--report_to=none",
            "--save_strategy=no",
        ]
    )
    assert rows[-1].reloaded_top1 == rows[-1].top1
    classify = pipeline("image-classification", model=str(tmp_path / "out" / "saq-w4a4"), device="cpu")
    answer = classify(Image.new("RGB", (12, 12)))
    assert {entry["label"] for entry in answer} == {"dark", "light"}
    check_what_is_left(tmp_path / "out", rows)
    said = capsys.readouterr().out
    assert f"It lies in {tmp_path / 'out' / 'saq-w4a4'}, with its image processor and a card (README.md)" in said
    assert f"Export it: hf-saq export {tmp_path / 'out' / 'saq-w4a4'} OUT" in said
    assert json.loads((tmp_path / "out" / "saq-w4a4" / "eval_results.json").read_text())["eval_samples"] == 12
    assert said.rstrip().endswith("Push it:   run again with --push_to_hub")


def check_what_is_left(output: Path, rows) -> None:
    """A card also without a push, and no empty directory."""
    assert {path.name for path in output.iterdir()} == {"float", "saq-w4a4", "results.txt", "results.json"}
    assert not [path for path in output.rglob("*") if path.is_dir() and not any(path.iterdir())]
    card = (output / "saq-w4a4" / "README.md").read_text()
    assert f"| float | W32A32 | {rows[0].top1:.4f} |" in card and f"| **SAQ** | W4A4 | {rows[1].top1:.4f} |" in card


def test_parquet_directory(folders, tmp_path):
    from datasets import load_dataset

    directory = tmp_path / "repository"
    directory.mkdir()
    (directory / "README.md").write_text("A data set, as it comes from the Hub.")
    images = load_dataset("imagefolder", data_dir=str(folders / "train"), split="train")
    images.to_parquet(directory / "train-00000-of-00001.parquet")
    splits = data.load_images(data.DataTrainingArguments(dataset_name=str(directory)), seed=0)
    assert splits["train"].features["label"].names == ["dark", "light"]
    assert len(splits["train"]) == 10 and len(splits["eval"]) == 2  # held out by train_val_split


def test_top_k_accuracy():
    """Against counting by hand."""
    scores = np.array([[0.1, 0.9, 0, 0, 0, 0], [0.9, 0.5, 0.4, 0.3, 0.2, 0.1], [1, 2, 3, 4, 5, 6]])
    labels = np.array([1, 4, 0])
    metric = data.TopKAccuracy(keep_in_memory=True)
    assert metric.compute(predictions=scores, references=labels) == {"top1": 1 / 3, "top5": 2 / 3}
    scores[0, 5] = np.nan  # sorting would put it last, and leave the first image right
    assert data.top_k(scores, labels) == {"top1": 0, "top5": 1 / 3}
    assert data.top_k(np.full((2, 3), np.nan), [0, 0]) == {"top1": 0, "top5": 0}


def test_timm_names():
    arguments = image_model.ModelArguments(model_name_or_path="resnet18", from_scratch=True)
    model = image_model.load_model(arguments, ["a", "b", "c"], None)
    assert type(model).__name__ == "TimmWrapperForImageClassification" and model.config.num_labels == 3
    assert image_model.timm_repository("resnet18").startswith("timm/resnet18")
    assert image_model.timm_repository("google/vit-base-patch16-224") == "google/vit-base-patch16-224"


@pytest.mark.parametrize(("there", "sizes"), [(5, [5]), (40, [32])])
def test_few_images_make_one_batch(there, sizes):
    """None was made of fewer than 32, and batch norms could not be refitted."""
    assert [len(batch) for batch in script.first_batches(list(range(there)))] == sizes


def test_refitting_folded_batch_norms_keeps_the_function():
    """The evaluation function stays (to float rounding), and training mode comes close to it."""
    import torch
    from tiny_models import mobilenet_v2

    model = mobilenet_v2()
    generator = torch.Generator().manual_seed(0)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.bias.data = torch.randn(norm.bias.shape, generator=generator)
        norm.running_mean.zero_()
        norm.running_var.fill_(0.999)
    assert image_model.has_folded_batch_norm(model)
    images = torch.randn(32, 3, 16, 16, generator=generator)
    with torch.no_grad():
        before = model.eval()(pixel_values=images).logits
        image_model.refit_batch_norm(model, [images])
        after = model.eval()(pixel_values=images).logits
        training = model.train()(pixel_values=images).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(training, before, atol=0.05, rtol=0.05)
    assert not image_model.has_folded_batch_norm(model)

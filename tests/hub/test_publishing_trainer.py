"""What `SAQTrainer` writes into model cards, without a Hub."""

from __future__ import annotations

import pytest
import torch
import yaml
from tiny_models import vit
from training import Images, arguments, quantized_model
from transformers import ViTImageProcessor

from hf_saq import SAQConfig, SAQTrainer, pack
from hf_saq.hub import ResultRow
from hf_saq.hub.run_facts import on_the_hub


def trainer_in(directory, model=None, saq_config=None, **changes) -> SAQTrainer:
    """Its top-1 is the number of evaluations so far: no two are alike."""
    evaluations: list[int] = []

    def compute_metrics(_):
        evaluations.append(1)
        return {"top1": float(len(evaluations))}

    return SAQTrainer(
        model if model is not None else quantized_model("vit", torch.float32),
        arguments(directory, **changes),
        saq_config=saq_config or SAQConfig(rho=0.1, schedule="full"),
        train_dataset=Images(12, torch.float32),
        eval_dataset=Images(4, torch.float32),
        compute_metrics=compute_metrics,
        processing_class=ViTImageProcessor(size={"height": 16, "width": 16}),
    )


def card(directory) -> tuple[dict, str]:
    text = (directory / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def top1(data: dict) -> float | None:
    metrics = data["model-index"][0]["results"][0]["metrics"] if "model-index" in data else []
    return next((metric["value"] for metric in metrics if metric["name"] == "top-1 accuracy"), None)


def test_a_metric_is_that_of_the_weights_as_they_are(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.train()
    trainer.create_model_card()
    assert top1(card(tmp_path)[0]) is None  # trained, not evaluated
    trainer.evaluate()
    trainer.create_model_card()
    assert top1(card(tmp_path)[0]) == 1.0
    trainer.evaluate(metric_key_prefix="test")  # of other data: not to be mistaken for the evaluation
    trainer.create_model_card()
    assert top1(card(tmp_path)[0]) == 1.0
    trainer.train()
    trainer.create_model_card()
    assert top1(card(tmp_path)[0]) is None


def test_the_metric_of_the_best_checkpoint_goes_with_its_weights(tmp_path):
    trainer = trainer_in(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="top1",
        greater_is_better=False,  # the first evaluation gave 1, the least
    )
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.global_step == 3
    trainer.create_model_card()
    assert top1(card(tmp_path)[0]) == 1.0


def test_the_number_of_images_is_that_of_the_metrics(tmp_path):
    """Predictions, and evaluations under another prefix, came after; their number stood beside these metrics."""
    trainer = trainer_in(tmp_path)
    trainer.evaluate()
    trainer.evaluate(Images(8, torch.float32), metric_key_prefix="test")
    trainer.predict(Images(12, torch.float32))
    trainer.create_model_card()
    assert "on its evaluation data (4 images)" in card(tmp_path)[1]


def test_several_data_sets(tmp_path):
    """What `Trainer` measures of time for each was listed among the metrics, with the number of images of the last."""
    trainer = trainer_in(tmp_path)
    trainer.eval_dataset = {"day": Images(8, torch.float32), "night": Images(4, torch.float32)}
    trainer.evaluate()
    trainer.create_model_card()
    data, text = card(tmp_path)
    metrics = {metric["name"] for metric in data["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"day_top1", "day_loss", "night_top1", "night_loss"}
    assert "Measured in the training run, on its evaluation data.\n" in text
    trainer.eval_dataset["day"] = Images(4, torch.float32)
    trainer.evaluate()
    trainer.create_model_card()
    assert "on its evaluation data (4 images)" in card(tmp_path)[1]


def test_classes_are_in_the_order_of_their_numbers(tmp_path):
    """`id2label[str(i)]`, as the guides of transformers write it: class 10 came before class 2."""
    model = quantized_model("vit", torch.float32)
    model.config.id2label = {str(number): f"kind {number}" for number in range(12)}
    trainer_in(tmp_path, model=model).create_model_card()
    assert f"## Classes\n\n{', '.join(f'kind {number}' for number in range(12))}\n" in card(tmp_path)[1]


def test_the_card_of_a_run(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.card_arguments = {
        "comparison": [ResultRow("float", "W32A32", {"eval_top1": 0.5})],
        "dataset": "digits (4 held-out images)",
        "finetuned_from": "someone/vit",
        "tags": "handwriting",
    }
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(finetuned_from="someone/else")  # what is passed wins
    data, text = card(tmp_path)
    assert data["base_model"] == "someone/else"
    assert {"quantized", "saq", "w4a4", "lsq", "handwriting"} <= set(data["tags"])
    assert "| float | W32A32 | 0.5000 |" in text and "| **SAQ** | W4A4 | 1.0000 |" in text
    size = (tmp_path / "model.safetensors").stat().st_size
    full = 4 * sum(p.numel() for p in vit().parameters())
    ratio = f"{full / 1024:,.1f} KiB | {size / 1024:,.1f} KiB | {full / size:.1f} x less"
    assert f"| weights on disk | {ratio} |" in text
    assert "on its evaluation data (4 images)" in text
    sharpness = [entry["sharpness"] for entry in trainer.state.log_history if "sharpness" in entry]
    assert f"first {sharpness[0]:.4g} at step 1, last {sharpness[-1]:.4g} at step 3." in text
    assert "- learning_rate: 0.0001\n" in text and "- rho: 0.1\n" in text
    assert (tmp_path / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "training_curve.png" in text
    assert (
        "bit operations" not in text.split("## Limitations")[0]
    )  # this run did not calibrate, so nothing counted them
    assert f'model="{tmp_path.name}"' in text


@pytest.mark.parametrize(("logging_steps", "case"), [(1, None), (500, 3)])
def test_bit_operations_of_a_run_that_calibrates(logging_steps, case, tmp_path):
    """Also of a run that ends before its first line of the log is due. Its radius and schedule are those it used."""
    from tiny_models import images

    from hf_saq import SAQQuantizationConfig, cost

    trainer = SAQTrainer(
        vit(),
        arguments(tmp_path, logging_steps=logging_steps),
        saq_config=SAQConfig(case=case),
        quantization_config=SAQQuantizationConfig(),
        train_dataset=Images(12, torch.float32),
    )
    trainer.train()
    trainer.create_model_card()
    expected = cost(trainer.model, {"pixel_values": images(1)})
    text = card(tmp_path)[1]
    assert (
        f"| {expected.float_bops:,} | {expected.bops:,} | {expected.float_bops / expected.bops:.1f} x less |" in text
    )
    if case is None:
        assert "trained with QAT" in text and "Sharpness (" not in text and "- rho" not in text
    else:
        assert "- rho: 0.1\n" in text and "- interval: 1\n" in text and "- ascent_fraction: 0.125\n" in text
    assert "weights on disk" not in text  # nothing was saved


def test_a_float_model_gets_the_card_of_transformers(tmp_path):
    trainer = trainer_in(tmp_path, model=vit(), saq_config=SAQConfig(case=None))
    trainer.card_arguments = {"comparison": [ResultRow("x", "", {"top1": 1.0})]}
    trainer.create_model_card()
    data, text = card(tmp_path)
    assert "generated_from_trainer" in data["tags"] and "saq" not in data["tags"]
    assert "hf_saq" not in text


@pytest.mark.parametrize("name", ["resnet18", "google/vit-base-patch16-224"])
def test_names_that_can_be_on_the_hub(name):
    assert on_the_hub(name) == name


def test_names_that_cannot_be_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "float").mkdir(parents=True)
    for name in ("", None, "outputs/float", "../data/model", "/data/model", "a/b/c", str(tmp_path)):
        assert on_the_hub(name) is None, name


def test_models_carry_their_tags():
    """`model.push_to_hub` of transformers writes them into the card it makes."""
    model = quantized_model("vit", torch.float32)
    assert pack(model).model_tags == model.model_tags == ["quantized", "saq", "w4a4", "lsq"]

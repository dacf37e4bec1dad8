"""Model cards: what is known is there, what is not known is not, and no number is of other origin."""

from __future__ import annotations

import re
from functools import cache

import pytest
import yaml
from tiny_models import vit

from hf_saq import SAQQuantizationConfig, quantize
from hf_saq.hub.card import model_card
from hf_saq.hub.card_facts import CardFacts, ResultRow, measured
from hf_saq.installing import how_to_install


def facts(**changes) -> CardFacts:
    known = dict(name="a-model", architecture="ViTForImageClassification", config=SAQQuantizationConfig())
    return CardFacts(**{**known, **changes})


@cache
def quantized_model():
    return quantize(vit(), SAQQuantizationConfig(weight_bits=3, activation_bits=5, modules_to_not_convert=["*.fc1"]))


def full_facts(**changes) -> CardFacts:
    model = quantized_model()
    known = dict(
        config=model.config.quantization_config.replace(storage="packed"),
        layers=model.quantization_report.layers,
        load_from="me/a-model",
        has_processor=True,
        weight_bytes=20480,
        metrics={"eval_loss": 1.5, "eval_top1": 0.8125, "eval_top5": 0.9375, "eval_runtime": 7.75, "epoch": 3.0},
        comparison=[
            ResultRow("float", "W32A32", {"eval_top1": 0.875}, 40960),
            ResultRow("never evaluated", "W2A2", {"eval_runtime": 6.5}, 999),
        ],
        method="SAQ (case 3)",
        float_weight_bytes=61440,
        bit_operations=123456,
        float_bit_operations=1234560,
        evaluated_images=450,
        labels=["tulip", "rose"],
        sharpness=[(10, 0.25), (20, 0.125)],
        hyperparameters={"learning_rate": 0.001, "optimizer": "one\nline"},
        base_model="google/vit-base-patch16-224",
        datasets=["uoft-cs/cifar10"],
        license="apache-2.0",
        tags=["mine", "saq"],
    )
    return facts(**{**known, **changes})


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, its first line too."""
    lines = text.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [rows[0], *rows[2:]]


def test_metadata():
    data = metadata(str(model_card(full_facts())))
    results = data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "base_model": "google/vit-base-patch16-224",
        "datasets": ["uoft-cs/cifar10"],
        "license": "apache-2.0",
        "tags": ["quantized", "saq", "w3a5", "lsq", "mine"],
        "metrics": ["accuracy", "loss"],
    }
    assert results == [
        {
            "name": "a-model",
            "results": [
                {
                    "task": {"type": "image-classification"},
                    "dataset": {"type": "uoft-cs/cifar10", "name": "uoft-cs/cifar10"},
                    "metrics": [
                        {"type": "accuracy", "name": "top-1 accuracy", "value": 0.8125},
                        {"type": "accuracy", "name": "top-5 accuracy", "value": 0.9375},
                        {"type": "loss", "name": "loss", "value": 1.5},
                    ],
                }
            ],
        }
    ]


def test_the_table_has_the_rows_that_were_measured():
    assert table(str(model_card(full_facts())), "Results") == [
        ["method", "bits", "top-1 accuracy", "top-5 accuracy", "loss", "weights on disk"],
        ["float", "W32A32", "0.8750", "", "", "40.0 KiB"],
        ["**SAQ**", "W3A5", "0.8125", "0.9375", "1.5000", "20.0 KiB"],
    ]


def test_bits_are_counted_per_layer():
    """A ViT of two layers: each has four projections of its attention and two of its MLP, one of which is left out."""
    assert table(str(model_card(full_facts())), "Quantization")[:4] == [
        ["weight bits", "activation bits", "layers", "left in float because"],
        ["8", "8", "2", ""],
        ["3", "5", "10", ""],
        ["float", "float", "2", "listed in modules_to_not_convert"],
    ]


def test_ratios_to_float():
    """Three times fewer bytes, ten times fewer operations; a side that is not known is left empty."""
    both = table(str(model_card(full_facts())), "Quantization")[4:]
    assert [row for row in both if set(row) != {"---"}] == [
        ["", "float32", "this model", "ratio"],
        ["weights on disk", "60.0 KiB", "20.0 KiB", "3.0 x less"],
        ["bit operations for one image", "1,234,560", "123,456", "10.0 x less"],
    ]
    alone = str(model_card(facts(bit_operations=7)))
    assert "| bit operations for one image | 7 |" in alone and "weights on disk" not in alone


def test_text():
    text = str(model_card(full_facts()))
    assert "Bit operations are multiply-accumulates x weight bits x activation bits." in text
    assert "Measured in the training run, on its evaluation data (450 images)." in text
    assert "first 0.25 at step 10, last 0.125 at step 20." in text
    details = re.findall(r"<details>\n<summary>(.*?)</summary>\n\n(.*?)\n\n</details>", text, flags=re.DOTALL)
    assert details == [("Hyperparameters", "- learning_rate: 0.001\n- optimizer: one line")]
    assert "## Classes\n\ntulip, rose\n" in text and "inputs unlike those are cut off" in text
    assert "```bibtex\n@article{liu2021" in text and "arXiv:2111.12273" in text.split("```bibtex")[1]
    assert "landscape.png" not in text
    assert "![Loss around the weights](landscape.png)" in str(model_card(full_facts(has_landscape=True)))
    assert "<summary>30 classes</summary>" in str(model_card(full_facts(labels=[f"kind {k}" for k in range(30)])))
    assert "[google/vit-base-patch16-224](https://huggingface.co/google/vit-base-patch16-224)" in text
    assert "training_curve.png" not in text
    assert "![Loss and metrics over training](training_curve.png)" in str(model_card(full_facts(has_picture=True)))


def test_what_is_not_known_is_not_there():
    """Of numbers there remain the version, the bits of the configuration and those of the paper."""
    text = str(model_card(facts()))
    assert set(metadata(text)) == {"library_name", "pipeline_tag", "tags"}
    assert re.findall("^## (.*)", text, flags=re.MULTILINE) == ["Limitations", "Citation"]
    assert "How good this model is was not measured" in text
    text = text.split("## Citation")[0]
    numbers = re.findall(r"\d+(?:\.\d+)*", text.replace("w4a4", "").replace("W4A4", ""))
    assert numbers == ["0.1.0"]


def test_every_result_in_a_card_was_given():
    """Change one measurement: the cells and the metadata that show it change, nothing else does."""
    one = str(model_card(full_facts()))
    other = str(model_card(full_facts(metrics={**full_facts().metrics, "eval_top1": 0.4375})))
    assert other.count("0.4375") == 2 and one.count("0.8125") == 2
    assert one.replace("0.8125", "0.4375") == other


def test_only_finite_measurements_count():
    found = measured({"eval_loss": float("nan"), "eval_top1": 1, "eval_note": "x", "eval_ok": True, "eval_runtime": 2})
    assert found == {"top1": 1.0}
    assert "model-index" not in metadata(str(model_card(facts(metrics={"eval_loss": float("inf")}))))


def test_any_name_of_a_metric_leaves_the_table_a_table():
    text = str(model_card(facts(metrics={"eval_f1|macro\nof all": 0.5})))
    assert "| method | bits | f1\\|macro of all |\n| --- | --- | --- |\n" in text
    assert metadata(text)["metrics"] == ["f1|macro\nof all"]


@pytest.mark.parametrize("has_processor", [True, False])
def test_snippet(has_processor: bool):
    text = str(model_card(full_facts(has_processor=has_processor, revision="v1")))
    snippet = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippet) == 1
    compile(snippet[0], "README.md", "exec")
    assert snippet[0].startswith(f"# {how_to_install()}\nimport hf_saq")
    assert '"me/a-model", revision="v1")' in snippet[0]
    assert ("pipeline(" in snippet[0]) == has_processor
    assert "```python" not in str(model_card(full_facts(load_from=None)))


@pytest.mark.parametrize(
    ("architecture", "task", "with_processor", "without"),
    [
        (
            "SegformerForSemanticSegmentation",
            "image-segmentation",
            'run = pipeline("image-segmentation", model="me/x")',
            'SegformerForSemanticSegmentation.from_pretrained("me/x")',
        ),
        (
            "CLIPModel",  # its pipeline asks for words as well
            "zero-shot-image-classification",
            'CLIPModel.from_pretrained("me/x")',
            'CLIPModel.from_pretrained("me/x")',
        ),
        (
            "DeiTForImageClassificationWithTeacher",
            "image-classification",
            'classify = pipeline("image-classification", model="me/x")',
            'AutoModelForImageClassification.from_pretrained("me/x")',
        ),
        (
            "VideoMAEForVideoClassification",
            "video-classification",
            'VideoMAEForVideoClassification.from_pretrained("me/x")',
            'VideoMAEForVideoClassification.from_pretrained("me/x")',
        ),
        (
            "ViTMAEForPreTraining",  # which is no task on the Hub
            None,
            'ViTMAEForPreTraining.from_pretrained("me/x")',
            'ViTMAEForPreTraining.from_pretrained("me/x")',
        ),
        (
            "Dinov2Backbone",
            None,
            'Dinov2Backbone.from_pretrained("me/x")',
            'Dinov2Backbone.from_pretrained("me/x")',
        ),
        (
            "ClassifierOfMyOwn",
            "image-classification",
            'classify = pipeline("image-classification", model="me/x")',
            'AutoModelForImageClassification.from_pretrained("me/x")',
        ),
    ],
)
def test_the_task_is_that_of_the_class(architecture: str, task: str | None, with_processor: str, without: str):
    """Cards of segmentation models, later of videos and backbones, said image classification, with code that fails."""
    for has_processor, expected in ((True, with_processor), (False, without)):
        card = model_card(
            CardFacts(
                name="x",
                architecture=architecture,
                config=None,
                load_from="me/x",
                has_processor=has_processor,
                metrics={"eval_accuracy": 0.5},
            )
        )
        assert expected in card.text
        assert card.data.pipeline_tag == task and card.data.eval_results[0].task_type == (task or "other")

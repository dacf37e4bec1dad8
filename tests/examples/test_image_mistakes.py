"""What the example script says of names and directories that are wrong, or of a checkpoint of another run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import save_file
from tiny_models import IMAGE_SIZE, NUM_LABELS, vit
from transformers import (
    AutoConfig,
    Dinov2Config,
    Dinov2ForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainingArguments,
)

from hf_saq import SAQQuantizationConfig, quantize

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_image_classification as script  # noqa: E402
import run_image_classification_no_trainer as loop  # noqa: E402
from image_mistakes import check_is_float, check_names  # noqa: E402
from image_model import ModelArguments, load_model, load_processor  # noqa: E402

from hf_saq.data import DataTrainingArguments, load_images  # noqa: E402


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("model_name_or_path", "outputs/nowhere/vit"),
        ("model_name_or_path", "./vit"),
        ("model_name_or_path", "{}/vit"),
        ("dataset_name", "{}/images"),
        ("dataset_name", "data/images/"),
        ("train_dir", "train"),
        ("validation_dir", "val"),
        ("image_processor_name", "{}/vit"),
    ],
)
def test_a_directory_that_is_not_there(flag, name, tmp_path, capsys):
    """It says so, and nobody asks the Hub; one line ends the program."""
    name = name.format(tmp_path)
    data = [] if flag in ("dataset_name", "train_dir", "validation_dir") else ["--train_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        script.main([f"--{flag}", name, *data, "--do_train", "--use_cpu", f"--output_dir={tmp_path / 'out'}"])
    said = str(stopped.value)
    assert f"--{flag} {name!r}: there is no such directory." in said and "\n" not in said
    assert "Hub" not in said or flag == "model_name_or_path"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("looped", [False, True], ids=["trainer", "no trainer"])
def test_held_out_images_are_no_training_images(looped, tmp_path):
    """One line says so. For an evaluation they are enough."""
    held_out = tmp_path / "val"
    for name in ("cat", "dog"):
        (held_out / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(held_out / name / "1.png")
    given = [f"--validation_dir={held_out}", f"--output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        (loop.main if looped else script.main)(given if looped else [*given, "--do_train", "--use_cpu"])
    assert str(stopped.value) == (
        "error while loading the images: there are no images to train on; the data has the splits ['validation']. "
        "Give --train_dir."
    )
    if not looped:
        (row,) = script.main([*given, "--do_eval", "--use_cpu", "--report_to=none"])
        assert 0 <= row.top1 <= 1


def test_splits_without_one_to_train_on(tmp_path):
    rows = {"image": [Image.new("L", (8, 8))] * 4, "label": ["cat", "dog"] * 2}
    data = Dataset.from_dict(rows, features=Features({"image": ImageFeature(), "label": Value("string")}))
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "few-00000-of-00001.parquet")
    args = DataTrainingArguments(dataset_name=str(tmp_path))
    with pytest.raises(ValueError, match=r"no images to train on; .* splits \['few'\]\. Name one or more"):
        load_images(args, seed=0)


def test_a_name_beside_a_directory_is_a_path(tmp_path, monkeypatch):
    """`outputs/vit` can be a name on the Hub, unless there is a directory `outputs`."""
    monkeypatch.chdir(tmp_path)
    check_names(ModelArguments(model_name_or_path="outputs/vit"))
    (tmp_path / "outputs").mkdir()
    with pytest.raises(ValueError, match="--model_name_or_path 'outputs/vit': there is no such directory. Expected a"):
        check_names(ModelArguments(model_name_or_path="outputs/vit"))


def test_directories_that_are_no_model(tmp_path):
    def check(path):
        check_names(ModelArguments(model_name_or_path=str(path)))

    with pytest.raises(ValueError, match="has no config.json; expected what save_pretrained or save_model wrote"):
        check(tmp_path)
    (tmp_path / "saq-w4a4").mkdir()
    (tmp_path / "saq-w4a4" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no config.json; did you mean '.*saq-w4a4'"):
        check(tmp_path)
    check(tmp_path / "saq-w4a4")
    with pytest.raises(ValueError, match="is a file; expected the directory that holds config.json"):
        check(tmp_path / "saq-w4a4" / "config.json")


def test_a_model_that_cannot_be_had(monkeypatch):
    with pytest.raises(
        ValueError, match="'resnet1' is no directory here, and could not be had (.|\\n)* Did you mean timm's 'resnet1"
    ):
        load_model(ModelArguments(model_name_or_path="resnet1"), ["a", "b"], None)


@pytest.mark.parametrize(
    ("overrides", "message"), [("{x", "--config_overrides '{x' is not JSON"), ("3", "'3'; expected fields, as in")]
)
def test_config_overrides_that_are_none(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_model(ModelArguments(model_name_or_path="vit", config_overrides=overrides), ["a", "b"], None)


@pytest.mark.parametrize("named", [True, False], ids=["a model", "the small one"])
def test_config_overrides_of_fields_that_are_none(named, tmp_path):
    """transformers leaves them out, and training went on without what was asked for."""
    vit().save_pretrained(tmp_path)
    name = str(tmp_path) if named else None
    wrong = ModelArguments(model_name_or_path=name, config_overrides='{"hidden_droput_prob": 0.1}')
    with pytest.raises(
        ValueError, match=r"ViTConfig has no field 'hidden_droput_prob'\. Did you mean 'hidden_dropout"
    ):
        load_model(wrong, ["a", "b"], IMAGE_SIZE)
    right = ModelArguments(model_name_or_path=name, config_overrides='{"hidden_dropout_prob": 0.1}')
    assert load_model(right, ["a", "b"], IMAGE_SIZE).config.hidden_dropout_prob == 0.1


def test_an_image_size_that_the_stored_position_embeddings_are_not_made_for(tmp_path):
    """They would be random: only a head may be new. Models that fit them to each image keep them."""
    vit().save_pretrained(tmp_path / "vit")
    given = ModelArguments(model_name_or_path=str(tmp_path / "vit"))
    with pytest.raises(
        ValueError, match=r"its vit\.embeddings\.position_embeddings has the shape \(1, \d+, \d+\), and"
    ):
        load_model(given, ["a", "b"], 2 * IMAGE_SIZE)
    assert load_model(given, ["a", "b"], IMAGE_SIZE).num_labels == 2
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, num_labels=3
    )
    stored = Dinov2ForImageClassification(config)
    stored.save_pretrained(tmp_path / "dino")
    given = ModelArguments(model_name_or_path=str(tmp_path / "dino"))
    model = load_model(given, ["a", "b"], 32)
    torch.testing.assert_close(
        model.dinov2.embeddings.position_embeddings, stored.dinov2.embeddings.position_embeddings, rtol=0, atol=0
    )
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2)


def test_a_processor_that_was_named_is_not_replaced_by_a_default(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path)
    arguments = ModelArguments(model_name_or_path=str(tmp_path), image_processor_name="nobody/nothing")
    with pytest.raises(OSError, match="nobody/nothing"):
        load_processor(arguments, model, None)


def test_a_model_without_its_processor_gets_images_of_its_own_size(tmp_path):
    """That of its family makes 224 pixels."""
    model = vit()
    model.save_pretrained(tmp_path)
    processor = load_processor(ModelArguments(model_name_or_path=str(tmp_path)), model, None)
    assert dict(processor.size) == {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


@pytest.mark.parametrize("count", [NUM_LABELS - 1, NUM_LABELS + 1])
def test_another_number_of_classes_is_no_warning(count, tmp_path, caplog, monkeypatch):
    """Names of the stored configuration are replaced, with a new head."""
    name = "transformers.configuration_utils"
    monkeypatch.setattr(logging.getLogger(name), "handlers", [caplog.handler])
    model = vit()
    model.config.id2label = {k: f"old {k}" for k in range(NUM_LABELS)}
    model.save_pretrained(tmp_path)
    labels = [f"class {k}" for k in range(count)]
    with caplog.at_level(logging.WARNING, logger=name):  # tests are silent otherwise
        model = load_model(ModelArguments(model_name_or_path=str(tmp_path)), labels, None)
    assert model.classifier.out_features == model.config.num_labels == count
    assert list(model.config.id2label.values()) == labels and model.config.label2id["class 1"] == 1
    assert not [record for record in caplog.records if record.name == name]


def test_names_of_classes_of_a_saved_timm_model_are_replaced_for_good(tmp_path):
    config = TimmWrapperConfig(architecture="test_resnet", num_labels=3, pretrained_cfg={"input_size": [3, 32, 32]})
    TimmWrapperForImageClassification(config).save_pretrained(tmp_path / "own")
    model = load_model(ModelArguments(model_name_or_path=str(tmp_path / "own")), ["ant", "bee"], None)
    model.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").id2label == {0: "ant", 1: "bee"}


def stage_with_checkpoints(directory: Path, *steps: int) -> Path:
    """As far as `last_complete_checkpoint` looks."""
    for step in steps:
        checkpoint = directory / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
        save_file({"x": torch.zeros(1)}, checkpoint / "model.safetensors")
    return directory


def test_which_checkpoint_each_stage_goes_on_from(tmp_path):
    """The newest one of each, or the one that is named, for its stage alone; or the run stops with one line."""
    stages = ["float", "qat-w4a4", "saq-w4a4"]
    for stage in ("float", "saq-w4a4"):
        stage_with_checkpoints(tmp_path / stage, 2, 10)
    named = str(tmp_path / "saq-w4a4" / "checkpoint-2")

    def found(asked):
        args = TrainingArguments(str(tmp_path), use_cpu=True)
        args.resume_from_checkpoint = asked
        script.check_resume(args, stages)
        return [script.checkpoint_of_stage(script.stage_arguments(args, stage)) for stage in stages]

    newest = [str(tmp_path / stage / "checkpoint-10") for stage in stages]
    assert found(True) == [newest[0], None, newest[2]]
    assert found(named) == [None, None, named]
    assert found(None) == [None, None, None]
    elsewhere = str(stage_with_checkpoints(tmp_path / "saq-w2a2", 2) / "checkpoint-2")
    message = f"--resume_from_checkpoint {elsewhere!r} lies in the directory of no stage of this run; expected one in "
    with pytest.raises(ValueError) as stopped:
        found(elsewhere)
    assert str(stopped.value).startswith(message + str(tmp_path / "float"))


def test_training_from_a_quantized_model():
    float_model = vit()
    check_is_float(float_model, "x")
    model = quantize(float_model, SAQQuantizationConfig())
    with pytest.raises(ValueError, match="--model_name_or_path 'out/saq-w4a4' is quantized already; training starts"):
        check_is_float(model, "out/saq-w4a4")

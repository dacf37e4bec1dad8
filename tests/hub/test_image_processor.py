"""Models leave with their image processor: the one given, that of the base model, or a warning that says how."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tiny_models import IMAGE_SIZE, vit
from training import arguments
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
)

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, quantize
from hf_saq.hub.card import write_card
from hf_saq.hub.image_processor import processor_of_base_model
from hf_saq.storage.saved_directory import has_processor, load_saved

CONFIG = SAQQuantizationConfig(weight_bits=4, activation_bits=None, scale_init="mean")


def processor(size: int = IMAGE_SIZE) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[0.1, 0.2, 0.3])


def base_model(directory: Path, size: int | None = IMAGE_SIZE) -> Path:
    vit().save_pretrained(directory)
    if size is not None:
        processor(size).save_pretrained(directory)
    return directory


def save(directory: Path, model, **given) -> Path:
    """Without training: nothing of it is asked for here."""
    trainer = SAQTrainer(model, arguments(directory), saq_config=SAQConfig(case=None), **given)
    trainer.save_model()
    return directory


def loaded(directory: Path):
    return AutoModelForImageClassification.from_pretrained(directory, quantization_config=CONFIG)


def test_it_comes_from_the_base_model(tmp_path, caplog):
    saved = save(tmp_path / "out", loaded(base_model(tmp_path / "base")))
    assert list(AutoImageProcessor.from_pretrained(saved).image_mean) == [0.1, 0.2, 0.3]
    assert "image processor" not in caplog.text


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_model_of_images_and_text_gets_its_tokenizer_too(has_tokenizer, tmp_path):
    """Pipelines of CLIP had no tokenizer, and nothing had said so."""
    tower = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = dict(**tower, vocab_size=4, max_position_embeddings=8, bos_token_id=2, eos_token_id=3)
    config = CLIPConfig(text_config=text, vision_config=dict(**tower, image_size=8, patch_size=4))
    CLIPModel(config).save_pretrained(tmp_path / "base")
    images = CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3])
    words = CLIPTokenizer({"a": 0, "a</w>": 1, "<s>": 2, "</s>": 3}, [], bos_token="<s>", eos_token="</s>")
    (CLIPProcessor(images, words) if has_tokenizer else images).save_pretrained(tmp_path / "base")
    saved = save(tmp_path / "out", CLIPModel.from_pretrained(tmp_path / "base", quantization_config=CONFIG))
    assert list(AutoImageProcessor.from_pretrained(saved).image_mean) == [0.1, 0.2, 0.3]
    if has_tokenizer:
        assert CLIPProcessor.from_pretrained(saved).tokenizer("a")["input_ids"] == words("a")["input_ids"]


def test_the_one_that_is_given_wins(tmp_path):
    given = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3)
    saved = save(tmp_path / "out", loaded(base_model(tmp_path / "base")), processing_class=given)
    assert AutoImageProcessor.from_pretrained(saved).size["height"] == 8


@pytest.mark.parametrize("size", [None, 2 * IMAGE_SIZE], ids=["the base has none", "another size"])
def test_a_save_without_it_warns_once_and_says_how(size, tmp_path, caplog):
    model = loaded(base_model(tmp_path / "base", size))
    trainer = SAQTrainer(model, arguments(tmp_path / "out"), saq_config=SAQConfig(case=None))
    with caplog.at_level(logging.WARNING):
        trainer.save_model()
        trainer.save_model()
    (said,) = (record.getMessage() for record in caplog.records if "image processor" in record.getMessage())
    assert said.startswith(f"{tmp_path / 'out'} was saved without an image processor, so that no pipeline can be made")
    assert (
        f"processing_class=processor to the trainer, or call processor.save_pretrained({str(tmp_path / 'out')!r})"
        in said
    )
    assert not has_processor(tmp_path / "out")


def test_a_model_from_nowhere_asks_nobody(tmp_path, monkeypatch):
    asked = []

    def from_pretrained(name, **settings):
        asked.append((name, settings))
        raise OSError("not here")

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", from_pretrained)
    model = quantize(vit(), CONFIG)
    assert processor_of_base_model(model) is None and not asked
    model.config._name_or_path = "google/vit-base-patch16-224"
    assert processor_of_base_model(model) is None
    assert asked == [("google/vit-base-patch16-224", {"revision": None, "local_files_only": True})]


def test_checkpoints_and_float_models_do_not_warn(tmp_path, caplog):
    trainer = SAQTrainer(quantize(vit(), CONFIG), arguments(tmp_path / "out"), saq_config=SAQConfig(case=None))
    trainer.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    save(tmp_path / "float", vit())
    assert "image processor" not in caplog.text


def test_that_of_timm_is_in_the_configuration(tmp_path, caplog):
    """No file and no warning; it is found all the same, so the card opens the model as a pipeline."""
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
        num_labels=3,
        pretrained_cfg={"input_size": [3, 16, 16]},
    )
    model = quantize(TimmWrapperForImageClassification(config), CONFIG)
    directory = save(tmp_path / "out", model)
    assert "image processor" not in caplog.text and has_processor(directory)
    _, processor = load_saved(str(directory))
    assert processor.data_config["input_size"] == (3, 16, 16)
    assert "pipeline(" in write_card(directory).read_text()
    assert not has_processor(tmp_path)

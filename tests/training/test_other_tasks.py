"""What is no plain classification: segmentation, masked images, captions, losses of pairs or with parameters."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import datasets
import numpy as np
import pytest
import torch
from tiny_models import images
from torch import nn
from training import BATCH, Images, arguments, quantized_model
from transformers import (
    GPT2Config,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForMaskedImageModeling,
)

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, calibrate, parameter_groups, quantize

CONFIG = SAQQuantizationConfig(weight_bits=4, activation_bits=4)
VIT = dict(
    image_size=16, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)
CLASSES, VOID = 4, 255


class InOrder(SAQTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


# Segmentation --------------------------------------------------------------------------------------------------------


def segformer() -> nn.Module:
    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=CLASSES,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
    )
    return SegformerForSemanticSegmentation(config)


def maps(counted: tuple[int, ...], seed: int = 3) -> list[dict]:
    """Images with a map of classes each, of which so many rows of pixels are not void."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for pixels, count in zip(images(len(counted)), counted, strict=True):
        labels = torch.randint(0, CLASSES, pixels.shape[1:], generator=generator)
        labels[count:] = VOID
        rows.append({"pixel_values": pixels, "labels": labels})
    return rows


def test_micro_batches_of_maps_count_by_the_pixels_that_are_not_void(tmp_path):
    """A step of gradient descent against the mean over all pixels that have a class: voids are 255 here, not -100."""
    rows = maps((16, 16, 2, 3))
    model = quantize(segformer(), CONFIG)
    calibrate(model, [{"pixel_values": row["pixel_values"][None]} for row in rows])
    plain = copy.deepcopy(model).train()
    for norm in (m for net in (model, plain) for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.train = lambda mode=True: None  # two micro-batches normalize apart
        norm.training = False
    how = arguments(
        tmp_path, max_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=2, learning_rate=1.0
    )
    config = SAQConfig(rho=0.0, schedule="full", scale_lr_ratio=1.0)
    InOrder(model, how, saq_config=config, train_dataset=rows).train()
    pixels, labels = (torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels"))
    plain(pixel_values=pixels, labels=labels).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.detach() - q, p.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_void_is_not_the_class_that_is_missing(tmp_path):
    rows = maps((16, 16))
    rows[1]["labels"][0, 0] = CLASSES
    trainer = SAQTrainer(
        segformer(),
        arguments(tmp_path, max_steps=1),
        saq_config=SAQConfig(case=None),
        quantization_config=CONFIG,
        train_dataset=[{**row, "labels": row["labels"].flip(0)} for row in maps((3, 5))[:1] + rows[1:]],
    )
    with pytest.raises(ValueError, match=f"has the label {CLASSES}; the model has {CLASSES} classes"):
        trainer.train()


# Models that classify nothing ----------------------------------------------------------------------------------------


def pictures_with_classes() -> datasets.Dataset:
    """Six images of six classes, as a data set for classification has them."""
    names = [f"flower {k}" for k in range(6)]
    features = datasets.Features(
        {"image": datasets.Array3D((3, 16, 16), "float32"), "label": datasets.ClassLabel(names=names)}
    )
    return datasets.Dataset.from_dict({"image": images(6).numpy(), "label": list(range(6))}, features=features)


def test_masked_images_of_a_data_set_for_classification(tmp_path):
    """The transform leaves labels out, and the model has no classes: it was told to have as many."""

    def masked(rows):
        pixels = [torch.tensor(np.array(image)) for image in rows["image"]]
        return {"pixel_values": pixels, "bool_masked_pos": [torch.arange(16) % 2 == 0 for _ in pixels]}

    trainer = SAQTrainer(
        ViTForMaskedImageModeling(ViTConfig(**VIT, encoder_stride=4)),
        arguments(tmp_path, max_steps=1, remove_unused_columns=True),
        saq_config=SAQConfig(rho=0.1, schedule="full"),
        quantization_config=CONFIG,
        train_dataset=pictures_with_classes().with_transform(masked),
    )
    trainer.train()
    assert trainer.state.log_history[0]["ascent_norm"] > 0


def test_captions_of_a_data_set_for_classification(tmp_path):
    """Labels are tokens there; what the configuration calls `num_labels` is nothing."""
    decoder = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VIT), decoder)
    config.decoder_start_token_id = config.pad_token_id = 0

    def captioned(rows):
        pixels = [torch.tensor(np.array(image)) for image in rows["image"]]
        return {"pixel_values": pixels, "labels": [torch.tensor([10 + label, 1]) for label in rows["label"]]}

    def trainer_of(make):
        return SAQTrainer(
            VisionEncoderDecoderModel(config),
            arguments(tmp_path, max_steps=1, remove_unused_columns=True),
            saq_config=SAQConfig(case=None),
            quantization_config=CONFIG,
            train_dataset=pictures_with_classes().with_transform(make),
        )

    trainer_of(captioned).train()
    with pytest.raises(IndexError):  # a token that the decoder has not, which is no matter of classes
        trainer_of(lambda rows: {**captioned(rows), "labels": [torch.tensor([99, 1]) for _ in rows["label"]]}).train()


# Losses over whole batches -------------------------------------------------------------------------------------------


def pulls_together(outputs, labels, num_items_in_batch=None):  # noqa: ARG001
    """Supervised contrastive loss: an image without another of its class in the batch has none, and 0 / 0 is NaN."""
    z = nn.functional.normalize(outputs.logits)
    itself = torch.eye(len(z), dtype=torch.bool)
    log_p = (z @ z.T).masked_fill(itself, -1e9).log_softmax(dim=1)
    same = (labels[:, None] == labels) & ~itself
    return -((log_p * same).sum(dim=1) / same.sum(dim=1)).mean()


@pytest.mark.parametrize(("knobs", "is_told"), [(dict(), True), (dict(schedule="full"), False)], ids=str)
def test_a_loss_that_a_part_of_a_batch_does_not_have(knobs, is_told, tmp_path):
    """The default schedule takes the first images, of which no two are of one class: nothing was ever perturbed."""
    data = Images(8, torch.float32)
    data.labels = torch.arange(8) % 2
    trainer = InOrder(
        quantized_model("vit", torch.float32),
        arguments(tmp_path, max_steps=21),
        saq_config=SAQConfig(rho=0.1, **knobs),
        train_dataset=data,
        compute_loss_func=pulls_together,
    )
    message = r"gradient that the last 20 perturbations were to be made of is nan: a loss may need more images .*full"
    with pytest.warns(UserWarning, match=message) if is_told else nullcontext():
        trainer.train()
    assert trainer.state.log_history[-2]["skipped_perturbations"] == (21 if is_told else 0)


# Losses with parameters of their own, such as a margin head or a learned temperature ---------------------------------

DATA = Images(2 * BATCH, torch.float32)
KNOBS = [
    dict(schedule="full"),
    dict(schedule="full", sync="global"),
    dict(schedule="balanced"),
    dict(trigger=True),
    dict(ascent_depth=0.5),
    dict(ascent_fraction=0.5, match_radius=True),
    dict(reuse="previous"),
]


class Temperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_logits = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs, labels, num_items_in_batch=None):  # noqa: ARG002
        return nn.functional.cross_entropy(outputs.logits * self.of_logits, labels)


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
def test_they_get_the_gradient_of_one_pass(knobs, tmp_path):
    """One step of gradient descent with a radius of zero, against its gradient: it was twice as long, as both passes
    left theirs, or that of a part of the batch as well."""
    loss, model = Temperature(), quantized_model("vit", torch.float32)
    plain = copy.deepcopy(model).train()
    groups = [*parameter_groups(model, 1e-3), {"params": [*loss.parameters()], "lr": 1.0}]
    trainer = InOrder(
        model,
        arguments(tmp_path, max_steps=1),
        saq_config=SAQConfig(rho=0.0, **knobs),
        train_dataset=DATA,
        compute_loss_func=loss,
        optimizers=(torch.optim.SGD(groups), None),
    )
    trainer.train()
    logits = plain(DATA.pixel_values[:BATCH]).logits.detach()
    temperature = torch.tensor(1.5, requires_grad=True)
    nn.functional.cross_entropy(logits * temperature, DATA.labels[:BATCH]).backward()
    torch.testing.assert_close(1.5 - loss.of_logits.detach(), temperature.grad, rtol=1e-4, atol=1e-7)

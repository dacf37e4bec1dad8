"""Models are trained and scored on what their image processor makes, which `pipeline` takes afterwards."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    ImageGPTImageProcessor,
    LevitImageProcessor,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    PerceiverImageProcessor,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
)

from hf_saq.data import AUGMENTATIONS, input_size, normalization, transforms

SQUARE = {"height": 24, "width": 24}


def vit(**fields):
    return ViTImageProcessor(**{"size": SQUARE, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.5], **fields})


def of_timm(**fields):
    config = {"input_size": (3, 24, 24), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.5), "crop_pct": 1.0, **fields}
    return TimmWrapperImageProcessor(config, "resnet18")


PROCESSORS = {
    "vit": vit,
    "not normalized": lambda: vit(do_normalize=False),
    "not rescaled": lambda: vit(do_rescale=False, image_mean=[120.0] * 3, image_std=[60.0] * 3),
    "one value for all channels": lambda: vit(image_mean=[0.4], image_std=[0.3]),
    "neither": lambda: vit(do_rescale=False, do_normalize=False),
    "rescaled by 1/127.5": lambda: vit(rescale_factor=1 / 127.5),
    "wide": lambda: vit(size={"height": 16, "width": 40}),
    "a crop that is not done": lambda: vit(do_center_crop=False, crop_size={"height": 8, "width": 8}),
    "mobilevit": lambda: MobileViTImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE),
    "efficientnet": lambda: EfficientNetImageProcessor(
        size=SQUARE, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.5]
    ),
    "efficientnet, offset": lambda: EfficientNetImageProcessor(
        size=SQUARE, rescale_factor=1 / 127.5, rescale_offset=True, do_normalize=False
    ),
    "efficientnet, without top": lambda: EfficientNetImageProcessor(size=SQUARE, include_top=False),
    "bit": lambda: BitImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE),
    "mobilenet_v2, as they are stored": lambda: MobileNetV2ImageProcessor(
        size={"shortest_edge": 24}, crop_size=SQUARE
    ),
    "timm": of_timm,
    "timm, wide": lambda: of_timm(input_size=(3, 16, 40), crop_mode="squash"),
}


def sides(processor) -> tuple[int, int]:
    size = input_size(processor)
    return size if isinstance(size, tuple) else (size, size)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_images_of_the_right_size_become_what_the_processor_makes(kind):
    processor = PROCESSORS[kind]()
    height, width = sides(processor)
    assert (height, width) == ((16, 40) if "wide" in kind else (24, 24))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    theirs = processor(image, return_tensors="pt")["pixel_values"][0].float()
    train, evaluation = transforms(processor, input_size(processor), "none")
    torch.testing.assert_close(evaluation(image), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(train(image), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
@pytest.mark.parametrize("kind", ["wide", "mobilevit", "timm, wide"])
def test_every_augmentation_gives_that_shape_and_those_colours(kind, augmentation):
    """An image of one colour has no other one, but for what is padded and what random operations change."""
    processor = PROCESSORS[kind]()
    image = Image.new("RGB", (90, 50), (200, 60, 120))
    theirs = processor(image.resize(sides(processor)[::-1]), return_tensors="pt")["pixel_values"][0]
    made = transforms(processor, input_size(processor), augmentation)
    torch.testing.assert_close(made[1](image), theirs)
    assert made[0](image).shape == theirs.shape
    if augmentation in ("crop_flip", "none"):
        torch.testing.assert_close(made[0](image), theirs)
    assert torch.equal(pickle.loads(pickle.dumps(made[1]))(image), made[1](image))  # workers get it so


@pytest.mark.parametrize(
    "make",
    [ViTImageProcessor, ConvNextImageProcessor, LevitImageProcessor, MobileNetV2ImageProcessor, BitImageProcessor],
)
def test_processors_that_scale_and_crop_pass(make):
    """Where they cut images out differs from here; what they make of colours does not."""
    transforms(make(), 8, "none")


@pytest.mark.parametrize(("crop", "scaled"), [(0.875, 27), (0.9, 26), (0.95, 25)])
def test_processors_of_timm_pass_with_any_share_to_crop(crop, scaled):
    processor = of_timm(crop_pct=crop)
    assert processor.val_transforms.transforms[0].size == scaled
    transforms(processor, input_size(processor), "none")


class Inverted(ViTImageProcessor):
    """Does something to colours that no field says."""

    def _preprocess(self, images, *args, **kwargs):
        return super()._preprocess([255 - image for image in images], *args, **kwargs)


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (
            Inverted(size=SQUARE),
            r"Inverted makes \[1\.0, 1\.0, 1\.0\] of the colour \(0, 0, 0\) at row 0.*\[-1\.0, -1\.0",
        ),
        (
            MobileViTImageProcessor(size={"shortest_edge": 20}, crop_size=SQUARE),  # puts black around images
            r"makes \[0\.0, 0\.0, 0\.0\] of the colour \(255, 255, 255\) at row 0, .* of a picture of 24 x 24 pixels",
        ),
        (
            PerceiverImageProcessor(),
            r"makes \[3, 224, 224\] of a picture of 256 x 256 pixels, .*expected \[3, 256, 256\]",
        ),
        (ImageGPTImageProcessor(size=SQUARE), r"does not prepare a picture of 24 x 24 pixels \(Clusters must be"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_a_processor_that_makes_something_else_is_refused(processor, message):
    with pytest.raises(
        ValueError, match=message + r"(.|\n)*\. Take the image processor of another model of that kind"
    ):
        transforms(processor, input_size(processor), "none")


def test_a_size_that_is_none():
    processor = vit()
    processor.size = {"longest_edge": 24}
    with pytest.raises(
        ValueError, match=r"has the size \{'longest_edge': 24\}; expected height and width, or shortest_"
    ):
        input_size(processor)


def test_what_cannot_be_run_is_let_through():
    """A mean and a standard deviation are enough to make transforms."""

    class Plain:
        image_mean = image_std = (0.5, 0.5, 0.5)

    assert normalization(Plain) == ([0.5] * 3, [0.5] * 3)
    assert transforms(Plain, 24, "none")[1](Image.new("RGB", (24, 24))).unique().tolist() == [-1.0]


def test_fields_of_timm_are_those_of_its_own_transform():
    mean, std = normalization(of_timm())
    (normalize,) = (t for t in of_timm().val_transforms.transforms if "Normalize" in type(t).__name__)
    torch.testing.assert_close(torch.tensor(mean), normalize.mean.flatten())
    torch.testing.assert_close(torch.tensor(std), normalize.std.flatten())
    assert timm.data.resolve_data_config(of_timm().data_config)["mean"] == (0.4, 0.5, 0.6)

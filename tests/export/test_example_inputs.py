"""The size that a model is exported and measured for: that of the images which its image processor makes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from quantized_models import quantized
from tiny_models import conv_net, convnext, resnet, timm_efficientnet, vit
from transformers import BitImageProcessor, ConvNextImageProcessor, ViTImageProcessor, pipeline
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from hf_saq.export import ExportedClassifier, export_onnx
from hf_saq.export.example_inputs import example_inputs

GRAY = {"image_mean": [0.5], "image_std": [0.5]}


def convnext_processor(side: int) -> ConvNextImageProcessor:
    """As ResNet and ConvNeXt are usually saved with: a size in one number, cropped and resized in its own way."""
    return ConvNextImageProcessor(size={"shortest_edge": side})


def timm_processor(side: int) -> TimmWrapperImageProcessor:
    return TimmWrapperImageProcessor(
        {"input_size": (3, side, side), "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    )


@pytest.mark.parametrize(
    ("build", "processor"),
    [
        (resnet, convnext_processor(24)),
        (convnext, convnext_processor(24)),
        (convnext, convnext_processor(400)),  # from 384 pixels on it does not crop
        (resnet, BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 24, "width": 32})),
        (resnet, ViTImageProcessor(size={"height": 24, "width": 32})),
        (timm_efficientnet, timm_processor(24)),
    ],
)
def test_the_size_is_that_of_prepared_pictures(build, processor):
    pictures = [Image.new("RGB", size) for size in ((70, 50), (500, 600))]
    shapes = {tuple(processor(picture, return_tensors="pt")["pixel_values"].shape[1:]) for picture in pictures}
    assert {tuple(example_inputs(build(), None, None, processor).shape[1:])} == shapes


def test_a_processor_that_keeps_sizes_leaves_it_to_the_model():
    keeps = ViTImageProcessor(do_resize=False)
    assert example_inputs(vit(), None, None, keeps).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"ResNetForImageClassification: the size of its images is in no config"):
        example_inputs(resnet(), None, None, keeps)


def test_a_processor_of_pictures_in_colour_beside_a_model_of_gray_ones():
    """It gives the size at least, as its fields say it."""
    gray = resnet()
    gray.config.num_channels = 1
    with pytest.warns(UserWarning, match="does not prepare a picture of 1 channels, as the model takes"):
        found = example_inputs(gray, None, None, ViTImageProcessor(size={"height": 24, "width": 32}))
    assert found.shape == (2, 1, 24, 32)


def test_an_export_runs_in_a_pipeline_with_the_processor_beside_it(tmp_path):
    processor = convnext_processor(16)
    export_onnx(quantized(convnext), tmp_path, processor=processor, check=False)
    classify = pipeline(
        "image-classification", model=ExportedClassifier.from_pretrained(tmp_path), image_processor=processor
    )
    assert len(classify(Image.new("RGB", (70, 50)))) == 3


def test_an_image_size_that_the_processor_contradicts_is_warned_of():
    with pytest.warns(UserWarning, match=r"image_size=32 is not what the image processor makes: 16 x 16 pix"):
        assert example_inputs(resnet(), None, 32, convnext_processor(16)).shape == (2, 3, 32, 32)
    assert example_inputs(resnet(), None, 16, convnext_processor(16)).shape == (2, 3, 16, 16)  # nothing to warn of
    assert example_inputs(resnet(), None, 32, None).shape == (2, 3, 32, 32)


def test_a_processor_for_other_channels_is_warned_of():
    model = conv_net()
    model[0].in_channels = 1
    fits = ViTImageProcessor(size={"height": 8, "width": 9}, **GRAY)
    assert example_inputs(model, None, None, fits).shape == (2, 1, 8, 9)
    with pytest.warns(UserWarning, match="does not prepare a picture of 1 channels, as the model takes: "):
        found = example_inputs(model, None, 8, ViTImageProcessor(size={"height": 8, "width": 8}))
    assert found.shape == (2, 1, 8, 8) and np.isfinite(found.numpy()).all()


def test_a_processor_that_keeps_the_shape_of_pictures_is_warned_of():
    keeps = BitImageProcessor(size={"shortest_edge": 24}, do_center_crop=False)
    assert keeps(Image.new("RGB", (96, 64)), return_tensors="pt")["pixel_values"].shape[-2:] == (24, 36)
    with pytest.warns(
        UserWarning, match="makes 24 x 24 pixels of a square picture and 24 x 36 pixels of an oblong one"
    ):
        assert example_inputs(resnet(), None, None, keeps).shape == (2, 3, 24, 24)

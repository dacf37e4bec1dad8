"""Every image classifier of transformers and a spread of timm: quantize, train, store and load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, MAPPING, TIMM, Architecture, check
from tiny_models import images, seeded
from training import Images, arguments
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, cost
from hf_saq.conversion.calibration import NEVER_RUN

# A spread of what differs from one another: kinds of layers, inputs, heads, weights that are read directly.
FAST = (
    "transformers/swinv2",
    "transformers/convnextv2",
    "transformers/DeiTForImageClassificationWithTeacher",
    "transformers/imagegpt",
    "transformers/levit",
    "transformers/shieldgemma2",
    "transformers/siglip2",
    "transformers/regnet",
    "timm/beitv2_base_patch16_224",
    "timm/tf_mobilenetv3_small_minimal_100",
    "timm/test_coatnet",
    "timm/xcit_nano_12_p16_224",
)
UNSUPPORTED = {
    "transformers/dinat": "the float model does not work: ImportError: .* requires the natten library",
    "timm/coat_lite_tiny": "the float model does not work: .*The weights trying to be saved contained shared tensors",
}
"""What fails, and with which words; nothing else may."""

# Warnings of the libraries about their own models.
pytestmark = pytest.mark.filterwarnings("default")


def _parameter(name: str):
    marks = () if name in FAST else (pytest.mark.slow,)
    return pytest.param(ARCHITECTURES[name], id=name, marks=marks)


@pytest.mark.parametrize("architecture", [_parameter(name) for name in ARCHITECTURES])
def test_architecture(architecture: Architecture):
    result = check(architecture)
    if architecture.name in UNSUPPORTED:
        assert re.search(UNSUPPORTED[architecture.name], result.reason), result.reason or "it passes now"
    else:
        assert result.passed, result.reason
        assert result.quantized > 0


@pytest.mark.parametrize("activation_bits", [4, None], ids=["W4A4", "weights"])
def test_a_layer_whose_weight_is_read_directly_trains_and_resumes_in_float(tmp_path, activation_bits):
    """timm's BEiT reads `qkv.weight`: `SAQTrainer` finds out, and a checkpoint resumes with the same layers."""
    config = SAQQuantizationConfig(activation_bits=activation_bits)

    def trainer(max_steps: int) -> SAQTrainer:
        sizes = {**TIMM["beit_base_patch16_224"], "img_size": 16}
        timm_config = TimmWrapperConfig(architecture="beit_base_patch16_224", num_labels=3, model_args=sizes)
        with seeded(0):
            model = TimmWrapperForImageClassification(timm_config)
        args = arguments(tmp_path, max_steps=max_steps, save_steps=1, save_strategy="steps", logging_steps=1)
        data = Images(16, torch.float32)
        return SAQTrainer(
            model, args, saq_config=SAQConfig(rho=0.1, schedule="full"), quantization_config=config, train_dataset=data
        )

    first = trainer(1)
    with pytest.warns(UserWarning, match="calibrate: 2 of 10 layers stay in float, .*blocks.1.attn.qkv"):
        first.train()
    assert first.state.log_history[0]["weight_bytes"] == cost(first.model, images(1)).weight_bytes
    second = trainer(2)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 2
    assert second.model.state_dict().keys() == first.model.state_dict().keys()
    reasons = {layer.name: layer.reason for layer in second.model.quantization_report.skipped}
    assert reasons == {f"timm_model.blocks.{i}.attn.qkv": NEVER_RUN for i in range(2)}


def test_the_sweep_is_complete():
    swept = {a.config_class for a in ARCHITECTURES.values()}
    assert set(MAPPING.keys()) <= swept and TimmWrapperConfig in swept
    assert len(TIMM) >= 40
    assert set(FAST) | set(UNSUPPORTED) <= ARCHITECTURES.keys()
    of_the_mapping = [name for name in UNSUPPORTED if name.startswith("transformers/")]
    assert len(of_the_mapping) / len(MAPPING) <= 0.05


def test_the_page_of_results_lists_every_architecture():
    """Run `make architectures` to write it anew."""
    page = (Path(__file__).parent.parent / "docs" / "architectures.md").read_text(encoding="utf-8")
    missing = [name for name in ARCHITECTURES if f"| {name.split('/')[1]} |" not in page]
    assert not missing

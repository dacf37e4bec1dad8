"""What a run says at its beginning, and what a save says of what lies where."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import vit
from training import Images, arguments

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, quantize

CONFIG = SAQQuantizationConfig(weight_bits=4, activation_bits=4, scale_init="mean", modules_to_not_convert=["*.fc1"])


@pytest.fixture
def as_by_default():
    """Tests are silent otherwise."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    yield
    transformers.utils.logging.set_verbosity(before)


def trained(directory, config: SAQConfig) -> SAQTrainer:
    trainer = SAQTrainer(
        quantize(vit(), CONFIG),
        arguments(directory, max_steps=1),
        saq_config=config,
        train_dataset=Images(4, torch.float32),
    )
    trainer.train()
    return trainer


def test_a_run_in_words(tmp_path, capsys, as_by_default):
    trainer = trained(tmp_path, SAQConfig(rho=0.1, schedule="full"))
    lines = capsys.readouterr().out.splitlines()
    report = trainer.model.quantization_report
    assert lines[0].startswith(
        f"ViTForImageClassification: {len(report.converted)} of {len(report.layers)} layers are quantized (lsq), "
        f"{len(report.converted) - 2} at W4A4, 2 at W8A8; the first layer and the heads are "
    )
    assert "; in float: 2 (" in lines[0] and "modules_to_not_convert" in lines[0]
    assert lines[1] == (
        "Method: SAQ (case 3), radius rho=0.1 (as given), perturbing weight, bias, norm; 2 forward and backward "
        "passes a step, plain QAT takes 1."
    )
    assert lines[2].startswith("Cost of one image: ") and lines[2].endswith(" KiB.")
    assert lines[3].startswith("Logged: loss, sharpness (") and lines[3].endswith("; to the console.")
    trainer.save_model()
    size = (tmp_path / "model.safetensors").stat().st_size / 1024
    said = capsys.readouterr().out.splitlines()
    full = 4 * sum(parameter.numel() for parameter in vit().parameters()) / 1024  # as in the card: without scales
    assert said[0] == f"Saved in {tmp_path}: {size:,.1f} KiB of packed weights; in float32 they take {full:,.1f} KiB."
    assert said[1].startswith(
        f'To load it: import hf_saq, then ViTForImageClassification.from_pretrained("{tmp_path}")'
    )
    assert said[2].startswith("To run it in integers") and said[3].endswith("trainer.push_to_hub()")


def test_the_passes_of_the_default_schedule(tmp_path, capsys, as_by_default):
    """As every page writes them."""
    trained(tmp_path, SAQConfig(rho=0.1))
    assert "; 1.125 forward and backward passes a step, plain QAT takes 1." in capsys.readouterr().out


def test_plain_training_and_silence(tmp_path, capsys, as_by_default):
    trained(tmp_path, SAQConfig(case=None))
    assert "Method: plain quantization-aware training (QAT), one forward" in capsys.readouterr().out
    transformers.utils.logging.set_verbosity_error()
    trained(tmp_path, SAQConfig(case=None)).save_model()
    assert "Method" not in (said := capsys.readouterr().out) and "Saved in" not in said

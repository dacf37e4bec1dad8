"""Models that are not of transformers go on from their checkpoints, which have no configuration, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantized_models import assert_same_state
from safetensors.torch import save_file
from torch import nn
from training import Images, arguments

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, quantize
from hf_saq.quantizers import Quantizer
from hf_saq.training.saving import go_on_from

W3 = {"weight_bits": 3, "activation_bits": 4}


class PlainNet(nn.Module):
    """A classifier of one's own, with a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, 3))
        self.unused = nn.Linear(4, 4)

    def forward(self, pixel_values, labels):
        logits = self.net(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def plain_trainer(directory: Path, steps: int, model: nn.Module | None = None, **fields) -> SAQTrainer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = quantize(PlainNet(), SAQQuantizationConfig(**{**W3, **fields})) if model is None else model
    changes = dict(max_steps=steps, save_strategy="steps", save_steps=2, label_names=["labels"])
    data = Images(16, torch.float32)
    return SAQTrainer(model, arguments(directory, **changes), saq_config=SAQConfig(rho=0.1), train_dataset=data)


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    with pytest.warns(UserWarning, match="1 of 3 layers stay in float"):
        plain_trainer(directory, 2).train()
    return directory / "checkpoint-2"


def test_a_plain_module_goes_on_exactly(plain_checkpoint, tmp_path):
    """Also where the first run left an idle layer in float, which the second quantizes at first."""
    whole = plain_trainer(tmp_path, 4)
    with pytest.warns(UserWarning, match="1 of 3 layers stay in float"):
        whole.train()
    resumed = plain_trainer(tmp_path, 4)
    with torch.no_grad():
        for parameter in resumed.model.parameters():  # as a fresh process has them
            parameter.add_(1)
    resumed.train(resume_from_checkpoint=str(plain_checkpoint))
    assert_same_state(resumed.model, whole.model)


@pytest.mark.parametrize("change", ["missing", "left-over"])
def test_a_plain_module_that_is_another_is_refused(change, plain_checkpoint, tmp_path):
    """`Trainer` loads such models without a word about names that do not match."""
    model = PlainNet()
    if change == "missing":
        model.more = nn.LayerNorm(3)
        message = r"it lacks 2 tensor\(s\) \(for example more.weight, more.bias\) of the model"
    else:
        del model.net[3]
        model.net.head = nn.Linear(8, 3)
        message = r"it lacks .* net.head.* and the model does not have .* net.3"
    trainer = plain_trainer(tmp_path, 4, quantize(model, SAQQuantizationConfig(**W3)))
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(plain_checkpoint))


def test_a_plain_module_of_other_bits_is_refused(plain_checkpoint, tmp_path):
    """Its tensors have the same names and shapes."""
    trainer = plain_trainer(tmp_path, 4, **{"activation_bits": 8, "first_last_bits": None})
    with pytest.raises(
        ValueError, match=r"saved with net.1.weight_quantizer=\{.*'bits': 8.*is quantized with .*'bits': 3"
    ):
        trainer.train(resume_from_checkpoint=str(plain_checkpoint))
    (plain_checkpoint / "quantizers.json").rename(tmp_path / "elsewhere")
    try:  # one that an earlier version saved
        plain_trainer(tmp_path, 2).train(resume_from_checkpoint=str(plain_checkpoint))
    finally:
        (tmp_path / "elsewhere").rename(plain_checkpoint / "quantizers.json")


def test_checkpoints_of_weights_alone_say_how_they_are_quantized(tmp_path):
    """`save_only_model=True` leaves out what a run needs to go on exactly, not what its weights mean."""
    trainer = plain_trainer(tmp_path, 2, modules_to_not_convert=["unused"])
    trainer.args.save_only_model = True
    trainer.train()
    other = plain_trainer(tmp_path, 4, modules_to_not_convert=["unused"], weight_bits=2)
    with pytest.raises(ValueError, match=r"saved with net.*weight_quantizer=\{.*is quantized with .*'bits': 2"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_plain_module_with_a_bit_budget_takes_the_bits_of_its_checkpoint(tmp_path):
    def trainer() -> SAQTrainer:
        made = plain_trainer(tmp_path, 4, weight_bits=8, activation_bits=8, modules_to_not_convert=["unused"])
        made.saq_config.bit_budget = "4 bits"
        return made

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = [[m.bits for m in made.model.modules() if isinstance(m, Quantizer)] for made in (whole, resumed)]
    assert found[0] == found[1] and set(found[0]) != {8}
    assert_same_state(resumed.model, whole.model)
    (tmp_path / "checkpoint-2/quantizers.json").write_text("{")
    with pytest.raises(ValueError, match="quantizers.json is not JSON"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_plain_module_and_a_float_checkpoint(tmp_path):
    """Its step sizes would be those of other weights."""
    save_file(PlainNet().state_dict(), tmp_path / "model.safetensors")
    model = quantize(PlainNet(), SAQQuantizationConfig(**W3))
    with pytest.raises(ValueError, match="is a checkpoint of a float model, but this PlainNet is quantized"):
        go_on_from(model, str(tmp_path))

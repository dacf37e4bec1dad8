"""`SAQConfig.bit_budget`: the trainer trains, saves and resumes a model whose layers have bits for a budget."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import vit
from training import BATCH, Images, InOrder, arguments
from transformers import AutoModelForImageClassification

from hf_saq import SAQConfig, SAQQuantizationConfig, calibrate, cost, quantize
from hf_saq.analysis.bits import change_bits
from hf_saq.config.bit_budget import read_bit_budget
from hf_saq.hub.card import model_card
from hf_saq.hub.run_facts import facts_of_run
from hf_saq.storage.inspection import inspect_checkpoint
from hf_saq.training.analyses import giving_bits
from hf_saq.training.analyses.giving_bits import BUDGET_BATCHES
from hf_saq.training.calibrating import CALIBRATION_BATCHES

CONFIG = SAQQuantizationConfig(weight_bits=4, activation_bits=4)
STEPS = 3


def trainer(model, directory, budget: str | None = "0.9x", **changes) -> InOrder:
    return InOrder(
        model,
        arguments(directory, max_steps=STEPS, **changes),
        saq_config=SAQConfig(rho=0.2, schedule="full", bit_budget=budget),
        quantization_config=CONFIG,
        train_dataset=Images(BATCH * BUDGET_BATCHES, torch.float32),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a checkpoint of its first step, and its directory."""
    directory = tmp_path_factory.mktemp("run")
    finished = trainer(vit(), directory, save_strategy="steps", save_steps=1)
    finished.train()
    finished.save_model()
    return finished, directory


def bits_of(model) -> dict[str, tuple]:
    layers = model.quantization_report.converted
    return {layer.name: (layer.settings["weight_bits"], layer.settings["activation_bits"]) for layer in layers}


def test_the_budget_is_kept_by_what_was_trained(run):
    finished, _ = run
    uniform = quantize(vit(), CONFIG)
    one = {"pixel_values": Images(1, torch.float32).pixel_values}
    # Attention products and the like cost the same in both: the budget is of the quantized layers.
    spent, before = (sum(layer.bops for layer in cost(m, one).layers) for m in (finished.model, uniform))
    assert 0.7 * before < spent <= finished.allocation.budget == int(0.9 * before)
    assert len(set(bits_of(finished.model).values())) > 2
    for name, module in finished.model.named_modules():
        if name in bits_of(finished.model):
            assert bits_of(finished.model)[name] == (module.weight_quantizer.bits, module.activation_quantizer.bits)
    logged = next(entry for entry in finished.state.log_history if "bit_operations" in entry)
    assert logged["bit_operations"] == cost(finished.model, one).bops


def test_it_trains_as_a_model_that_was_quantized_to_these_bits(run, tmp_path):
    finished, _ = run
    config = finished.allocation.applied_to(CONFIG)
    data = Images(BATCH * BUDGET_BATCHES, torch.float32)
    model = calibrate(quantize(vit(), config), list(data.pixel_values.split(BATCH))[:CALIBRATION_BATCHES])
    direct = InOrder(
        model, arguments(tmp_path, max_steps=STEPS), saq_config=SAQConfig(rho=0.2, schedule="full"), train_dataset=data
    )
    direct.train()
    for (name, ours), (_, theirs) in zip(
        finished.model.named_parameters(), direct.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_saved_models_load_with_their_bits_and_show_them(run):
    finished, directory = run
    loaded = AutoModelForImageClassification.from_pretrained(directory).eval()
    batch = Images(4, torch.float32).pixel_values
    with torch.no_grad():
        assert torch.allclose(loaded(batch).logits, finished.model.eval()(batch).logits, atol=1e-5)
    stored = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in inspect_checkpoint(directory).layers}
    assert stored == bits_of(finished.model)
    card = str(model_card(facts_of_run(finished, finished.saq_config, {}, directory, False)))
    for name, (weight, activation) in bits_of(finished.model).items():
        assert f"| {name} | {weight} | {activation} |" in card


def test_layers_that_keep_their_bits_keep_the_ranges_that_they_have_learned(run, tmp_path, monkeypatch):
    """The model may have been trained before: ranges of the head and of all others were fitted anew."""
    monkeypatch.setattr(giving_bits, "allocate_bits", lambda *args, **kwargs: run[0].allocation)
    budgeted = trainer(vit(), tmp_path)
    budgeted.train_dataset = Images(BATCH, torch.float32)
    budgeted.calibrate_if_needed()
    head = budgeted.model.classifier.activation_quantizer
    with torch.no_grad():
        learned = head.scale.mul_(1.5).clone()
    budgeted.give_bits()
    assert "classifier" not in budgeted.allocation.overrides and budgeted.allocation.overrides
    assert torch.equal(budgeted.model.classifier.activation_quantizer.scale, learned)


def test_a_run_goes_on_with_its_bits(run):
    finished, directory = run
    resumed = trainer(vit(seed=5), directory)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-1"))
    assert bits_of(resumed.model) == bits_of(finished.model) and resumed.allocation is None
    for (name, ours), (_, theirs) in zip(
        finished.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_changed_bits_are_those_of_a_model_quantized_so():
    overrides = {"vit.layers.0.mlp.fc1": {"weight_bits": 2, "activation_bits": 6}}
    shown = [Images(8, torch.float32).pixel_values]
    changed, direct = quantize(vit(), CONFIG), quantize(vit(), CONFIG.replace(overrides=overrides))
    change_bits(changed, overrides)
    calibrate(changed, shown)
    calibrate(direct, shown)
    assert changed.config.quantization_config == direct.config.quantization_config
    assert str(changed.quantization_report) == str(direct.quantization_report)
    for (name, ours), (_, theirs) in zip(changed.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    before = copy.deepcopy(changed.state_dict())
    with pytest.raises(ValueError, match="no_such is no quantized layer of ViTForImageClassification"):
        change_bits(changed, {**overrides, "no_such": {"weight_bits": 2}})
    assert all(torch.equal(before[name], tensor) for name, tensor in changed.state_dict().items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.8x", ("0.8x", "bops")),
        ("0.5x bytes", ("0.5x", "bytes")),
        ("3 bits", ("3 bits", "bops")),
        ("3bits bytes", ("3 bits", "bytes")),
        ("1.5e9 bops", (1.5e9, "bops")),
        ("8e0x", ("8x", "bops")),
        ("10x", ("10x", "bops")),
        ("250000 Bytes", (250000.0, "bytes")),
    ],
)
def test_budgets_that_are_understood(text, expected):
    assert read_bit_budget("x", text) == expected and SAQConfig(bit_budget=text).bit_budget == text


@pytest.mark.parametrize("text", ["", "0x", "3", "many bops", "3.5 bits", "-1 bops", "5 min", 0.8, "0.8x watts"])
def test_budgets_that_are_not(text):
    with pytest.raises(ValueError, match="SAQConfig.bit_budget=.*; expected a budget such as '0.8x'"):
        SAQConfig(bit_budget=text)


def test_set_ups_that_do_not_go_with_it(tmp_path):
    model = quantize(vit(), CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="expected no optimizer, or no bit_budget"):
        InOrder(
            model, arguments(tmp_path), saq_config=SAQConfig(rho=0.1, bit_budget="0.8x"), optimizers=(optimizer, None)
        )
    with pytest.raises(ValueError, match="no choice keeps to budget='0.01x'"):
        trainer(vit(), tmp_path, "0.01x").train()

"""`SAQTrainer` against the plain-PyTorch reference, and what a Trainer user may switch on."""

from __future__ import annotations

import pytest
import torch
from matrices import matrix
from reference import largest_difference
from torch import nn
from training import FAMILIES, HOW, RHO, Images, InOrder, arguments, make_trainer, quantized_model, reference_result
from transformers import Trainer

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, pack

TOLERANCE = 1e-11
"""Of float64 parameters after three steps; they move by more than 1e-5."""


@matrix(4, family=FAMILIES, how=HOW.keys(), accumulation=[1, 2])
def test_training_equals_the_reference(family, how, accumulation, tmp_path):
    case, sync = HOW[how]
    trainer = make_trainer(family, case, accumulation, sync, tmp_path)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    expected = reference_result(family, case, accumulation, sync)
    assert largest_difference(trainer.model, expected) < TOLERANCE
    moved = max((p - s).abs().max().item() for p, s in zip(trainer.model.parameters(), start, strict=True))
    assert moved > 1e6 * TOLERANCE


def test_gradient_clipping_sees_the_final_gradient_only(tmp_path):
    trainer = make_trainer("vit", 3, 2, "local", tmp_path, max_grad_norm=0.05)
    trainer.train()
    expected = reference_result("vit", 3, 2, "local", max_grad_norm=0.05)
    assert largest_difference(trainer.model, expected) < TOLERANCE
    unclipped = reference_result("vit", 3, 2, "local")
    assert largest_difference(trainer.model, unclipped) > 1e3 * TOLERANCE


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f == "mobilenet_v2" else f for f in FAMILIES]
)
def test_rho_zero_and_case_none_are_plain_training_bit_for_bit(family, tmp_path):
    states = []
    for saq_config in (SAQConfig(rho=0.0, schedule="full"), SAQConfig(case=None), None):
        model, args = quantized_model(family, torch.float32), arguments(tmp_path, max_steps=10, optim="adamw_torch")
        data = Images(40, torch.float32)
        if saq_config is None:
            trainer = Trainer(model, args, train_dataset=data)
            trainer.model_accepts_loss_kwargs = False
        else:
            saq_config.scale_lr_ratio = 1.0
            trainer = SAQTrainer(model, args, saq_config=saq_config, train_dataset=data)
        trainer.train()
        states.append(model.state_dict())
    for name, value in states[2].items():
        assert torch.equal(states[0][name], value), name
        assert torch.equal(states[1][name], value), name


def test_case_none_runs_one_pass(tmp_path):
    for case, passes in ((None, 1), (3, 2)):
        trainer = make_trainer("vit", case, 1, "local", tmp_path)
        calls = []
        trainer.model.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        trainer.train()
        assert len(calls) == passes * 3


def test_logs(tmp_path):
    """The logged loss is the clean one; sharpness is perturbed minus clean, and positive for a small radius."""
    runs = {}
    for case in (None, 3):
        trainer = make_trainer("vit", case, 2, "local", tmp_path)
        trainer.train()
        runs[case] = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert runs[3][0]["loss"] == runs[None][0]["loss"]  # the first step starts from the same weights
    assert "sharpness" not in runs[None][0]
    for entry in runs[3]:
        assert 0 < entry["sharpness"] < RHO * entry["ascent_norm"] * 1.5
        assert entry["skipped_perturbations"] == 0


@pytest.mark.parametrize(("schedule", "name"), [("full", "train_loss"), ("balanced", "train_perturbed_loss")])
def test_the_mean_loss_of_a_training_has_its_name(schedule, name, tmp_path):
    """Losses at perturbed weights are no `train_loss` to compare with other trainings."""
    trainer = make_trainer("vit", 3, 1, "local", tmp_path, knobs=dict(schedule=schedule))
    metrics = trainer.train().metrics
    for found in (metrics, trainer.state.log_history[-1]):
        assert [key for key in found if key.endswith("_loss")] == [name]
        assert found[name] == pytest.approx(
            sum(entry[name.removeprefix("train_")] for entry in trainer.state.log_history[:-1]) / 3, rel=1e-3
        )


@pytest.mark.parametrize("sync", ["local", "global"])
def test_sharpness_is_the_mean_over_micro_batches(sync, tmp_path):
    """Against the losses of both passes, recorded as they come out of the model."""
    losses: list[float] = []

    class Recorder(InOrder):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    trainer = make_trainer("vit", 3, 2, sync, tmp_path, cls=Recorder, max_steps=1)
    trainer.train()
    clean, perturbed = (losses[0::2], losses[1::2]) if sync == "local" else (losses[:2], losses[2:])
    expected = sum(p - c for p, c in zip(perturbed, clean, strict=True)) / 2
    entry = trainer.state.log_history[0]
    assert entry["sharpness"] == pytest.approx(expected, abs=2e-6)
    assert entry["loss"] == pytest.approx(sum(clean) / 2, abs=1e-4)


def test_ascent_norm_does_not_depend_on_how_a_batch_is_split(tmp_path):
    """Twice the same images: the gradient of each half is that of the whole, also in what is logged."""
    norms = []
    for accumulation, sync in ((1, "local"), (2, "local"), (2, "global")):
        trainer = make_trainer("vit", 3, accumulation, sync, tmp_path, max_steps=1)
        data = trainer.train_dataset
        data.pixel_values = data.pixel_values[:4].repeat(accumulation, 1, 1, 1)
        data.labels = data.labels[:4].repeat(accumulation)
        trainer.train()
        norms.append(trainer.state.log_history[0]["ascent_norm"])
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-4)


def test_schedule(tmp_path):
    """`interval` and `start` choose the steps with two passes."""
    for config, expected in ((SAQConfig(interval=2), [2, 1, 2, 1]), (SAQConfig(start=0.5), [1, 1, 2, 2])):
        config.rho = 0.1
        trainer = InOrder(
            quantized_model("convnext"), arguments(tmp_path, max_steps=4), saq_config=config, train_dataset=Images(16)
        )
        calls: list[int] = []
        trainer.model.register_forward_hook(lambda *_: calls.append(trainer.state.global_step))  # noqa: B023
        trainer.train()
        assert [calls.count(step) for step in range(4)] == expected


@pytest.mark.parametrize("loss", ["label_smoothing", "compute_loss_func", "compute_loss"])
def test_other_losses(loss, tmp_path):
    """Custom losses see the labels in both passes; checked by the loss that is logged and by what is learned."""

    def own_loss(outputs, labels, num_items_in_batch=None):
        return nn.functional.multi_margin_loss(outputs.logits, labels)

    class OwnLoss(InOrder):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")  # a user's override may well take things out of the dict
            outputs = model(**inputs)
            value = own_loss(outputs, labels)
            return (value, outputs) if return_outputs else value

    cls = OwnLoss if loss == "compute_loss" else InOrder
    changes = {"label_smoothing_factor": 0.3} if loss == "label_smoothing" else {}
    kwargs = {"compute_loss_func": own_loss} if loss == "compute_loss_func" else {}
    model = quantized_model("vit")
    trainer = cls(
        model,
        arguments(tmp_path, max_steps=1, **changes),
        saq_config=SAQConfig(rho=0.1, schedule="full"),
        train_dataset=Images(4),
        **kwargs,
    )
    before = model.classifier.weight.detach().clone()
    trainer.train()
    logits = quantized_model("vit")(pixel_values=Images(4).pixel_values).logits
    if loss == "label_smoothing":
        expected = nn.functional.cross_entropy(logits, Images(4).labels, label_smoothing=0.3)
    else:
        expected = own_loss(type("Outputs", (), {"logits": logits}), Images(4).labels)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)
    assert not torch.equal(before, model.classifier.weight)


def test_soft_labels_of_a_mixing_collator(tmp_path):
    """A mixup-style collator draws once for a batch: both passes get the same mixed images and labels."""
    drawn, seen = [], []

    def mixup(rows):
        pixels = torch.stack([r["pixel_values"] for r in rows])
        labels = nn.functional.one_hot(torch.stack([r["labels"] for r in rows]), 3).double()
        weight = torch.rand(()).item()
        drawn.append(weight)
        return {
            "pixel_values": weight * pixels + (1 - weight) * pixels.flip(0),
            "labels": weight * labels + (1 - weight) * labels.flip(0),
        }

    def soft_loss(outputs, labels, num_items_in_batch=None):
        seen.append((outputs.logits.shape, labels.clone()))
        return nn.functional.cross_entropy(outputs.logits, labels)

    class SoftLabels(InOrder):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(pixel_values=inputs["pixel_values"])
            return soft_loss(outputs, inputs["labels"])

    trainer = SoftLabels(
        quantized_model("convnext"),
        arguments(tmp_path, max_steps=2),
        saq_config=SAQConfig(rho=0.1, schedule="full"),
        train_dataset=Images(8),
        data_collator=mixup,
    )
    trainer.train()
    assert len(drawn) == 2 and len(seen) == 4
    for first, second in (seen[:2], seen[2:]):
        assert torch.equal(first[1], second[1])


def test_float_model_is_quantized_and_calibrated(tmp_path, caplog):
    from tiny_models import vit

    model = vit()
    torch.manual_seed(5)
    trainer = SAQTrainer(
        model,
        arguments(tmp_path, max_steps=1),
        quantization_config=SAQQuantizationConfig(weight_bits=2, activation_bits=4),
        train_dataset=Images(8, torch.float32),
    )
    assert trainer.model is model
    assert "SAQConfig.rho is not set; using rho=" in caplog.text
    trainer.train()
    assert model.vit.layers[0].mlp.fc1.activation_quantizer.initialized


def test_calibrating_draws_no_random_numbers(tmp_path):
    from tiny_models import vit

    trainer = SAQTrainer(
        vit(),
        arguments(tmp_path),
        saq_config=SAQConfig(case=None),
        quantization_config=SAQQuantizationConfig(),
        train_dataset=Images(8, torch.float32),
    )
    before = torch.get_rng_state()
    trainer.calibrate_if_needed()
    assert torch.equal(before, torch.get_rng_state())


def test_scales_have_their_own_group(tmp_path):
    trainer = InOrder(
        quantized_model("vit"),
        arguments(tmp_path, weight_decay=0.1, learning_rate=1e-2),
        saq_config=SAQConfig(rho=0.1, schedule="full", scale_lr_ratio=0.25),
        train_dataset=Images(8),
    )
    optimizer = trainer.create_optimizer()
    names = {p: name for name, p in trainer.model.named_parameters()}
    grouped = {names[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert set(grouped) == set(names.values())
    scales = {name for name in grouped if name.endswith("_quantizer.scale")}
    assert len(scales) == 2 * len(trainer.model.quantization_report.converted)
    decays = set(Trainer.get_decay_parameter_names(trainer, trainer.model)) - scales  # what the stock Trainer decays
    assert {"classifier.weight", "vit.embeddings.cls_token"} <= decays
    for name, group in grouped.items():
        assert group["lr"] == (0.25e-2 if name in scales else 1e-2), name
        assert group["weight_decay"] == (0.1 if name in decays else 0.0), name


def test_bad_input(tmp_path):
    from tiny_models import vit

    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="has no quantized layer"):
        SAQTrainer(vit(), args)
    with pytest.raises(ValueError, match="model is None"):
        SAQTrainer(args=args)
    with pytest.raises(ValueError, match="model_init is not supported"):
        SAQTrainer(vit(), args, model_init=vit)
    with pytest.raises(ValueError, match="packed integers, which cannot be trained"):
        SAQTrainer(pack(quantized_model("vit", torch.float32)), args)
    trainer = SAQTrainer(vit(), args, quantization_config=SAQQuantizationConfig(), saq_config=SAQConfig(case=None))
    with pytest.raises(ValueError, match="no train_dataset"):
        trainer.train()


@pytest.mark.parametrize("sync", ["local", "global"])
def test_an_exception_in_the_second_pass_leaves_the_parameters(sync, tmp_path):
    trainer = make_trainer("resnet", 3, 2, sync, tmp_path)
    passes = []

    def interrupt(*_):
        passes.append(1)
        if len(passes) == (2 if sync == "local" else 3):  # inside the first second pass
            raise KeyboardInterrupt

    trainer.model.resnet.encoder.register_forward_hook(interrupt)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_stopping_between_micro_batches_leaves_nothing_behind(tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    trainer = make_trainer("vit", 3, 2, "global", tmp_path)
    trainer.add_callback(Stop())
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name]), name
    trainer.remove_callback(Stop)
    trainer.model.zero_grad()
    trainer.train()
    assert largest_difference(trainer.model, reference_result("vit", 3, 2, "global")) < TOLERANCE


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    """Its engine steps inside `backward`. Plain training is let through."""
    create = SAQTrainer.create_accelerator_and_postprocess

    def with_deepspeed(self):
        create(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(SAQTrainer, "create_accelerator_and_postprocess", with_deepspeed)
    with pytest.raises(ValueError, match="DeepSpeed steps inside backward"):
        SAQTrainer(quantized_model("vit"), arguments(tmp_path), saq_config=SAQConfig(rho=0.1, schedule="full"))
    SAQTrainer(quantized_model("vit"), arguments(tmp_path), saq_config=SAQConfig(case=None))


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="2 GPUs in one process would use nn.DataParallel"):
        SAQTrainer(quantized_model("vit"), args, saq_config=SAQConfig(rho=0.1, schedule="full"))

"""What people pass to `SAQTrainer`: what they passed to `Trainer`, their own optimizer, sometimes the wrong thing."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from quantized_models import layers, quantized
from tiny_models import vit
from training import BATCH, Images, InOrder, arguments, quantized_model
from transformers import AutoModelForImageClassification, TrainerCallback, default_data_collator

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, pack, parameter_groups, quantize
from hf_saq.storage.saved_directory import model_class


def trainer_with(optimizer, model, tmp_path, **config) -> SAQTrainer:
    return SAQTrainer(
        model,
        arguments(tmp_path, max_steps=1),
        saq_config=SAQConfig(case=None, **config),
        train_dataset=Images(8, torch.float32),
        optimizers=(optimizer, None),
    )


def test_arguments_in_the_order_of_trainer(tmp_path):
    """`Trainer(model, args, collator, train_dataset)` becomes `SAQTrainer(...)` without a change."""
    data = Images(8, torch.float32)
    trainer = SAQTrainer(quantized(), arguments(tmp_path, max_steps=1), default_data_collator, data)
    assert trainer.data_collator is default_data_collator and trainer.train_dataset is data


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"saq_config": {"rho": 0.1}}, "saq_config is a dict; expected a SAQConfig"),
        ({"saq_config": SAQQuantizationConfig()}, "saq_config is a SAQQuantizationConfig; expected a SAQConfig"),
        ({"quantization_config": SAQConfig()}, "quantization_config is a SAQConfig; expected a SAQQuantizationConfig"),
        ({"model": "google/vit-base-patch16-224"}, "model is a str; expected a model, for example of from_pretrained"),
        ({"args": {"max_steps": 1}}, "args is a dict; expected TrainingArguments"),
        ({"rho": 0.1}, r"rho is no argument of a trainer; expected it as saq_config=SAQConfig\(rho=...\)"),
        ({"weight_bits": 4}, "weight_bits is no argument of a trainer; expected it as quantization_config=SAQQuant"),
    ],
    ids=["dict", "swapped", "swapped-too", "name", "args", "field", "bits"],
)
def test_the_wrong_kind_of_thing(given, message, tmp_path):
    """One sentence says which argument it is, what it is, and what was expected."""
    with pytest.raises(TypeError, match=f"^SAQTrainer: {message}"):
        SAQTrainer(**{"model": vit(), "args": arguments(tmp_path), **given})


def test_an_optimizer_from_before_quantization_never_sees_the_step_sizes(tmp_path):
    """`AdamW(model.parameters())`, then `quantize`: weights are the same objects, step sizes are not in it."""
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    quantized_model = quantize(model, SAQQuantizationConfig())
    with pytest.warns(UserWarning, match="does not have 28 of 28 step sizes, clips and offsets of quantizers"):
        trainer_with(optimizer, quantized_model, tmp_path).create_optimizer()


def test_an_optimizer_that_decays_step_sizes(tmp_path):
    """`AdamW(model.parameters())` after quantization: their own rate is not applied, and decay shrinks the grid."""
    model = quantized()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="scale_lr_ratio=0.1 is not applied to it, and 1 of its groups decay them"):
        trainer_with(optimizer, model, tmp_path, scale_lr_ratio=0.1).create_optimizer()


def test_an_optimizer_of_parameter_groups_is_right(tmp_path):
    """Nothing is said, and warnings are errors here."""
    model = quantized()
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, weight_decay=0.1))
    trainer_with(optimizer, model, tmp_path).create_optimizer()


def test_packing_before_calibration_is_refused(tmp_path):
    """What is saved for use must run: a packed model of a model that was never calibrated would not."""
    model = quantize(vit(), SAQQuantizationConfig())
    message = r"^pack: ViT.* is not calibrated: 14 quantizers have no range yet.* Run `hf_saq.calibrate"
    with pytest.raises(RuntimeError, match=message):
        pack(model)
    trainer = SAQTrainer(model, arguments(tmp_path), train_dataset=Images(8, torch.float32))
    with pytest.raises(RuntimeError, match=message):
        trainer.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["logging", "pipeline", "ViTConfig", "ViTImageProcessor", "no_such_thing", None, 3])
def test_a_configuration_that_names_something_else_than_a_model(name):
    """`architectures` comes from a file: what it names is called only if it is a model."""
    config = vit().config
    config.architectures = [name]
    assert model_class(config) is AutoModelForImageClassification
    config.architectures = json.loads('["ViTForImageClassification"]')
    assert model_class(config) is type(vit())


def test_an_optimizer_that_a_subclass_makes(tmp_path):
    """`create_optimizer` without `super()` is told the same as one that was passed in."""

    class Own(SAQTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, weight_decay=0.1)
            return self.optimizer

    trainer = Own(
        quantized(), arguments(tmp_path, max_steps=1), saq_config=SAQConfig(), train_dataset=Images(8, torch.float32)
    )
    with pytest.warns(UserWarning, match="is not applied to it, and 1 of its groups decay them"):
        trainer.train()


def test_a_training_step_that_leaves_the_perturbed_one_out(tmp_path):
    """It would be plain training under the name of the method."""

    class Own(SAQTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model.train(), self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    for case in (None, 3):
        how = arguments(tmp_path, max_steps=2)
        trainer = Own(quantized(), how, saq_config=SAQConfig(case=case), train_dataset=Images(8, torch.float32))
        with (
            pytest.raises(RuntimeError, match="Own.training_step did not call that of SAQTrainer")
            if case
            else nullcontext()
        ):
            trainer.train()


def test_a_training_step_that_skips_a_batch(tmp_path):
    """A bad batch of images, for example; all others take the step of SAQ."""

    class Skips(SAQTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step in (0, 2):
                return torch.zeros(())
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = Skips(
        quantized(), arguments(tmp_path, max_steps=4), saq_config=SAQConfig(), train_dataset=Images(16, torch.float32)
    )
    with pytest.raises(RuntimeError, match="Skips.training_step did not call that of SAQTrainer"):
        trainer.train()  # so far no step has been one of SAQ
    Skips.training_step = lambda self, *given: (
        torch.zeros(()) if self.state.global_step == 2 else SAQTrainer.training_step(self, *given)
    )
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_loss_that_divides_by_the_count_of_items(tmp_path):
    """Whatever measures beside the training gives it that count too."""

    def summed(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    logged = []
    for loss in (None, summed):
        trainer = SAQTrainer(
            quantized(),
            arguments(tmp_path, max_steps=50, logging_steps=50, seed=3),
            saq_config=SAQConfig(rho=0.1, schedule="full"),
            train_dataset=Images(8, torch.float32),
            compute_loss_func=loss,
        )
        trainer.train()
        logged.append(trainer.state.log_history[0]["measured_sharpness"])
    assert logged[0] == pytest.approx(logged[1], rel=1e-2) and logged[0] != 0


@pytest.mark.parametrize(
    ("config", "is_refused"),
    [
        (SAQConfig(rho=0.1, schedule="full", sync="global"), True),
        (SAQConfig(case=None), True),
        (SAQConfig(rho=0.1, schedule="full"), False),
    ],
    ids=["one_eps_for_a_step", "plain", "as_drawn"],
)
def test_a_subclass_that_gives_a_step_other_batches(config, is_refused, tmp_path):
    """A batch that is left out took all gradients of the step along, or half of its own."""

    class Leaves(SAQTrainer):
        def get_batch_samples(self, *args):
            batches, count = super().get_batch_samples(*args)
            return batches[:1] if is_refused else batches[::-1], count

    how = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    trainer = Leaves(quantized(), how, saq_config=config, train_dataset=Images(32, torch.float32))
    said = "Leaves.get_batch_samples returned 1 micro-batches for a step, and that of SAQTrainer 2"
    with pytest.raises(RuntimeError, match=said) if is_refused else nullcontext():
        trainer.train()


class NamesLogs(TrainerCallback):
    """A callback of the user's, which has a list under the name of a method of hf_saq's own."""

    def __init__(self):
        self.to_log = ["loss"]

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.evaluate(self.trainer.train_dataset, metric_key_prefix="train")


def test_a_loss_on_the_training_data_is_that_of_the_model(tmp_path):
    """A callback evaluates on the training data too; its `train_loss` was named as the mean of a perturbed training
    is."""
    callback = NamesLogs()
    how = arguments(tmp_path, max_steps=2)
    data = Images(8, torch.float32)
    trainer = SAQTrainer(quantized(), how, saq_config=SAQConfig(rho=0.1), train_dataset=data, callbacks=[callback])
    callback.trainer = trainer
    trainer.train()
    evaluated, trained = trainer.state.log_history[-2:]
    assert evaluated["train_loss"] == trainer.evaluate(data)["eval_loss"]
    assert "train_perturbed_loss" in trained and "train_loss" not in trained


class OneIsNaN(InOrder):
    """The loss of one batch is NaN, and the gradients that it leaves are zero."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 1 and self.model.training else loss

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        for p in model.parameters():
            p.grad = None if p.grad is None else torch.nan_to_num(p.grad)
        return loss


@pytest.mark.parametrize(
    ("schedule", "is_filtered", "accumulation"), [("full", True, 1), ("balanced", True, 2), ("balanced", False, 1)]
)
def test_losses_that_are_nan_are_left_out_of_logs_as_trainer_does(schedule, is_filtered, accumulation, tmp_path):
    """`logging_nan_inf_filter`, which is on by default. A perturbation that was left out has no norm."""
    size = BATCH * accumulation
    data = Images(size * 3, torch.float32)
    found = []
    for steps in (3, 1):
        trainer = OneIsNaN(
            quantized_model("vit", torch.float32),
            arguments(
                tmp_path,
                max_steps=3,
                logging_steps=steps,
                learning_rate=0.0,
                gradient_accumulation_steps=accumulation,
                logging_nan_inf_filter=is_filtered,
            ),
            saq_config=SAQConfig(rho=0.1, schedule=schedule, sync="global", log_sharpness=False),
            train_dataset=data,
        )
        trainer.train()
        found.append(trainer.state.log_history[:-1])
    (together,), apart = found
    for name in ("perturbed_loss",) if schedule == "balanced" else ("sharpness",):
        mean = (apart[0][name] + apart[2][name]) / 2
        assert together[name] == pytest.approx(mean, abs=2e-6) if is_filtered else together[name] != together[name]
    assert together["ascent_norm"] == pytest.approx((apart[0]["ascent_norm"] + apart[2]["ascent_norm"]) / 2, rel=1e-5)
    assert together["skipped_perturbations"] == apart[1]["skipped_perturbations"] == 1


class OneCycle(SAQTrainer):
    """A scheduler that gives all groups one rate."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=1e-3, total_steps=4)
        return self.lr_scheduler


def test_step_sizes_that_do_not_learn_at_their_own_rate(tmp_path):
    """A scheduler that sets rates, and a checkpoint of another ratio: `scale_lr_ratio` was ignored. Another number of
    groups is refused by name."""

    def trainer_with_ratio(ratio, cls=SAQTrainer, **changes):
        config = SAQConfig(case=None, scale_lr_ratio=ratio)
        model = quantized_model("vit", torch.float32)
        return cls(model, arguments(tmp_path, **changes), saq_config=config, train_dataset=Images(8, torch.float32))

    with pytest.warns(UserWarning, match="learn at 1 times the rate of the weights, not at SAQConfig.scale_lr_ratio="):
        trainer_with_ratio(0.1, OneCycle, max_steps=1).train()
    trainer_with_ratio(0.1, max_steps=1, save_strategy="steps", save_steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.warns(UserWarning, match=r"learn at 0.1 times .* not at SAQConfig.scale_lr_ratio=0.5"):
        trainer_with_ratio(0.5, max_steps=2).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint-1: its optimizer has other groups .*scale_lr_ratio"):
        trainer_with_ratio(1.0, max_steps=2).train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"distill_alpha": 1.5}, "distill_alpha=1.5"),
        ({"teacher": "vit"}, "teacher is a str"),
        ({"eval_strategy": "epoch"}, "eval_dataset"),  # said by Trainer
        ({"optim": "lomo"}, "steps inside backward"),
    ],
    ids=lambda value: str(value),
)
def test_a_mistake_leaves_the_model_in_float(mistake, message, tmp_path):
    """A user corrects the argument and builds the trainer again, with the same model."""
    model, config = vit(), SAQQuantizationConfig()
    settings = {k: v for k, v in mistake.items() if k in ("eval_strategy", "optim")}
    others = {k: v for k, v in mistake.items() if k not in settings}
    with pytest.raises((ValueError, TypeError), match=message):
        SAQTrainer(model, arguments(tmp_path, **settings), quantization_config=config, **others)
    trainer = SAQTrainer(
        model, arguments(tmp_path), quantization_config=config, train_dataset=Images(8, torch.float32)
    )
    assert trainer.model is model and len(layers(model)) == 14

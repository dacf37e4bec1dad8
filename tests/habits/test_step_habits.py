"""What users do around and inside of the two passes of a step, and what must happen then."""

from __future__ import annotations

import copy

import pytest
import torch
from minimizer_nets import assert_same_state, batch, conv_net, linear_net, loss_of, quantized, state_of, two_passes
from tiny_models import TRANSFORMERS_MODELS
from torch import nn
from training import BATCH, Images, InOrder, arguments, quantized_model

from hf_saq import (
    SAQConfig,
    SAQQuantizationConfig,
    SharpnessAwareMinimizer,
    calibrate,
    parameter_groups,
    quantize,
    reestimate_batch_norm,
)
from hf_saq.sharpness.rounding import RoundingCheck
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep

CASES = (1, 2, 3)
ONE_PASS = [dict(reuse="previous"), dict(reuse="stale", interval=2)]


def gradients(net) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_same_gradients(net, other) -> None:
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def train(cls=InOrder, knobs=None, rho=0.0, case=3, steps=3, tmp_path=None, data=None, **changes):
    """A short run in float32; with a radius of zero it must be plain training, whatever the schedule.

    Running statistics are those of training, to be compared with plain ones.
    """
    plain = SAQConfig(case=None)
    saq_config = plain if case is None else SAQConfig(rho=rho, case=case, norm_batches=0, **(knobs or {}))
    trainer = cls(
        quantized_model("resnet", torch.float32),
        arguments(tmp_path, max_steps=steps, learning_rate=1e-2, **changes),
        saq_config=saq_config,
        train_dataset=data or Images(BATCH * steps * 2, torch.float32),
    )
    trainer.train()
    return trainer


# Subclassing `training_step` -----------------------------------------------------------------------------------------


class Darker(InOrder):
    """Changes the batch on its way to the step, as noise, mixing and attacks do."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = {**inputs, "pixel_values": inputs["pixel_values"] * 0.5}
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize(
    "knobs", [dict(schedule="full"), dict(schedule="balanced"), *ONE_PASS, dict(trigger=True)], ids=str
)
def test_a_batch_that_training_step_changed_is_the_one_that_is_used(knobs, tmp_path):
    found = train(Darker, knobs, tmp_path=tmp_path, gradient_accumulation_steps=2)
    expected = train(Darker, case=None, tmp_path=tmp_path, gradient_accumulation_steps=2)
    unchanged = train(InOrder, case=None, tmp_path=tmp_path, gradient_accumulation_steps=2)
    assert_same_state(found.model, state_of(expected.model))
    assert any(
        not torch.equal(a, b) for a, b in zip(found.model.parameters(), unchanged.model.parameters(), strict=True)
    )


def test_a_batch_that_comes_again_is_the_changed_one(tmp_path):
    """`echo` comes back to the batch as it was trained on; it is not changed a second time."""
    seen = []

    class Watched(Darker):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs["pixel_values"].clone())
            return super().compute_loss(model, inputs, *args, **kwargs)

    data = Images(BATCH * 2, torch.float32)
    train(Watched, dict(reuse="echo", interval=2), rho=0.1, steps=2, tmp_path=tmp_path, data=data)
    assert len(seen) == 2 and all(torch.equal(x, data.pixel_values[:BATCH] * 0.5) for x in seen)


def test_calibration_and_statistics_see_what_training_step_makes_of_a_batch(tmp_path):
    """A user darkens images, or normalizes them on the device, in `training_step`: ranges and batch-norm statistics
    are those of the changed images, and no gradient, step or random number is left of finding them."""
    config = SAQQuantizationConfig(weight_bits=4, activation_bits=4)
    data = Images(BATCH * 4, torch.float32)
    trainer = Darker(
        TRANSFORMERS_MODELS["resnet"](),
        arguments(tmp_path, max_steps=1, learning_rate=0.0),
        saq_config=SAQConfig(case=None, norm_batches=2),
        quantization_config=config,
        train_dataset=data,
    )
    by_hand = quantize(TRANSFORMERS_MODELS["resnet"](), config)
    batches = [{"pixel_values": x * 0.5} for x in data.pixel_values.split(BATCH)]
    calibrate(by_hand, batches)
    by_hand.train()
    reestimate_batch_norm(by_hand, batches[:2])
    trainer.train()
    for name, value in by_hand.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # of the one step
            assert torch.equal(trainer.model.state_dict()[name], value), name
    assert all(p.grad is None for p in trainer.model.parameters())


def test_batches_are_not_kept_after_training(tmp_path):
    assert train(knobs=dict(schedule="full"), tmp_path=tmp_path)._step_batches == []


# Freezing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_what_is_frozen_or_thawed_between_steps_leaves_or_joins_the_perturbation(case):
    """Gradual unfreezing, linear probing then fine-tuning: each step perturbs what is trainable then."""
    net = quantized(conv_net)
    head = [p for name, p in net.named_parameters() if name.startswith("7.")]
    body = [p for name, p in net.named_parameters() if not name.startswith("7.")]
    for p in body:
        p.requires_grad_(False)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3, case=case)
    for trainable in (head, [*body, *head], body):
        for p in net.parameters():
            p.requires_grad_(any(p is q for q in trainable))
        net.zero_grad()
        fresh = copy.deepcopy(net)
        two_passes(net, minimizer, batch(net))
        two_passes(fresh, SharpnessAwareMinimizer(fresh, rho=0.3, case=case), batch(fresh))
        assert_same_gradients(net, fresh)
        assert minimizer.ascent_norm > 0


# Optimizers ----------------------------------------------------------------------------------------------------------


class MovesInTrain(torch.optim.SGD):
    """Like schedule-free optimizers, which keep two points and put one of them in place in `train()` and `eval()`."""

    at_evaluation = True

    def _move(self, distance: float) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(distance)

    def train(self):
        if self.at_evaluation:
            self._move(0.125)
        self.at_evaluation = False

    def eval(self):
        if not self.at_evaluation:
            self._move(-0.125)
        self.at_evaluation = True


@pytest.mark.parametrize("knobs", [dict(schedule="full"), *ONE_PASS, dict(reuse="look", interval=2)], ids=str)
def test_optimizers_that_move_parameters_in_train_and_eval(knobs, tmp_path):
    def run(saq_config):
        model = quantized_model("resnet", torch.float32)
        optimizer = MovesInTrain(parameter_groups(model, learning_rate=1e-2))
        trainer = InOrder(
            model,
            arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1),
            saq_config=saq_config,
            train_dataset=Images(BATCH * 3, torch.float32),
            eval_dataset=Images(BATCH, torch.float32),
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        )
        trainer.train()
        return model

    found, expected = run(SAQConfig(rho=0.0, **knobs)), run(SAQConfig(case=None))
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("context", ["ascent", "recorded"])
def test_an_optimizer_that_steps_inside_backward_is_refused(context):
    """The first pass would step the model."""
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3)
    net[0].weight.register_post_accumulate_grad_hook(lambda p: p.data.sub_(p.grad))
    before = state_of(net)
    with pytest.raises(
        RuntimeError, match="post-accumulate-grad hook, as optimizers have that step inside of backward"
    ):
        with getattr(minimizer, context)():
            pass
    assert_same_state(net, before)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_such_optimizers_of_the_trainer_are_refused_by_name(optim, tmp_path):
    changes = dict(optim=optim, optim_target_modules=["mlp"])
    with pytest.raises(ValueError, match=f"optim='{optim}' steps inside backward"):
        train(tmp_path=tmp_path, **changes)


# A backward inside of the loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_gradients_that_the_loss_clears_are_not_part_of_eps(case, set_to_none):
    """Adversarial training: a backward for the images, `zero_grad`, then the one that counts."""
    net, fresh = quantized(linear_net), quantized(linear_net)
    x, y = batch(net)

    def attacked(model, pass_over):
        with pass_over:
            leaf = x.clone().requires_grad_()
            loss_of(model, (leaf, y)).backward()
            model.zero_grad(set_to_none=set_to_none)
            moved = x + 0.5 * leaf.grad.sign()
            loss_of(model, (moved, y)).backward()
        return moved

    minimizer = SharpnessAwareMinimizer(net, rho=0.3, case=case)
    moved = attacked(net, minimizer.ascent())
    plain = SharpnessAwareMinimizer(fresh, rho=0.3, case=case)
    with plain.ascent():
        loss_of(fresh, (moved, y)).backward()
    found, expected = minimizer.climb().named(net), plain.climb().named(fresh)
    assert found.keys() == expected.keys() and len(found) > 3
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_clearing_in_the_second_of_two_first_passes_is_refused():
    net = quantized(linear_net)
    minimizer = SharpnessAwareMinimizer(net, rho=0.3)
    with minimizer.ascent():
        loss_of(net, batch(net)).backward()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) inside of a first pass that adds to an earlier one"):
        with minimizer.ascent():
            loss_of(net, batch(net)).backward()
            net.zero_grad()
            loss_of(net, batch(net)).backward()


# Autocast ------------------------------------------------------------------------------------------------------------


def test_a_step_inside_of_one_autocast_block_leaves_the_model_as_it_was():
    """Autocast keeps low-precision copies of parameters until its block ends; perturbed ones must not stay in it."""
    net = quantized(linear_net)
    minimizer, data = SharpnessAwareMinimizer(net, rho=5.0), batch(net)
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(data[0])
        with minimizer.ascent():
            loss_of(net, data).backward()
        with minimizer.perturbed():
            perturbed = net(data[0])
            loss_of(net, data).backward()
        assert torch.equal(net(data[0]), expected)
        assert not torch.equal(perturbed, expected)


@pytest.mark.parametrize("how", ["bfloat16_model", "autocast", "float32"])
@pytest.mark.parametrize("rho", [1e-5, 20.0])
def test_a_perturbation_that_low_precision_rounds_away_is_told_of(how, rho, recwarn):
    net = quantized(linear_net)
    if how == "bfloat16_model":
        net.to(torch.bfloat16)
    x, y = batch(net)
    data = x.to(net[0].weight.dtype), y
    minimizer = SharpnessAwareMinimizer(net, rho=rho)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            with minimizer.ascent():
                loss_of(net, data).backward()
            with minimizer.perturbed():
                loss_of(net, data).backward()
    said = [str(warning.message) for warning in recwarn if "rounding to bfloat16 leaves" in str(warning.message)]
    assert len(said) == (1 if how != "float32" and rho < 1 else 0)
    if said:
        assert "of the way that the perturbation moves" in said[0] and "Train in float32" in said[0]


@pytest.mark.parametrize(("close", "left"), [(0.0, "0%"), (0.015, "15%"), (0.06, None)])
def test_few_weights_that_move_far_are_enough(close, left, recwarn):
    """Closed form: all weights are pushed by a tenth of a step of bfloat16; the share `close` of them that lies at an
    edge moves a whole step. Ten times that share of the way is left."""
    step, count = 2.0**-7, 1000  # of bfloat16 between 1 and 2
    w = torch.full((count,), 1.0)
    w[: round(close * count)] += 0.45 * step  # rounds down alone, and up with a tenth of a step more
    check = RoundingCheck()
    with torch.autocast("cpu", torch.bfloat16):
        check.look(w, torch.full((count,), 0.1 * step))
    check.conclude(0.1)
    said = [str(warning.message) for warning in recwarn if "rounding to bfloat16 leaves" in str(warning.message)]
    assert len(said) == (left is not None)
    assert left is None or f"leaves {left} of the way" in said[0]


# One trainer, several trainings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [*ONE_PASS, dict(reuse="look", interval=2), dict(trigger=True)], ids=str)
def test_a_second_training_does_not_go_on_with_the_schedule_of_the_first(knobs, tmp_path):
    """k-fold training on one trainer, restarts with a smaller batch: each begins as a new trainer would."""
    trainer = train(knobs=knobs, rho=0.1, tmp_path=tmp_path)
    first = quantized_model("resnet", torch.float32).state_dict()
    trainer.model.load_state_dict(first)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert_same_state(trainer.model, state_of(train(knobs=knobs, rho=0.1, tmp_path=tmp_path).model))


# Losses that divide by what the Trainer counted ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs", [dict(ascent_fraction=0.5), dict(reuse="stale", interval=2, ascent_fraction=0.5)], ids=str
)
def test_parts_of_uneven_micro_batches_share_one_divisor(knobs):
    """Summed losses, divided by the number of images of the step: `eps` is that of the mean over all parts."""
    net = quantized(linear_net).double()
    sizes = (8, 4)
    batches = [{"x": x.double(), "y": y} for x, y in (batch(net, size, seed=size) for size in sizes)]
    parts = [{name: value[: size // 2] for name, value in b.items()} for b, size in zip(batches, sizes, strict=True)]
    step = ScheduledStep(SharpnessAwareMinimizer(net, rho=0.2, sync="global"), PerturbationSchedule(**knobs))
    divisors = []

    def backward(part, reduce=True):
        divisors.append(sum(sizes) * step.share)
        loss = nn.functional.cross_entropy(net(part["x"]), part["y"], reduction="sum") / divisors[-1]
        loss.backward()
        return loss.detach()

    for k in range(2):
        step.micro_batch(k, batches, backward, 0, 4)
    assert divisors == [6.0, 6.0, 12.0, 12.0]
    fresh = quantized(linear_net).double()
    minimizer = SharpnessAwareMinimizer(fresh, rho=0.2)
    with minimizer.ascent():
        whole = {name: torch.cat([part[name] for part in parts]) for name in ("x", "y")}
        nn.functional.cross_entropy(fresh(whole["x"]), whole["y"]).backward()
    with minimizer.perturbed():
        for x, y in (b.values() for b in batches):
            (nn.functional.cross_entropy(fresh(x), y, reduction="sum") / 12).backward()
    for (name, p), q in zip(net.named_parameters(), fresh.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=0, atol=1e-12, msg=name)


# Batches -------------------------------------------------------------------------------------------------------------


class WithClassWeights(Images):
    """Every batch carries one weight for each class, as many as there are images in it."""

    @staticmethod
    def collate(rows):
        collated = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {**collated, "class_weights": torch.tensor([1.0, 2.0, 3.0])}


class WeightedLoss(InOrder):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(pixel_values=inputs["pixel_values"]).logits
        return nn.functional.cross_entropy(logits, inputs["labels"], weight=inputs["class_weights"])


def test_a_default_that_nobody_set_breaks_no_loss(tmp_path):
    """The default schedule takes parts of batches. A value that is not one entry a sample stays whole, and so does the
    batch; that is said once."""
    data = WithClassWeights(6, torch.float32)
    trainer = WeightedLoss(
        quantized_model("vit", torch.float32),
        arguments(tmp_path, max_steps=2, per_device_train_batch_size=3),
        saq_config=SAQConfig(rho=0.1),
        train_dataset=data,
        data_collator=WithClassWeights.collate,
    )
    with pytest.warns(UserWarning, match="whether class_weights has one entry a sample is not known") as said:
        trainer.train()
    assert sum("class_weights" in str(warning.message) for warning in said) == 1


def test_nothing_grows_while_logging_is_off(tmp_path):
    trainer = train(knobs=dict(schedule="full"), rho=0.1, steps=4, tmp_path=tmp_path, logging_strategy="no")
    kept = [value for value in vars(trainer._logs).values() if isinstance(value, dict)]
    assert all(not isinstance(entry, (list, dict)) for value in kept for entry in value.values())

"""Every schedule in `SAQTrainer` against a plain-PyTorch loop: the same parameters, and as many passes as it says."""

from __future__ import annotations

import tempfile
from functools import cache

import pytest
import torch
from reference import largest_difference
from torch import nn
from training import BATCH, Images, InOrder, arguments, make_trainer, quantized_model, scheduled_reference

from hf_saq import SAQConfig, SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, quantize
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep

TOLERANCE = 1e-11
"""Of float64 parameters after the steps below; they move by more than 1e-5."""

STEPS = 4
RUNS = [
    ("vit", 3, 1, "local", dict(interval=2)),
    ("resnet", 3, 2, "local", dict(ascent_fraction=0.5)),
    ("vit", 2, 2, "global", dict(ascent_fraction=0.3, interval=3, start=0.3)),
    ("vit", 3, 1, "local", dict(reuse="stale", interval=3)),
    ("resnet", 3, 2, "local", dict(reuse="stale", interval=2, start=0.3)),
    ("vit", 1, 2, "global", dict(reuse="stale", interval=2, ascent_fraction=0.5)),
    ("vit", 3, 2, "local", dict(reuse="previous")),
    ("resnet", 3, 1, "local", dict(reuse="previous")),
    ("vit", 1, 1, "local", dict(reuse="previous", start=0.3)),
    ("vit", 2, 2, "global", dict(reuse="previous")),
    ("vit", 3, 2, "local", dict(reuse="echo", interval=2)),
    ("resnet", 3, 1, "local", dict(reuse="echo", interval=3)),
    ("vit", 1, 1, "global", dict(reuse="echo", interval=2, start=0.3)),
    ("resnet", 2, 2, "global", dict(reuse="echo", interval=2)),
    ("vit", 3, 1, "local", dict(reuse="look", interval=3)),
    ("resnet", 3, 2, "local", dict(reuse="look", interval=2)),
    ("vit", 1, 2, "global", dict(reuse="look", interval=2, start=0.3)),
    ("vit", 2, 1, "local", dict(reuse="look", interval=2)),
    ("vit", 3, 1, "local", dict(trigger=True)),
    ("resnet", 3, 2, "local", dict(trigger=True)),
    ("vit", 1, 2, "local", dict(trigger=True)),
    ("vit", 2, 2, "global", dict(trigger=True, start=0.3)),
    ("vit", 3, 2, "local", dict(ascent_depth=0.5)),
    ("vit", 2, 1, "local", dict(ascent_depth=0.5, start=0.3)),
    ("vit", 1, 2, "global", dict(ascent_depth=0.5, interval=2)),
    ("resnet", 3, 2, "global", dict(ascent_depth=0.5)),
]
IDS = [f"{f}-case{c}-x{a}-{s}-" + "-".join(f"{k}={v}" for k, v in knobs.items()) for f, c, a, s, knobs in RUNS]


def expected_samples(kinds: list[str], fraction: float) -> list[int]:
    """Samples that go through the model in each step, for each micro-batch."""
    first_pass = {"two passes": -(-BATCH * round(fraction * 10) // 10), "fired": BATCH}
    return [BATCH + first_pass.get(kind, 0) for kind in kinds]


@cache
def every_step(family, case, accumulation, sync):
    """Two passes in every step: where a run would end on which its knobs had no effect."""
    return scheduled_reference(family, case, accumulation, sync, {}, count=STEPS)[0]


@pytest.mark.parametrize(("family", "case", "accumulation", "sync", "knobs"), RUNS, ids=IDS)
def test_training_equals_the_reference(family, case, accumulation, sync, knobs, tmp_path):
    trainer = make_trainer(family, case, accumulation, sync, tmp_path, knobs=knobs, max_steps=STEPS)
    samples, backwards = [0] * STEPS, [0] * STEPS

    def count(module, args, kwargs, output):
        samples[trainer.state.global_step] += len(output.logits)

    trainer.model.register_forward_hook(count, with_kwargs=True)
    backward = trainer.accelerator.backward

    def counted(loss, **kwargs):
        backwards[trainer.state.global_step] += 1
        backward(loss, **kwargs)

    trainer.accelerator.backward = counted
    trainer.train()
    expected, kinds = scheduled_reference(family, case, accumulation, sync, knobs, count=STEPS)
    assert largest_difference(trainer.model, expected) < TOLERANCE
    fraction = knobs.get("ascent_fraction", 1)
    looked = [0] * STEPS
    if "ascent_depth" in knobs:  # three more passes: one finds the last layers, two try how they are perturbed
        looked[kinds.index("two passes")] = 3
    passes = [accumulation * n for n in expected_samples(kinds, fraction)]
    assert samples == [n + BATCH * extra for n, extra in zip(passes, looked, strict=True)]
    passes = [accumulation * (2 if kind in ("two passes", "fired") else 1) for kind in kinds]
    assert backwards == [n + extra for n, extra in zip(passes, looked, strict=True)]
    assert largest_difference(trainer.model, every_step(family, case, accumulation, sync)) > 1e3 * TOLERANCE


@cache
def plain(family):
    """A run without perturbation."""
    return run_in_float32(family, SAQConfig(case=None), "")


def run_in_float32(family, saq_config, output_dir):
    args = arguments(
        output_dir or tempfile.gettempdir(), max_steps=STEPS, optim="adamw_torch", gradient_accumulation_steps=2
    )
    model, data = quantized_model(family, torch.float32), Images(2 * STEPS * BATCH, torch.float32)
    trainer = InOrder(model, args, saq_config=saq_config, train_dataset=data)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("family", "knobs"),
    [
        ("resnet", dict(ascent_fraction=0.5)),
        ("resnet", dict(reuse="stale", interval=2)),
        ("resnet", dict(reuse="previous")),
        ("resnet", dict(reuse="look", interval=2)),
        ("resnet", dict(trigger=True)),
    ],
    ids=str,
)
def test_rho_zero_is_plain_training_bit_for_bit(family, knobs, tmp_path):
    """Weights, and running statistics: they are updated once in each step, also where its only pass is perturbed."""
    found = run_in_float32(family, SAQConfig(rho=0.0, norm_batches=0, **knobs), tmp_path).model.state_dict()
    for name, value in plain(family).model.state_dict().items():
        assert torch.equal(found[name], value), name


def test_a_loss_that_is_logged_is_the_clean_one_or_has_another_name(tmp_path):
    """Where a step has no clean loss of the whole batch there is no `loss`, so that no two trainings are compared by
    numbers that mean different things."""
    logs = {}
    for name, knobs in (
        ("none", dict(start=1.0)),
        ("previous", dict(reuse="previous")),
        ("trigger", dict(trigger=True)),
        ("echo", dict(reuse="echo", interval=2)),
        ("part", dict(ascent_fraction=0.5)),
    ):
        accumulation = 2 if name == "part" else 1
        sync = "global" if name == "part" else "local"
        trainer = make_trainer("vit", 3, accumulation, sync, tmp_path, knobs=knobs, max_steps=3)
        trainer.train()
        logs[name] = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    first, second, third = logs["previous"]
    assert first["loss"] == logs["none"][0]["loss"]  # the first step has nothing to perturb with
    assert "perturbed_loss" not in first and "loss" not in second and "loss" not in third
    assert second["perturbed_loss"] > 0 and third["perturbed_loss"] > 0
    assert all("sharpness" not in entry for entry in logs["previous"] + logs["none"] + logs["echo"])
    assert all(entry["ascent_norm"] > 0 for entry in logs["previous"])
    for entry in logs["trigger"]:
        assert "loss" in entry and "perturbed_loss" not in entry
        assert entry["perturbed_share"] in (0, 1) and ("sharpness" in entry) == (entry["perturbed_share"] == 1)
    assert ["loss" in entry for entry in logs["echo"]] == [True, False, True]
    assert ["perturbed_loss" in entry for entry in logs["echo"]] == [False, True, False]
    assert all("loss" not in entry for entry in logs["part"])
    perturbed = make_trainer("vit", 3, 2, "global", tmp_path, knobs=dict(schedule="full"), max_steps=1)
    perturbed.train()
    entry = perturbed.state.log_history[0]
    # Both are losses of the whole batch at a point within `rho` of `Q(w)`; those of parts would be divided by two.
    assert logs["part"][0]["perturbed_loss"] == pytest.approx(entry["loss"] + entry["sharpness"], rel=0.2)


def test_losses_between_two_lines_of_the_log_are_told_apart(tmp_path):
    trainer = make_trainer("vit", 3, 2, "local", tmp_path, knobs=dict(reuse="echo", interval=2), max_steps=4)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    summed = make_trainer(
        "vit", 3, 2, "local", tmp_path, knobs=dict(reuse="echo", interval=2), max_steps=4, logging_steps=4
    )
    summed.train()
    (entry,) = [entry for entry in summed.state.log_history if "learning_rate" in entry]
    assert entry["loss"] == pytest.approx((lines[0]["loss"] + lines[2]["loss"]) / 2, rel=1e-5)
    assert entry["perturbed_loss"] == pytest.approx(
        (lines[1]["perturbed_loss"] + lines[3]["perturbed_loss"]) / 2, rel=1e-5
    )


def test_a_batch_that_comes_again_brings_its_own_count(tmp_path):
    """The second batch that is drawn has more counted labels than the first, which is trained on twice."""

    class FewerLabels(Images):
        def __getitem__(self, index):
            return {**super().__getitem__(index), **({"labels": torch.tensor(-100)} if index in (0, 1) else {})}

    def summed(outputs, labels, num_items_in_batch=None):
        seen.append((labels.tolist(), float(num_items_in_batch)))
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    seen: list[tuple[list[int], float]] = []
    trainer = InOrder(
        quantized_model("vit"),
        arguments(tmp_path, max_steps=2),
        saq_config=SAQConfig(rho=0.1, reuse="echo", interval=2),
        train_dataset=FewerLabels(2 * BATCH),
        compute_loss_func=summed,
    )
    trainer.train()
    assert seen[0] == seen[1] and seen[0][1] == BATCH - 2


def test_no_sharpness_of_different_images(tmp_path):
    trainer = make_trainer("vit", 3, 1, "local", tmp_path, knobs=dict(ascent_fraction=0.5), max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert "sharpness" not in entry and entry["ascent_norm"] > 0


def test_counted_items_are_those_of_the_part(tmp_path):
    """A loss that divides by the number of images of the step, as `Trainer` counts them: of the first pass, by the
    number of those that it sees."""

    def summed(outputs, labels, num_items_in_batch=None):
        seen.append((len(labels), float(num_items_in_batch)))
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    seen: list[tuple[int, float]] = []
    trainer = InOrder(
        quantized_model("vit"),
        arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2),
        saq_config=SAQConfig(rho=0.1, ascent_fraction=0.5),
        train_dataset=Images(2 * BATCH),
        compute_loss_func=summed,
    )
    trainer.train()
    assert seen == [(BATCH // 2, BATCH), (BATCH, 2 * BATCH)] * 2


def test_a_loss_scale_is_divided_out():
    """A GradScaler multiplies losses: the trigger and the log see gradients without it, and what is kept does not
    change. Scales of powers of two, so that nothing is rounded."""
    results = []
    for knobs in (dict(trigger=True), dict(reuse="look", interval=2), dict(reuse="previous")):
        for scales in ((1.0,) * STEPS, (2.0**10, 2.0**9, 2.0**12, 2.0**8)):
            net, data = quantized_model("vit"), Images(BATCH * STEPS)
            now = [1.0]
            minimizer = SharpnessAwareMinimizer(net, rho=0.2)
            step = ScheduledStep(minimizer, PerturbationSchedule(**knobs), loss_scale=lambda now=now: now[0])

            def backward(batch, reduce=True, net=net, now=now):
                loss = net(pixel_values=batch[0], labels=batch[1]).loss
                (loss * now[0]).backward()
                return loss.detach()

            optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
            batches = zip(data.pixel_values.split(BATCH), data.labels.split(BATCH), strict=True)
            norms = []
            for k, (batch, now[0]) in enumerate(zip(batches, scales, strict=True)):
                norms.append(step.micro_batch(0, [batch], backward, k, STEPS).ascent_norm or 0.0)
                for p in net.parameters():
                    p.grad = None if p.grad is None else p.grad / now[0]
                optimizer.step()
                optimizer.zero_grad()
            mean = step.rule.trigger.mean if knobs == dict(trigger=True) else 0.0
            results.append((norms, mean, [p.detach().clone() for p in net.parameters()]))
        (norms, mean, parameters), (scaled_norms, scaled_mean, scaled_parameters) = results[-2:]
        assert norms == pytest.approx(scaled_norms, rel=1e-12) and mean == pytest.approx(scaled_mean, rel=1e-12)
        for a, b in zip(parameters, scaled_parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_two_images_at_least_make_the_perturbation():
    """An eighth of eight images would be one, of which a batch norm on 1 x 1 pixels has no statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)
    )
    quantize(model, SAQQuantizationConfig())
    x, y = torch.randn(8, 3, 6, 6), torch.randint(2, (8,))
    calibrate(model, [x])
    seen = []

    def backward(batch, reduce=True):
        seen.append(len(batch["y"]))
        loss = nn.functional.cross_entropy(model.train()(batch["x"]), batch["y"])
        loss.backward()
        return loss

    step = ScheduledStep(SharpnessAwareMinimizer(model, 0.1), SAQConfig(rho=0.1).perturbation_schedule())
    outcome = step.micro_batch(0, [{"x": x, "y": y}], backward, 0, 1)
    assert seen == [2, 8] and outcome.ascent_norm > 0

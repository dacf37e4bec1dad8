"""The radius of an `eps` made of a part of its batch is matched to the full step's by the rise of the loss."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from training import BATCH, Images, InOrder, make_trainer, quantized_model

from hf_saq import SAQConfig, SharpnessAwareMinimizer
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep
from hf_saq.sharpness.schedules.radius import EVERY, LARGEST, RadiusMatch
from hf_saq.sharpness.schedules.rule import Outcome

RHO = 1e-3
SAMPLES, FEATURES = 64, 12


class Linear(nn.Module):
    """A loss that is linear in its only weight, the mean over samples of `x . w`: it rises by `g . eps`."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(FEATURES, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w).mean()


class TwoLayers(nn.Module):
    """`x A b`, the mean over samples: `A` comes first, `b` is the end of the model."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(FEATURES, 4, bias=False, dtype=torch.float64)
        self.b = nn.Linear(4, 1, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)).mean()


def set_up(model: nn.Module | None = None, **knobs: float):
    model = model or Linear()
    minimizer = SharpnessAwareMinimizer(model, rho=RHO, perturb=["other"])
    step = ScheduledStep(minimizer, PerturbationSchedule(match_radius=True, **knobs))

    def backward(batch, reduce=True):
        loss = model(batch)
        loss.backward()
        return loss.detach()

    return model, step, backward


def test_the_factor_goes_to_the_ratio_of_the_rises():
    """With a linear loss the full step raises it by `rho * |g|`, and `eps` of a part by `rho * g . g_part / |g_part|`:
    the factor that makes them equal is one over the cosine. The square root of the ratio gets there in a few
    measurements."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64) + 0.2
    model, step, backward = set_up(ascent_fraction=0.25)
    g, part = x.mean(dim=0), x[: SAMPLES // 4].mean(dim=0)
    cosine = float(g @ part / g.norm() / part.norm())
    assert 0.3 < cosine < 0.9  # something to match
    factors = []
    for number in range(EVERY + 1):
        outcome = step.micro_batch(0, [x], backward, number, EVERY + 1)
        factors.append(outcome.radius_factor)
        model.zero_grad()
    # Steps 1, 2, 4, ... are measured, and the next one uses what was found; the last one here is itself measured.
    assert factors[0] == factors[1] == 1.0 and factors[3] == pytest.approx(cosine**-0.75, rel=1e-4) == factors[4]
    assert math.log(factors[-1] * cosine) == pytest.approx(math.log(cosine) * 0.5**7, rel=0.02)


def test_of_the_last_layers_it_goes_to_the_ratio_of_the_rises_too():
    """To first order the full step raises the loss by `rho * |g|` with `g` of all layers, and `eps` in the last ones
    by `rho * |g_late|`; the rest is of second order in `rho`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64) + 0.2
    torch.manual_seed(0)
    model, step, backward = set_up(TwoLayers(), ascent_depth=0.1)
    model(x).backward()
    ratio = float((model.a.weight.grad.square().sum() / model.b.weight.grad.square().sum() + 1).sqrt())
    assert 1.2 < ratio < 8  # something to match
    model.zero_grad()
    factors, norms = [], []
    for number in range(5):
        outcome = step.micro_batch(0, [x], backward, number, 5)
        factors.append(outcome.radius_factor)
        norms.append(step.minimizer.ascent_norm)
        assert step.minimizer.late.first == "b"
        model.zero_grad()
    late = model.a(x).detach().mean(dim=0).norm().item()
    assert norms == pytest.approx([late] * 5, rel=1e-6)  # the step's own `eps` is of the last layers, measured or not
    assert factors[0] == factors[1] == 1.0 and factors[3] == pytest.approx(ratio**0.75, rel=0.02) == factors[4]


@pytest.mark.parametrize("knobs", [dict(ascent_fraction=0.5), dict(ascent_depth=0.25)], ids=str)
def test_what_is_measured_leaves_no_trace_but_the_factor(knobs: dict):
    """A measured step with a factor that stays 1 gives the gradients, statistics and random state of one that is not
    measured."""
    found = []
    for matched in (False, True):
        torch.manual_seed(0)
        model = quantized_model("resnet", torch.float32).train()
        minimizer = SharpnessAwareMinimizer(model, rho=0.1)
        step = ScheduledStep(minimizer, PerturbationSchedule(match_radius=matched, **knobs))
        if matched:
            step.radius.end_step = lambda: None
        data = Images(2 * BATCH, torch.float32)
        batches = [
            {"pixel_values": x, "labels": y}
            for x, y in zip(data.pixel_values.split(BATCH), data.labels.split(BATCH), strict=True)
        ]

        def backward(batch, reduce=True, model=model):
            loss = model(**batch).loss / 2
            loss.backward()
            return loss.detach()

        for number in range(2):
            for k in range(2):
                step.micro_batch(k, batches, backward, number, 2)
        found.append(
            [p.grad for p in model.parameters() if p.grad is not None]
            + list(model.buffers())
            + [torch.get_rng_state()]
        )
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_perturbation_that_does_not_climb_gets_a_larger_radius_within_bounds():
    model, step, backward = set_up(ascent_fraction=0.25)
    downhill = torch.cat([-torch.ones(SAMPLES // 4, FEATURES), torch.ones(3 * SAMPLES // 4, FEATURES)]).double()
    for number in range(EVERY + 1):
        step.micro_batch(0, [downhill], backward, number, EVERY + 1)
        model.zero_grad()
    assert step.radius.factor == LARGEST


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_changes_nothing(bad: float):
    minimizer = SharpnessAwareMinimizer(Linear(), rho=RHO, perturb=["other"])
    outcomes = {
        True: Outcome(torch.tensor(bad), is_clean=False),
        False: Outcome(torch.tensor(1.0), [torch.tensor(bad)]),
    }
    for of_parts, outcome in outcomes.items():
        match = RadiusMatch(minimizer, of_parts)
        match._full = torch.tensor(1.0), torch.tensor(0.5)
        match.add(outcome)
        match.end_step()
        assert match.factor == 1.0 and minimizer.radius_factor == 1.0


@pytest.mark.parametrize("sizes", [(2, 2), (16, 2), (2, 16)], ids=str)
def test_batches_that_are_too_small_to_part_say_nothing(sizes):
    """Their first pass sees them whole, so that they rise as in the full step."""
    model, step, backward = set_up(ascent_fraction=0.125)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, FEATURES, generator=generator, dtype=torch.float64) for size in sizes]
    step.radius.load_state({"factor": 1.5, "steps": 1})  # the next one is measured
    for k in range(2):
        step.micro_batch(k, batches, backward, 1, 4)
    assert step.radius.factor == step.minimizer.radius_factor == 1.5 and step.radius.steps == 2


@pytest.mark.parametrize(
    ("part", "sync"),
    [
        (dict(ascent_fraction=0.5), "local"),
        (dict(ascent_depth=0.25), "global"),
        pytest.param(dict(ascent_fraction=0.5), "global", marks=pytest.mark.slow),
        pytest.param(dict(ascent_depth=0.25), "local", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_trainer_logs_it_and_resumes_with_it(part: dict, sync: str, tmp_path):
    """Accumulation of two, stopped after a measured step: the resumed run ends where the whole one does."""
    knobs = dict(**part, match_radius=True)
    how = dict(knobs=knobs, max_steps=6, save_strategy="steps", save_steps=3)
    whole = make_trainer("vit", 3, 2, sync, tmp_path / "whole", **how)
    whole.train()
    factors = [entry["radius_factor"] for entry in whole.state.log_history if "radius_factor" in entry]
    assert len(factors) == 6 and factors[0] == 1 and len(set(factors)) > 2
    resumed = make_trainer("vit", 3, 2, sync, tmp_path / "whole", **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.scheduled_step.state()[1] == whole.scheduled_step.state()[1]
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


class Darker(InOrder):
    """Changes the batch on its way to the step, as noise, mixing and normalization on a GPU do."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = {**inputs, "pixel_values": inputs["pixel_values"] * 0.25}
        return super().training_step(model, inputs, num_items_in_batch)


class DarkImages(Images):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "pixel_values": self.pixel_values[index] * 0.25}


def test_it_is_measured_on_the_images_that_are_trained_on(tmp_path):
    """Two micro-batches a step, of which the second was measured as it was before `training_step` changed it."""
    knobs = dict(ascent_fraction=0.5, match_radius=True)
    changing = make_trainer("vit", 3, 2, "local", tmp_path, knobs=knobs, max_steps=4, cls=Darker)
    of_dark = make_trainer("vit", 3, 2, "local", tmp_path, knobs=knobs, max_steps=4)
    of_dark.train_dataset = DarkImages(len(of_dark.train_dataset))
    for trainer in (changing, of_dark):
        trainer.train()
    assert changing.scheduled_step.radius.factor != 1.0
    assert changing.scheduled_step.state()[1] == of_dark.scheduled_step.state()[1]


def test_a_second_training_starts_with_the_radius_as_it_is(tmp_path):
    knobs = dict(ascent_fraction=0.5, match_radius=True)
    trainer = make_trainer("vit", 3, 1, "local", tmp_path, knobs=knobs, max_steps=3)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    first = copy.deepcopy(trainer.model.state_dict())
    trainer.model.load_state_dict(before)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert all(torch.equal(value, first[name]) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(
    "knobs",
    [dict(), dict(reuse="previous"), dict(reuse="stale", interval=2, ascent_fraction=0.5), dict(trigger=True)],
    ids=str,
)
def test_where_there_is_nothing_to_match(knobs: dict):
    with pytest.raises(
        ValueError, match="match_radius=True with ascent_fraction=.*Set ascent_fraction or ascent_depth below"
    ):
        PerturbationSchedule(match_radius=True, **knobs)
    with pytest.raises(ValueError, match="SAQConfig.match_radius=True with ascent_fraction=.*"):
        SAQConfig(match_radius=True, **knobs)

"""`SAQTrainer` re-estimates batch-norm statistics before a model is evaluated or saved, where a schedule needs it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch.utils.data import IterableDataset
from training import BATCH, Images, InOrder, arguments, quantized_model
from transformers import TrainerCallback

from hf_saq import SAQConfig, reestimate_batch_norm
from hf_saq.training.saving import go_on_from

STEPS = 4


def trained(tmp_path, saq_config: SAQConfig, family: str = "resnet", data=None, **changes) -> InOrder:
    torch.manual_seed(0)
    trainer = InOrder(
        quantized_model(family, torch.float32),
        arguments(tmp_path, max_steps=STEPS, **changes),
        saq_config=saq_config,
        train_dataset=Images(STEPS * BATCH, torch.float32) if data is None else data,
        eval_dataset=Images(BATCH, torch.float32),
    )
    trainer.train()
    return trainer


def states(model) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of `model`, running statistics apart from what is trained."""
    found = {"statistics": {}, "trained": {}}
    for name, value in model.state_dict().items():
        found["statistics" if "running_" in name else "trained"][name] = value.clone()
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], value) for name, value in b.items())


def test_the_model_that_is_left_has_statistics_of_its_own_weights(tmp_path):
    """They are those of a re-estimation by hand; the trained weights are the same with and without it."""
    config = {"rho": 0.2, "reuse": "previous"}
    without = trained(tmp_path, SAQConfig(**config, norm_batches=0)).model
    found = trained(tmp_path, SAQConfig(**config, norm_batches=2)).model
    assert equal(states(found)["trained"], states(without)["trained"])
    assert not equal(states(found)["statistics"], states(without)["statistics"])
    first = Images(STEPS * BATCH, torch.float32).pixel_values.split(BATCH)[:2]
    reestimate_batch_norm(without, [{"pixel_values": batch} for batch in first])
    for name, value in states(found)["statistics"].items():
        torch.testing.assert_close(states(without)["statistics"][name], value, rtol=1e-6, atol=1e-7)


def test_evaluating_more_often_changes_nothing_in_training(tmp_path):
    config = SAQConfig(rho=0.2, ascent_fraction=0.5, norm_batches=2)
    often = trained(tmp_path, config, eval_strategy="steps", eval_steps=1).model
    assert equal(often.state_dict(), trained(tmp_path, config).model.state_dict())


def test_every_evaluation_sees_them(tmp_path, monkeypatch):
    from hf_saq.training import reestimating_norms

    calls = []
    original = reestimating_norms.reestimate_batch_norm

    def counted(model, batches, run):
        calls.append(trainer_step[0])
        return original(model, batches, run)

    trainer_step = [0]
    monkeypatch.setattr(reestimating_norms, "reestimate_batch_norm", counted)

    class Watched(InOrder):
        def evaluate(self, *args, **kwargs):
            assert len(calls) == self.state.global_step // 2
            return super().evaluate(*args, **kwargs)

    trainer = Watched(
        quantized_model("resnet", torch.float32),
        arguments(tmp_path, max_steps=STEPS, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2),
        saq_config=SAQConfig(rho=0.2, reuse="previous"),
        train_dataset=Images(STEPS * BATCH, torch.float32),
        eval_dataset=Images(BATCH, torch.float32),
    )
    trainer.train()
    assert len(calls) == 2  # once for evaluation and checkpoint of a step together


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        (dict(case=None), 0),
        (dict(schedule="full"), 0),
        (dict(reuse="echo", interval=2), 0),
        (dict(reuse="look", interval=2), 0),
        (dict(trigger=True), 0),
        (dict(ascent_fraction=0.5), 16),
        (dict(reuse="previous"), 16),
        (dict(reuse="stale", interval=2), 16),
        (dict(case=None, norm_batches=3), 3),
        (dict(reuse="previous", norm_batches=0), 0),
    ],
    ids=str,
)
def test_what_needs_it(knobs: dict, expected: int, tmp_path):
    def trainer(family: str) -> InOrder:
        return InOrder(quantized_model(family), arguments(tmp_path), saq_config=SAQConfig(rho=0.1, **knobs))

    assert trainer("resnet").norm_batches == expected
    assert trainer("vit").norm_batches == 0  # layer norms keep no statistics


def test_a_stream_loses_no_sample(tmp_path, caplog):
    class Stream(IterableDataset):
        def __init__(self):
            self.samples = iter(Images(STEPS * BATCH, torch.float32))

        def __iter__(self):
            return self.samples

    images = Images(STEPS * BATCH, torch.float32)
    stream = Stream()
    stream.samples = (images[k] for k in range(len(images)))
    with caplog.at_level(logging.WARNING, "hf_saq"):
        trainer = trained(tmp_path, SAQConfig(rho=0.2, reuse="previous"), data=stream)
    assert trainer.state.global_step == STEPS
    assert "Batch-norm statistics are not re-estimated: train_dataset is a stream" in caplog.text


class Around(TrainerCallback):
    """Looks at the model after each step, or evaluates an average in its place, as callbacks do."""

    def __init__(self, does: str):
        self.looks, self.written = does == "looks", lambda p: p.data if does == "swaps through data" else p

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.looks:
            self.trainer.predict(Images(BATCH, torch.float32))
            self.seen = copy.deepcopy(model)
            return
        self.kept = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for p in model.parameters():
                self.written(p).mul_(1.5)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, p in model.named_parameters():
                self.written(p).copy_(self.kept[name])


@pytest.mark.parametrize("does", ["looks", "swaps", "swaps through data"])
def test_statistics_are_those_of_the_weights_at_hand_where_callbacks_ask(does, tmp_path):
    """A prediction that a callback asks for had those of perturbed passes; a checkpoint had those of the average that
    was evaluated before, and longer where that was put in place through `p.data`, which changes no version."""
    data, callback = Images(STEPS * BATCH, torch.float32), Around(does)
    looks = callback.looks
    when = {} if looks else dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    trainer = InOrder(
        quantized_model("resnet", torch.float32),
        arguments(tmp_path, max_steps=2, **when),
        saq_config=SAQConfig(rho=0.2, reuse="previous", norm_batches=2),
        train_dataset=data,
        eval_dataset=Images(BATCH, torch.float32),
        callbacks=[callback],
    )
    callback.trainer = trainer
    trainer.train()
    if looks:
        model = callback.seen
    else:
        model = quantized_model("resnet", torch.float32)
        go_on_from(model, str(tmp_path / "checkpoint-2"))
    found = states(model)["statistics"]
    reestimate_batch_norm(model, [{"pixel_values": x} for x in data.pixel_values.split(BATCH)[:2]])
    for name, value in states(model)["statistics"].items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


class AtTwoPoints(torch.optim.SGD):
    """Like schedule-free optimizers: `eval()` puts other weights in place than `train()`."""

    is_evaluating = False

    def _move(self, distance: float) -> None:
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"] if p.ndim > 1):
                p.mul_(distance)

    def train(self) -> None:
        if self.is_evaluating:
            self._move(0.5)
        self.is_evaluating = False

    def eval(self) -> None:
        if not self.is_evaluating:
            self._move(2.0)
        self.is_evaluating = True


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_statistics_are_those_of_the_weights_that_are_evaluated(strategy, tmp_path):
    """`Trainer` lets such optimizers put other weights in place for an evaluation, after the re-estimation."""
    model = quantized_model("resnet", torch.float32)
    optimizer = AtTwoPoints(model.parameters(), lr=0.0)
    data = Images(STEPS * BATCH, torch.float32)
    trainer = InOrder(
        model,
        arguments(tmp_path, max_steps=1, eval_strategy=strategy, eval_steps=1),
        saq_config=SAQConfig(rho=0.2, reuse="previous", norm_batches=2, scale_lr_ratio=1.0),
        train_dataset=data,
        eval_dataset=Images(BATCH, torch.float32),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
    )
    trainer.train()
    assert optimizer.is_evaluating == (strategy == "steps")  # as `Trainer` alone leaves it
    trainer.evaluate()
    found = states(model)["statistics"]
    reestimate_batch_norm(model, [{"pixel_values": x} for x in data.pixel_values.split(BATCH)[:2]])
    for name, value in states(model)["statistics"].items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)

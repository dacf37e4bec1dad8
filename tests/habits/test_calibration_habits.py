"""What users train on and with, and how a model without activation ranges is calibrated: as training will run it."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from tiny_models import NUM_LABELS, images, resnet, vit
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from training import BATCH, Images, InOrder, arguments
from transformers import TrainerCallback

from hf_saq import SAQConfig, SAQQuantizationConfig, calibrate, quantize
from hf_saq.conversion import is_calibrated, needs_calibration
from hf_saq.quantizers import Quantizer


def trainer_of(model, tmp_path, cls=InOrder, data=None, config=None, steps=2, changes=None, **kwargs):
    return cls(
        model,
        arguments(tmp_path, max_steps=steps, **(changes or {})),
        saq_config=SAQConfig(case=None),
        quantization_config=config or SAQQuantizationConfig(),
        train_dataset=data if data is not None else Images(8, torch.float32),
        **kwargs,
    )


class CalledByHand(InOrder):
    """A model with a forward of its own: called with a position, and with nothing that it does not know."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return nn.functional.cross_entropy(model(inputs["pixel_values"]), inputs["labels"])


class NeedsLabels(nn.Module):
    """A forward that is of no use without labels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Linear(8, NUM_LABELS))

    def forward(self, pixel_values, labels):
        logits = self.net(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Attack(InOrder):
    """Adversarial training: the loss runs a backward of its own, then clears gradients."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        leaf = inputs["pixel_values"].clone().requires_grad_()
        model(pixel_values=leaf, labels=inputs["labels"]).loss.backward()
        model.zero_grad()
        moved = inputs["pixel_values"] + 0.1 * leaf.grad.sign()
        return model(pixel_values=moved, labels=inputs["labels"]).loss


def with_a_number(rows):
    """A collator that adds a tensor without dimensions, as one for a temperature or an epoch."""
    collated = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**collated, "temperature": torch.tensor(2.0)}


class UsesTheNumber(InOrder):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(pixel_values=inputs["pixel_values"], labels=inputs["labels"]).loss / inputs["temperature"]


def summed_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, NUM_LABELS))


@pytest.mark.parametrize(
    ("build", "cls", "kwargs"),
    [
        (small_net, CalledByHand, {}),
        (NeedsLabels, InOrder, {}),
        (vit, Attack, {}),
        (vit, UsesTheNumber, dict(data_collator=with_a_number)),
        (vit, InOrder, dict(compute_loss_func=summed_loss)),
    ],
    ids=["called_by_hand", "needs_labels", "backward_in_the_loss", "tensor_without_dimensions", "loss_by_items"],
)
def test_whatever_training_runs_calibrates(build, cls, kwargs, tmp_path):
    model = build()
    trainer = trainer_of(model, tmp_path, cls, **kwargs)
    trainer.calibrate_if_needed()
    assert is_calibrated(model) and all(p.grad is None for p in model.parameters())
    trainer.train()


class OwnLoader(InOrder):
    """A loader of one's own: the batches of training are twice as bright as the data set."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=BATCH, collate_fn=self.brighten)

    @staticmethod
    def brighten(rows):
        return {
            "pixel_values": 2 * torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.stack([row["labels"] for row in rows]),
        }


def test_ranges_are_those_of_the_batches_that_training_sees(tmp_path):
    data = Images(8, torch.float32)
    trainer = trainer_of(resnet(), tmp_path, OwnLoader, data)
    trainer.calibrate_if_needed()
    expected = quantize(resnet(), SAQQuantizationConfig())
    calibrate(expected, [{"pixel_values": 2 * part} for part in data.pixel_values.split(BATCH)])
    for (name, p), q in zip(trainer.model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_weight_only_quantization_is_run_once(tmp_path):
    """Layers that the model never calls are found by running it; that is done once, not before each training."""
    trainer = trainer_of(vit(), tmp_path, config=SAQQuantizationConfig(activation_bits=None))
    assert needs_calibration(trainer.model)
    trainer.train()
    assert not needs_calibration(trainer.model)


class Annealed(InOrder):
    """A loss whose parts change their weights in the course of training."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        progress = self.state.global_step / self.state.max_steps + self.state.epoch / self.state.num_train_epochs
        return super().compute_loss(model, inputs) * (2 - progress)


def test_a_loss_may_ask_how_far_training_is(tmp_path):
    """`Trainer` knows the number of steps only as training begins; the loss that calibrates asks before."""
    trainer = trainer_of(vit(), tmp_path, Annealed, steps=3)
    trainer.calibrate_if_needed()
    assert (trainer.state.max_steps, trainer.state.num_train_epochs) == (3, 2)
    trainer.train()
    assert trainer.state.global_step == 3


class Drawn(Sampler):
    """Draws indices from generators of its own, as those do that weigh classes or must be reproducible."""

    def __init__(self, count: int):
        self.count = count
        self.of_torch, self.of_python = torch.Generator().manual_seed(3), random.Random(3)
        self.of_numpy, self.old_numpy = np.random.default_rng(3), np.random.RandomState(3)

    def __len__(self):
        return self.count

    def __iter__(self):
        order = torch.randperm(self.count, generator=self.of_torch).numpy()[self.of_numpy.permutation(self.count)]
        order = order[self.old_numpy.permutation(self.count)].tolist()
        return iter(self.of_python.sample(order, self.count))


def test_training_begins_where_a_sampler_of_ones_own_does(tmp_path):
    """A calibration had drawn the first order, and so had each estimation of norms: a run that went on from a
    checkpoint, without calibration, saw other images than the one that had left it."""
    data, trained = Images(2 * BATCH, torch.float32), []

    class OwnSampler(InOrder):
        def _get_train_sampler(self, train_dataset=None):
            return self.own

        def training_step(self, model, inputs, *args):
            if self._instead_of_step is None:
                same = (inputs["pixel_values"][:, None] == data.pixel_values).flatten(2).all(dim=2)
                trained.extend(same.int().argmax(dim=1).tolist())
            return super().training_step(model, inputs, *args)

    trainer = OwnSampler(
        resnet(),
        arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1),
        saq_config=SAQConfig(case=None, norm_batches=1),
        quantization_config=SAQQuantizationConfig(),
        train_dataset=data,
        eval_dataset=Images(BATCH, torch.float32),
    )
    trainer.own, other = Drawn(2 * BATCH), Drawn(2 * BATCH)
    trainer.train()
    assert trained == [*other, *other]


class TellsItsParts(InOrder):
    """A loss that logs its parts, as losses of several parts do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        self.log({"part": loss.item()})
        return loss


def test_what_a_loss_logs_is_of_steps_alone(tmp_path, monkeypatch):
    """It runs for a calibration, for estimations of norms and for a measurement of sharpness too."""
    monkeypatch.setattr("hf_saq.training.analyses.measured_sharpness.STEPS_BETWEEN", 1)
    told: list[float] = []

    class Listens(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.extend([logs["part"]] if "part" in logs else [])

    trainer = TellsItsParts(
        resnet(),
        arguments(tmp_path, max_steps=2),
        saq_config=SAQConfig(case=None, norm_batches=2, log_sharpness=True, rho=0.1),
        quantization_config=SAQQuantizationConfig(),
        train_dataset=Images(2 * BATCH, torch.float32),
        callbacks=[Listens()],
    )
    trainer.train()
    assert len(told) == 2 and any("measured_sharpness" in entry for entry in trainer.state.log_history)


def test_a_loader_of_a_subclass_needs_no_data_set(tmp_path):
    """Files that a library of its own reads, or batches that are made: nothing is passed to the trainer."""

    class Own(InOrder):
        def get_train_dataloader(self):
            return DataLoader(Images(2 * BATCH, torch.float32), batch_size=BATCH)

    config = SAQConfig(case=None)
    trainer = Own(vit(), arguments(tmp_path), saq_config=config, quantization_config=SAQQuantizationConfig())
    trainer.train()
    assert is_calibrated(trainer.model)


def test_a_batch_size_that_must_be_found(tmp_path):
    """`auto_find_batch_size`: the calibration meets the lack of memory first."""

    class Small(InOrder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    changes = dict(auto_find_batch_size=True, per_device_train_batch_size=4)
    trainer = trainer_of(vit(), tmp_path, Small, changes=changes)
    trainer.train()
    assert is_calibrated(trainer.model) and trainer.state.train_batch_size == 2


def test_a_training_keeps_the_ranges_that_an_earlier_one_has_learned(tmp_path):
    """A head that is reset, or a layer of other bits, waits for its range; all the others were fitted anew with it."""
    trainer = trainer_of(vit(), tmp_path, changes={"learning_rate": 0.0})
    trainer.train()
    model = trainer.model
    with torch.no_grad():
        for quantizer in (m for m in model.modules() if isinstance(m, Quantizer) and m.role == "activation"):
            quantizer.scale.mul_(1.5)
    learned = {name: p.clone() for name, p in model.named_parameters() if "activation_quantizer" in name}
    model.classifier.reset_parameters()
    trainer.train()
    moved = [name for name, p in model.named_parameters() if name in learned and not torch.equal(p, learned[name])]
    assert moved == ["classifier.activation_quantizer.scale"] and is_calibrated(model)


# Streams -------------------------------------------------------------------------------------------------------------


class Once(IterableDataset):
    """A stream that can be read once, from a socket for example."""

    def __init__(self, count: int):
        data = Images(max(count, 1), torch.float32)
        self.samples = iter([data[k] for k in range(count)])

    def __iter__(self):
        yield from self.samples


@pytest.mark.parametrize(("count", "steps"), [(24, 6), (8, 2)], ids=["longer_than_calibration", "shorter"])
def test_a_stream_that_can_be_read_once_loses_nothing(count, steps, tmp_path):
    seen: list[torch.Tensor] = []

    class Seeing(InOrder):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if model.training:
                seen.append(inputs["pixel_values"].clone())
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trainer_of(vit(), tmp_path, Seeing, Once(count), steps=steps).train()
    assert torch.equal(torch.cat(seen), Images(count, torch.float32).pixel_values)


def test_a_bit_budget_takes_nothing_from_a_stream_either(tmp_path):
    """Bits are given on the batches after those of the calibration, or on the first ones: both come again."""
    seen: list[torch.Tensor] = []

    class Seeing(InOrder):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self._instead_of_step is None:
                seen.append(inputs["pixel_values"].clone())
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = trainer_of(vit(), tmp_path, Seeing, Once(80), steps=3)
    trainer.saq_config.bit_budget = "0.8x"
    trainer.train()
    assert torch.equal(torch.cat(seen), Images(80, torch.float32).pixel_values[: len(torch.cat(seen))]) and seen


class Sized(IterableDataset):
    """A stream that knows its length, and something else."""

    chunk = 3

    def __len__(self):
        return 16

    def __iter__(self):
        data = Images(16, torch.float32)
        yield from (data[k] for k in range(16))


def test_a_stream_with_a_length_needs_no_max_steps(tmp_path):
    trainer = trainer_of(vit(), tmp_path, data=Sized(), steps=-1, changes=dict(num_train_epochs=2))
    trainer.train()
    assert trainer.state.global_step == 8 and trainer.state.epoch == 2
    assert trainer.train_dataset.chunk == 3
    assert len(list(pickle.loads(pickle.dumps(trainer.train_dataset)))) == 16


class Again(IterableDataset):
    """A stream that begins anew whenever it is read."""

    def __iter__(self):
        data = Images(8, torch.float32)
        yield from (data[k] for k in range(8))


def test_a_stream_that_begins_anew_does_so_in_later_epochs(tmp_path):
    trainer = trainer_of(vit(), tmp_path, data=Again(), steps=6)
    trainer.train()
    assert trainer.state.global_step == 6  # three readings of two batches
    assert len(list(trainer.train_dataset)) == 8


def test_data_without_a_batch_is_told_of(tmp_path):
    trainer = trainer_of(vit(), tmp_path, data=Once(0))
    with pytest.raises(ValueError, match="the training data gave no batch to calibrate with"):
        trainer.train()


def test_an_evaluation_before_the_first_step_meets_a_calibrated_model(tmp_path):
    trainer = trainer_of(vit(), tmp_path, changes=dict(eval_on_start=True), eval_dataset=Images(4, torch.float32))
    trainer.train()
    assert "eval_loss" in trainer.state.log_history[0]
    assert torch.isfinite(trainer.model(pixel_values=images(2)).logits).all()

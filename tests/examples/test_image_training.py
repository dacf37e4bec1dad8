"""Mixup, CutMix and averaged weights in the example script: against their formulas, and through a whole run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import NUM_LABELS, TRANSFORMERS_MODELS, images, vit
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from training import BATCH, Images, arguments, quantized_model

from hf_saq import SAQConfig, reestimate_batch_norm

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_image_classification as script  # noqa: E402
from image_arguments import parse_arguments  # noqa: E402
from image_averaging import STORED, ImageTrainer, check_averaging  # noqa: E402
from image_mixing import mixing  # noqa: E402


def trainer_in(directory, mix=None, ema_decay=0.0, saq_config=None, teacher=None, **changes) -> ImageTrainer:
    settings = {"learning_rate": 0.01, **changes}
    return ImageTrainer(
        quantized_model("vit", torch.float32),
        arguments(directory, **settings),
        saq_config=saq_config or SAQConfig(case=None),
        train_dataset=Images(12, torch.float32),
        eval_dataset=Images(4, torch.float32),
        mix=mix,
        ema_decay=ema_decay,
        teacher=teacher,
    )


def test_nothing_is_mixed_unasked():
    assert mixing(0, 0, 10) is None
    assert len(mixing(0.2, 1.0, 10).transforms) == 2


def test_training_sees_mixed_images_and_evaluation_does_not(tmp_path):
    """The loss is the cross-entropy with the shares of the classes, `-sum(share * log softmax)`."""
    trainer = trainer_in(tmp_path, mixing(1.0, 1.0, NUM_LABELS))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].shape == (4, NUM_LABELS)
    torch.testing.assert_close(batch["labels"].sum(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    assert not any((image == x).all() for image in batch["pixel_values"] for x in trainer.train_dataset.pixel_values)
    loss, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    expected = -(batch["labels"] * F.log_softmax(outputs.logits, dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    plain = next(iter(trainer.get_eval_dataloader()))
    assert torch.equal(plain["pixel_values"], trainer.eval_dataset.pixel_values) and plain["labels"].ndim == 1
    (alone,) = [trainer.collate_and_mix([trainer.train_dataset[0]])]
    assert torch.equal(alone["pixel_values"][0], trainer.train_dataset[0]["pixel_values"])
    assert alone["labels"].argmax() == trainer.train_dataset[0]["labels"]


@pytest.mark.parametrize("with_teacher", [False, True])
def test_mixed_training_perturbs_and_accumulates(with_teacher, tmp_path):
    """A step of two equal micro-batches has the loss of one of them, not twice as much."""
    teacher = TRANSFORMERS_MODELS["vit"](seed=5) if with_teacher else None
    trainer = trainer_in(
        tmp_path,
        mixing(1.0, 0, NUM_LABELS),
        saq_config=SAQConfig(rho=0.1, schedule="full"),
        teacher=teacher,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        max_steps=1,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["loss"] < 2 * torch.tensor(NUM_LABELS).log() and log["sharpness"] > 0


def test_the_average_is_that_of_the_weights_of_all_steps(tmp_path):
    """`a_1 = w_1`, then `a_k = d * a_(k-1) + (1 - d) * w_k`, within float32."""
    seen = []

    class Kept(ImageTrainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
            super()._maybe_log_save_evaluate(*args, **kwargs)

    trainer = trainer_in(tmp_path, ema_decay=0.7)
    trainer.__class__ = Kept
    trainer.train()
    assert len(seen) == 4  # after each step, and at the end of the epoch
    for name, parameter in trainer.model.named_parameters():
        expected = 0.7 * (0.7 * seen[0][name] + 0.3 * seen[1][name]) + 0.3 * seen[2][name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(seen[2]["classifier.weight"], trainer.model.classifier.weight)


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_batch_norm_statistics_are_those_of_the_average(strategy, tmp_path):
    """Also where the last step had an evaluation, which re-estimated those of the weights themselves."""

    class InOrder(ImageTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    model, data = quantized_model("resnet", torch.float32), Images(4 * BATCH, torch.float32)
    how = arguments(tmp_path, max_steps=4, eval_strategy=strategy, eval_steps=2, learning_rate=0.05)
    config = SAQConfig(rho=0.1, norm_batches=4)
    more = dict(train_dataset=data, eval_dataset=Images(BATCH, torch.float32), ema_decay=0.5)
    InOrder(model, how, saq_config=config, **more).train()
    found = {name: value.clone() for name, value in model.state_dict().items()}
    reestimate_batch_norm(model, [{"pixel_values": x} for x in data.pixel_values.split(BATCH)])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_an_average_goes_on_where_it_was(tmp_path):
    saving = dict(save_strategy="steps", save_steps=1)
    whole = trainer_in(tmp_path / "whole", ema_decay=0.7, **saving)
    whole.train()
    resumed = trainer_in(tmp_path / "whole", ema_decay=0.7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in found.items())
    (tmp_path / "whole" / "checkpoint-2" / STORED).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-2 has no {STORED}: it is of a run without --ema_decay"):
        trainer_in(tmp_path / "whole", ema_decay=0.7).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


def test_the_best_or_the_average(tmp_path):
    best = dict(load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", save_steps=1, eval_steps=1)
    with pytest.raises(ValueError, match="not with both. Leave one of them out"):
        trainer_in(tmp_path, ema_decay=0.9, **best)
    with pytest.raises(ValueError, match="--ema_decay under FSDP: the weights to average lie in shards"):
        check_averaging(is_sharded=True, takes_best=False)


@pytest.mark.parametrize(("most", "steps"), [(-1, 3), (2, 2), (9, 3)])
def test_max_steps_end_the_float_training_and_do_not_prolong_it(most, steps, tmp_path):
    """`Trainer` takes them in place of the epochs: with 10,000 of them, one epoch in float became 10,000 steps."""
    given = ["--float_epochs=1.5", f"--max_steps={most}", f"--output_dir={tmp_path}", "--dataset_name=none"]
    given += ["--use_cpu", "--report_to=none", "--disable_tqdm=true", "--per_device_train_batch_size=4", "--do_train"]
    _, _, how, _, quantization = parse_arguments([*given, "--gradient_accumulation_steps=2", "--save_strategy=no"])
    rows = [{"pixel_values": x, "labels": k % NUM_LABELS} for k, x in enumerate(images(16))]
    common = {"train_dataset": rows, "eval_dataset": rows[:2], "compute_metrics": lambda _: {"top1": 0.0}}
    _, trainer = script.train_float(vit(), how, quantization, common)
    assert trainer.state.global_step == steps and how.max_steps == most


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--mixup_alpha=-1", "--mixup_alpha -1.0; expected a number from 0 (off) up"),
        ("--cutmix_alpha=inf", "--cutmix_alpha inf; expected"),
        ("--ema_decay=1", "--ema_decay 1.0; expected a number from 0 (off) to below 1"),
    ],
)
def test_values_out_of_range(argument, said, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([argument])
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_with_all_of_them(tmp_path):
    small = ["--float_epochs=1", "--num_train_epochs=1", "--max_train_samples=64", "--max_eval_samples=32"]
    small += ["--disable_tqdm=true", "--use_cpu", "--weight_bits=3", "--distill_alpha=0.5", f"--output_dir={tmp_path}"]
    rows = script.main([*small, "--mixup_alpha=0.2", "--cutmix_alpha=1", "--ema_decay=0.9"])
    assert [row.method for row in rows] == ["float", "qat", "saq"]
    assert all(row.reloaded_top1 == row.top1 for row in rows[1:])
    assert json.loads((tmp_path / "saq-w3a3" / "eval_results.json").read_text())["eval_top1"] == rows[2].top1
    assert load_file(tmp_path / "saq-w3a3" / "model.safetensors")

"""Distillation from the float model: the loss against its formula, training against the plain-PyTorch reference."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from reference import largest_difference, train_reference
from safetensors.torch import load_file
from schedule_reference import train_with_schedule
from tiny_models import TRANSFORMERS_MODELS, VIT_SIZES, deit_with_teacher, images
from torch import nn
from torch.utils.data import SequentialSampler
from training import BATCH, RHO, Images, InOrder, arguments, make_trainer, quantized_model, reference_set_up
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging as hf_logging

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer, calibrate, quantize
from hf_saq.hub.run_facts import hyperparameters_of_run
from hf_saq.training import distillation_loss

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_image_classification as script  # noqa: E402

ALPHA, TEMPERATURE = 0.7, 3.0


class InOrderDistillation(SAQTrainer):
    """Without shuffling, so that a plain loop can see the same batches."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class TupleViT(ViTForImageClassification):
    def forward(self, pixel_values=None, labels=None, **kwargs):
        return super().forward(pixel_values=pixel_values, labels=labels, **kwargs).to_tuple()


def softmax(z: torch.Tensor) -> torch.Tensor:
    return z.exp() / z.exp().sum(dim=1, keepdim=True)


def closed_form(student, teacher, labels, alpha, temperature, smoothing=0.0):
    """The formula, spelled out."""
    one_hot = torch.eye(student.shape[1], dtype=student.dtype)[labels]
    targets = (1 - smoothing) * one_hot + smoothing / student.shape[1]
    hard = -(targets * softmax(student).log()).sum(dim=1).mean()
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return (1 - alpha) * hard + alpha * temperature**2 * (p * (p / q).log()).sum(dim=1).mean()


def some_logits():
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_(), torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
@pytest.mark.parametrize("temperature", [0.5, 1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_formula(alpha, temperature, smoothing):
    """Value within 1e-12, and so is the gradient, which is known too."""
    student, teacher, labels = some_logits()
    loss = distillation_loss(student, teacher, labels, alpha, temperature, smoothing)
    expected = closed_form(student.detach(), teacher.detach(), labels, alpha, temperature, smoothing)
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-12)
    loss.backward()
    targets = (1 - smoothing) * torch.eye(5, dtype=torch.float64)[labels] + smoothing / 5
    hard = softmax(student.detach()) - targets
    soft = temperature * (softmax(student.detach() / temperature) - softmax(teacher.detach() / temperature))
    torch.testing.assert_close(student.grad, ((1 - alpha) * hard + alpha * soft) / 6, rtol=0, atol=1e-12)
    assert teacher.grad is None


def test_alpha_0_is_cross_entropy_to_the_bit():
    student, teacher, labels = some_logits()
    student = student.detach().float()
    expected = nn.functional.cross_entropy(student, labels)
    assert torch.equal(distillation_loss(student, teacher * torch.nan, labels, 0, 2), expected)


def test_half_precision_is_computed_in_float32():
    student, teacher, labels = some_logits()
    student, teacher = student.detach().bfloat16(), teacher.detach().bfloat16()
    loss = distillation_loss(student, teacher, labels, ALPHA, TEMPERATURE)
    expected = closed_form(student.double(), teacher.double(), labels, ALPHA, TEMPERATURE)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("alpha", "temperature", "message"),
    [
        (1.1, 1, r"distill_alpha=1\.1; expected a number from 0"),
        (-0.1, 1, r"distill_alpha=-0\.1"),
        (0.5, 0, r"distill_temperature=0; expected a finite number above 0"),
        (0.5, float("inf"), "distill_temperature=inf"),
    ],
)
def test_values_out_of_range(alpha, temperature, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(*some_logits(), alpha, temperature)


def test_a_teacher_with_other_classes():
    student, teacher, labels = some_logits()
    with pytest.raises(ValueError, match=r"student's logits are \(6, 5\) and the teacher's \(6, 4\)"):
        distillation_loss(student, teacher[:, :4], labels, 0.5, 1)


def distilling(family="vit", **settings):
    teacher = TRANSFORMERS_MODELS[family](seed=5).double()
    return partial(
        InOrderDistillation,
        teacher=teacher,
        **{"distill_alpha": ALPHA, "distill_temperature": TEMPERATURE, **settings},
    )


@pytest.mark.parametrize(
    ("family", "case", "accumulation", "sync", "knobs"),
    [
        ("vit", None, 2, "local", {}),
        ("vit", 3, 2, "local", {}),
        ("resnet", 3, 2, "global", {}),
        ("vit", 3, 2, "local", {"interval": 2, "ascent_fraction": 0.5, "reuse": "stale"}),
        ("vit", 3, 2, "local", {"trigger": True}),
    ],
    ids=str,
)
def test_training_equals_the_reference(family, case, accumulation, sync, knobs, tmp_path):
    """Also with label smoothing, and under schedules that split batches or see them twice. The tolerance is that of
    tests/training/distributed/test_distributed.py."""
    make = distilling(family)
    settings = dict(label_smoothing_factor=0.1)
    trainer = make_trainer(family, case, accumulation, sync, tmp_path, cls=make, knobs=knobs, **settings)
    teacher = copy.deepcopy(make.keywords["teacher"]).eval()
    trainer.train()

    def loss_of(model, batch):
        with torch.no_grad():
            answers = teacher(pixel_values=batch[0]).logits
        student = model(pixel_values=batch[0]).logits
        return closed_form(student, answers, batch[1], ALPHA, TEMPERATURE, smoothing=0.1)

    model, steps, optimizer = reference_set_up(family, accumulation)
    if knobs:
        train_with_schedule(model, loss_of, steps, optimizer, RHO, case, sync, **knobs)
    else:
        train_reference(model, loss_of, steps, optimizer, case=case, rho=RHO, sync=sync)
    assert largest_difference(trainer.model, model) < 1e-11


def test_models_that_would_scale_their_own_loss(tmp_path, monkeypatch):
    """`Trainer` divides by the number of micro-batches all the same."""
    found = []
    for declared in (False, True):
        monkeypatch.setattr(ViTForImageClassification, "accepts_loss_kwargs", declared, raising=False)
        trainer = make_trainer("vit", None, 2, "local", tmp_path, cls=distilling(), max_steps=1)
        trainer.train()
        found.append(trainer.model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("case", [None, 3])
def test_the_card_names_the_teacher(case, tmp_path):
    """The card of a distilled model read like that of one that had learnt from labels alone."""
    make = distilling("vit")
    teacher = make.keywords["teacher"]
    teacher.config._name_or_path = "someone/teacher"
    trainer = make_trainer("vit", case, 1, "local", tmp_path, cls=make, max_steps=1)
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    for line in (
        "- teacher: ViTForImageClassification (someone/teacher)",
        f"- distill_alpha: {ALPHA}",
        f"- distill_temperature: {TEMPERATURE}",
    ):
        assert line in text.splitlines()
    assert "and knowledge distillation from ViTForImageClassification (someone/teacher)" in text
    trainer.teacher = None
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "distill" not in text and "teacher" not in text


@pytest.mark.parametrize("case", [None, 3])
def test_alpha_0_trains_as_without(case, tmp_path):
    plain = make_trainer("vit", case, 2, "local", tmp_path, cls=InOrder, dtype=torch.float32)
    off = make_trainer("vit", case, 2, "local", tmp_path, cls=distilling(distill_alpha=0), dtype=torch.float32)
    for trainer in (plain, off):
        trainer.train()
    expected, same = plain.model.state_dict(), off.model.state_dict()
    assert all(torch.equal(expected[name], same[name]) for name in expected)
    assert "distill_alpha" not in hyperparameters_of_run(off, off.saq_config)


def test_the_teacher_stays_as_it_is_and_is_asked_once(tmp_path):
    """ResNet has running statistics, which a teacher in training mode would move."""
    make = distilling("resnet")
    teacher = make.keywords["teacher"].train()
    before, calls = copy.deepcopy(teacher.state_dict()), []
    teacher.register_forward_hook(lambda module, args, output: calls.append(module.training))
    trainer = make_trainer("resnet", 3, 2, "local", tmp_path, cls=make, max_steps=2)
    trainer.train()
    assert calls == [False] * 4  # two steps of two micro-batches, each with two passes of the student
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_evaluation_has_the_loss_on_labels_alone(tmp_path):
    trainer = make_trainer("vit", None, 1, "local", tmp_path, cls=distilling())
    data = Images(10)
    found = trainer.evaluate(data)["eval_loss"]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(trainer.model(pixel_values=data.pixel_values).logits, data.labels)
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_models_that_return_tuples(tmp_path):
    """The same parameters and the same evaluation as with named outputs."""
    results = []
    for as_tuples in (False, True):
        make = distilling()
        trainer = make_trainer("vit", 3, 1, "local", tmp_path, cls=make)
        if as_tuples:
            trainer.model.__class__ = make.keywords["teacher"].__class__ = TupleViT
        trainer.train()
        prediction = trainer.predict(Images(6))
        results.append((trainer.model.state_dict(), prediction.predictions, prediction.metrics["test_loss"]))
    (state, scores, loss), (tuple_state, tuple_scores, tuple_loss) = results
    assert all(torch.equal(state[name], tuple_state[name]) for name in state)
    assert (scores == tuple_scores).all() and loss == tuple_loss


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_deit_with_two_heads(alpha, tmp_path):
    """The class head learns labels alone, so with an alpha of 1 nothing; the distillation head the teacher alone."""
    student = deit_with_teacher()
    quantize(student, SAQQuantizationConfig(weight_bits=4, activation_bits=4))
    calibrate(student, [{"pixel_values": images(8)}])
    before = copy.deepcopy(student.state_dict())
    trainer = InOrderDistillation(
        student,
        arguments(tmp_path, max_steps=1, learning_rate=0.01),
        saq_config=SAQConfig(rho=0.1, schedule="full"),
        train_dataset=Images(BATCH, torch.float32),
        teacher=deit_with_teacher(seed=5),
        distill_alpha=alpha,
    )
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert ("cls_classifier.weight" in moved) == (alpha < 1)
    assert "distillation_classifier.weight" in moved
    data = Images(6, torch.float32)
    with torch.no_grad():
        mean = trainer.model(pixel_values=data.pixel_values).logits
    expected = nn.functional.cross_entropy(mean, data.labels)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_student_and_teacher_must_be_two_models(tmp_path):
    model = TRANSFORMERS_MODELS["vit"]()
    with pytest.raises(ValueError, match="share parameters; pass a copy"):
        SAQTrainer(model, arguments(tmp_path), saq_config=SAQConfig(case=None), teacher=model)


def test_a_teacher_of_something_else(tmp_path):
    """Names of classes in another order count as well; nothing trains before it is said."""

    def train(teacher, **more):
        return SAQTrainer(
            TRANSFORMERS_MODELS["vit"](), arguments(tmp_path), saq_config=SAQConfig(case=None), teacher=teacher, **more
        )

    other = TRANSFORMERS_MODELS["vit"](seed=5)
    count = other.config.num_labels
    other.config.num_labels = count + 1
    with pytest.raises(ValueError, match=rf"the model has {count} classes and its teacher {count + 1}, so that their"):
        train(other)
    other.config.num_labels = count
    other.config.id2label = {k: other.config.id2label[count - 1 - k] for k in range(count)}
    with pytest.raises(ValueError, match="those of the model in another order"):
        train(other)
    several = TRANSFORMERS_MODELS["vit"](seed=5)
    several.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="the teacher has problem_type='multi_label_classification', but what is"):
        train(several)
    with pytest.raises(TypeError, match="teacher is a str; expected a model"):
        train("google/vit-base-patch16-224")
    with pytest.raises(ValueError, match="leave compute_loss_func or teacher out"):
        train(TRANSFORMERS_MODELS["vit"](seed=5), compute_loss_func=lambda *args, **kwargs: None)


def test_labels_and_models_of_which_nothing_can_be_learned(tmp_path):
    """Without a `problem_type` transformers finds it in the labels: cross-entropy took them, in one class it was 0."""

    class OfSeveralClasses(Images):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "labels": torch.tensor([1.0, 1.0, 0.0])}

    def trainer(model, teacher, kind=Images):
        how = {"train_dataset": kind(4, torch.float32), "saq_config": SAQConfig(case=None), "teacher": teacher}
        return SAQTrainer(model, arguments(tmp_path, max_steps=1), **how)

    with pytest.raises(ValueError, match="the labels of an image add up to 2; expected probabilities"):
        trainer(quantized_model("vit", torch.float32), TRANSFORMERS_MODELS["vit"](seed=5), OfSeveralClasses).train()
    one = ViTForImageClassification(ViTConfig(**{**VIT_SIZES, "num_labels": 1}))
    student = quantize(copy.deepcopy(one), SAQQuantizationConfig())
    with pytest.raises(ValueError, match="the model has one class, for a regression, but what is learned from"):
        trainer(student, one)


def test_labels_of_another_name(tmp_path):
    class OfAnotherName(Images):
        def __getitem__(self, index):
            return {"pixel_values": self.pixel_values[index], "target": self.labels[index]}

    trainer = SAQTrainer(
        quantized_model("vit", torch.float32),
        arguments(tmp_path, max_steps=1, label_names=["target"], remove_unused_columns=False),
        saq_config=SAQConfig(case=None),
        train_dataset=OfAnotherName(4, torch.float32),
        teacher=TRANSFORMERS_MODELS["vit"](seed=5),
    )
    with pytest.raises(ValueError, match=r"the batch has \['pixel_values', .*'target'.*expected `labels` among them"):
        trainer.train()


def test_a_teacher_that_takes_other_inputs(tmp_path):
    class Teacher(nn.Module):
        def forward(self, images):
            return images

    trainer = make_trainer("vit", 3, 1, "local", tmp_path, cls=partial(InOrder, teacher=Teacher()), max_steps=1)
    with pytest.raises(ValueError, match=r"for its teacher: a batch with the keys 'pixel_values' lacks 'images'"):
        trainer.train()


def test_what_is_saved_has_no_teacher(tmp_path, capsys):
    """Neither checkpoints nor the model for use; the first lines say that there is one, the card how much it said."""
    settings = dict(max_steps=1, save_strategy="steps", save_steps=1)
    hf_logging.set_verbosity_warning()
    try:
        trainer = make_trainer("vit", 3, 1, "local", tmp_path, cls=distilling(), **settings)
        trainer.train()
    finally:
        hf_logging.set_verbosity_error()
    assert "Distillation: 70% of the loss are the answers of a ViTForImageClassification" in capsys.readouterr().out
    plain = make_trainer("vit", 3, 1, "local", tmp_path / "plain", cls=InOrder, **settings)
    plain.train()
    names = [
        load_file(directory / "checkpoint-1" / "model.safetensors").keys()
        for directory in (tmp_path, tmp_path / "plain")
    ]
    assert names[0] == names[1]


def test_mixed_precision(tmp_path):
    """The teacher answers in the precision of training; its parameters stay float32."""
    teacher = TRANSFORMERS_MODELS["vit"](seed=5)
    make = partial(InOrder, teacher=teacher)
    trainer = make_trainer("vit", 3, 2, "local", tmp_path, cls=make, dtype=torch.float32, bf16=True)
    seen = []
    teacher.register_forward_hook(lambda module, args, output: seen.append(output.logits.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16} and all(p.dtype == torch.float32 for p in teacher.parameters())
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("knobs", [{"reuse": "echo", "interval": 2}, {"reuse": "previous"}, {}], ids=str)
def test_resuming_is_exact(knobs, tmp_path):
    """Also where a schedule has kept a batch, which has the teacher's answers in it."""
    how = dict(dtype=torch.float32, max_steps=4, knobs=knobs)
    teacher = TRANSFORMERS_MODELS["vit"](seed=5)
    make = partial(SAQTrainer, teacher=teacher, distill_alpha=ALPHA)
    whole = make_trainer("vit", 3, 1, "local", tmp_path / "whole", cls=make, **how)
    whole.train()
    saving = dict(save_strategy="steps", save_steps=1)
    make_trainer("vit", 3, 1, "local", tmp_path / "half", cls=make, **how, **saving).train()
    resumed = make_trainer("vit", 3, 1, "local", tmp_path / "half", cls=make, **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-1"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in found.items())


@pytest.mark.slow
def test_the_example_distils_with_both_methods(tmp_path):
    small = ["--float_epochs=1", "--num_train_epochs=1", "--max_train_samples=64", "--max_eval_samples=32"]
    small += ["--disable_tqdm=true", "--use_cpu", "--weight_bits=3", "--warmup_steps=0", "--logging_steps=1000"]
    losses = {}
    for alpha in (0, 0.9):
        output = tmp_path / str(alpha)
        rows = script.main([*small, f"--output_dir={output}", f"--distill_alpha={alpha}", "--distill_temperature=2"])
        assert [row.method for row in rows] == ["float", "qat", "saq"]
        losses[alpha] = [row.metrics["eval_loss"] for row in rows]
    assert losses[0][0] == losses[0.9][0]  # the float stage has no teacher
    assert losses[0][1] != losses[0.9][1] and losses[0][2] != losses[0.9][2]


def test_the_example_checks_alpha(capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--distill_alpha=2"])
    assert "distill_alpha=2.0; expected a number from 0" in capsys.readouterr().err

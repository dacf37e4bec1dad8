"""The run that `test_resume.py` interrupts; started as a script, it kills itself at several moments of a save."""

from __future__ import annotations

import gc
import os
import signal
import sys

import torch
from tiny_models import IMAGE_SIZE, NUM_LABELS, TRANSFORMERS_MODELS, deit_with_teacher, seeded
from training import Images, arguments
from transformers import SwinConfig, SwinForImageClassification, TrainerCallback

from hf_saq import SAQConfig, SAQQuantizationConfig, SAQTrainer

STEPS = 6


def swin():
    """With its default drop-path of 0.1, so that random numbers matter."""
    config = SwinConfig(
        image_size=IMAGE_SIZE,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=4,
        num_labels=NUM_LABELS,
        drop_path_rate=0.3,
    )
    with seeded(0):
        return SwinForImageClassification(config)


def deit():
    from transformers import DeiTForImageClassification

    with seeded(0):
        return DeiTForImageClassification(deit_with_teacher().config)


MODELS = {**TRANSFORMERS_MODELS, "deit": deit, "swin": swin}


def make_trainer(family, output_dir, saq_config=None, quantization_config=None, **changes) -> SAQTrainer:
    """Shuffled data, dropout where the model has it, AdamW with a schedule: whatever a resume must bring back."""
    torch.manual_seed(123)  # not the seed of the run: that one comes from the arguments
    defaults = dict(
        max_steps=STEPS,
        learning_rate=1e-3,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=2,
        seed=3,
    )
    return SAQTrainer(
        MODELS[family](),
        arguments(output_dir, **{**defaults, **changes}),
        saq_config=saq_config or SAQConfig(rho=0.1, schedule="full"),
        quantization_config=quantization_config or SAQQuantizationConfig(weight_bits=3, activation_bits=4),
        train_dataset=Images(32, torch.float32),
        eval_dataset=Images(8, torch.float32),
        compute_metrics=lambda p: {"top1": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


class KillBetweenSaves(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = {
    "between_saves": None,
    "before_weights": "_save",
    "before_optimizer": "_save_optimizer_and_scheduler",
    "before_rng": "_save_rng_state",
    "before_state": "store_nothing",
}
"""Where in the save of step 4 the run is killed: the method of the trainer that is not reached."""


def run_and_die(moment: str, output_dir: str) -> None:
    trainer = make_trainer("vit", output_dir)
    if moment == "between_saves":
        trainer.add_callback(KillBetweenSaves())
    elif moment == "before_state":
        save = type(trainer.state).save_to_json

        def die_half_way(state, path):
            if state.global_step == 4:
                with open(path, "w") as file:
                    file.write('{"best_metric": nul')
                os.kill(os.getpid(), signal.SIGKILL)
            save(state, path)

        type(trainer.state).save_to_json = die_half_way
    else:
        name = MOMENTS[moment]
        original = getattr(trainer, name)

        def die(*args, **kwargs):
            if trainer.state.global_step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(trainer, name, die)
    trainer.train()


if __name__ == "__main__":
    gc.freeze()  # as in forked.py
    for moment in MOMENTS:
        child = os.fork()
        if child == 0:
            run_and_die(moment, f"{sys.argv[1]}/{moment}")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WTERMSIG(status) == signal.SIGKILL, (moment, status)

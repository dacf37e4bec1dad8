"""`SAQTrainer` under FSDP2: training, checkpoints, resuming and the saved model; run by `fsdp_worker.py`."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from tiny_models import images
from training import make_trainer
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_saq import SAQTrainer

RUNS = [(None, "local"), (3, "global"), (3, "local"), (2, "global")]


NOT_SHARDED = {
    "reuse='previous'": dict(reuse="previous"),
    "reuse='echo'": dict(reuse="echo", interval=2),
    "reuse='look'": dict(reuse="look", interval=2),
    "trigger": dict(trigger=True),
}
"""Schedules that read gradients of parameters as each process computes them."""


MATCHED = dict(ascent_depth=0.5, match_radius=True)


class LooksWithoutGradients(TrainerCallback):
    """Runs forward alone after each step, as an evaluation does: it leaves the outermost parameters whole."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model(pixel_values=images(4).double())


def accept_cpu(init):
    """accelerate's `AcceleratorState.__init__`, which ignores FSDP on anything but an accelerator, made not to."""

    def wrapped(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    return wrapped


def trainer_of(case, sync, output: Path, state_dict_type: str = "FULL_STATE_DICT", **changes) -> SAQTrainer:
    fsdp = {
        "transformer_layer_cls_to_wrap": ["ViTLayer"],
        "state_dict_type": state_dict_type,
        **changes.pop("fsdp", {}),
    }
    return make_trainer("vit", case, 2, sync, output, processes=2, fsdp=True, fsdp_config=fsdp, **changes)


def state_of(trainer: SAQTrainer) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in trainer.accelerator.get_state_dict(trainer.model).items()}


def raised(**options) -> str:
    try:
        trainer_of(**options)
    except ValueError as error:
        return str(error)
    return "nothing"


def run(output: Path) -> tuple[dict, Accelerator]:
    """Results by name, and the accelerator, whose training is to be ended."""
    AcceleratorState.__init__ = accept_cpu(AcceleratorState.__init__)
    results = {}
    for case, sync in RUNS:
        trainer = trainer_of(case, sync, output / "runs")
        trainer.train()
        skipped = trainer.minimizer.skipped if trainer.minimizer else 0
        sharded = all(hasattr(p, "full_tensor") for p in trainer.model.parameters())
        results[case, sync] = {"state": state_of(trainer), "skipped": skipped, "sharded": sharded}
    trainer.save_model(str(output / "packed"))
    logits = trainer.model.eval()(pixel_values=images(4).double()).logits
    if dist.get_rank() == 0:
        reloaded = AutoModelForImageClassification.from_pretrained(output / "packed", dtype=torch.float64)
        results["packed"] = {"trained": logits.detach(), "reloaded": reloaded(images(4).double()).logits.detach()}

    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        directory = output / kind
        options = dict(optim="adamw_torch", save_strategy="steps", save_steps=1)
        whole = trainer_of(3, "local", directory, kind, **options)
        whole.train()
        resumed = trainer_of(3, "local", output / f"{kind} resumed", kind, **options)
        resumed.train(resume_from_checkpoint=str(directory / "checkpoint-2"))
        results[kind] = {"whole": state_of(whole), "resumed": state_of(resumed)}
    dist.barrier()
    if dist.get_rank() == 0:
        directory = output / "FULL_STATE_DICT" / "checkpoint-3"
        checkpoint = AutoModelForImageClassification.from_pretrained(directory, dtype=torch.float64)
        results["checkpoint"] = checkpoint.state_dict()

    stale = dict(knobs=dict(reuse="stale", interval=2))
    trainer = trainer_of(3, "global", output / "runs", **stale)
    trainer.train()
    options = dict(optim="adamw_torch", save_strategy="steps", save_steps=1, **stale)
    whole = trainer_of(3, "global", output / "stale", **options)
    whole.train()
    resumed = trainer_of(3, "global", output / "stale resumed", **options)
    resumed.train(resume_from_checkpoint=str(output / "stale" / "checkpoint-1"))  # step 2 needs the eps of step 1
    results["stale"] = {"trained": state_of(trainer), "whole": state_of(whole), "resumed": state_of(resumed)}

    late = trainer_of(3, "global", output / "runs", knobs=dict(ascent_depth=0.5))
    late.train()
    results["last layers"] = {"trained": state_of(late), "first": late.minimizer.late.first}
    matched = trainer_of(3, "global", output / "runs", knobs=MATCHED, callbacks=[LooksWithoutGradients()])
    matched.train()
    results["radius matched"] = {"trained": state_of(matched), **matched.scheduled_step.radius.state()}

    common = dict(sync="local", output=output / "refused")
    results["refused"] = {
        "case": raised(case=2, **common),
        "version": raised(case=3, fsdp={"version": 1, "sync_module_states": False}, **common),
        **{name: raised(case=3, knobs=knobs, **common) for name, knobs in NOT_SHARDED.items()},
        "loading": raised(case=3, fsdp={"cpu_ram_efficient_loading": True}, **common),
    }
    return results, trainer.accelerator

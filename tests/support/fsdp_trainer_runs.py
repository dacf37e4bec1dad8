"""`SAQTrainer` under FSDP2: training, checkpoints, resuming and the saved model; run by `fsdp_worker.py`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from tiny_models import images
from training import make_trainer
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_saq import SAQTrainer

RUNS = [(3, "global"), (3, "local")]
MORE_RUNS = [(None, "local"), (2, "global")]

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


def trained(case, sync, output: Path) -> tuple[dict, SAQTrainer]:
    """What a run leaves, and its trainer."""
    trainer = trainer_of(case, sync, output / "runs")
    trainer.train()
    skipped = trainer.minimizer.skipped if trainer.minimizer else 0
    sharded = all(hasattr(p, "full_tensor") for p in trainer.model.parameters())
    return {"state": state_of(trainer), "skipped": skipped, "sharded": sharded}, trainer


def runs(output: Path) -> dict:
    """Runs by case and sync, and what the last of them saves."""
    results = {}
    for run in RUNS:
        results[run], trainer = trained(*run, output)
    trainer.save_model(str(output / "packed"))
    logits = trainer.model.eval()(pixel_values=images(4).double()).logits
    if dist.get_rank() == 0:
        reloaded = AutoModelForImageClassification.from_pretrained(output / "packed", dtype=torch.float64)
        results["packed"] = {"trained": logits.detach(), "reloaded": reloaded(images(4).double()).logits.detach()}
    return results


def more_runs(output: Path) -> dict:
    return {run: trained(*run, output)[0] for run in MORE_RUNS}


def resumed(kind: str, output: Path) -> dict:
    """A run, and the same one resumed, with checkpoints of `kind`."""
    options = dict(optim="adamw_torch", save_strategy="steps", save_steps=1)
    whole = trainer_of(3, "local", output / kind, kind, **options)
    whole.train()
    again = trainer_of(3, "local", output / f"{kind} resumed", kind, **options)
    again.train(resume_from_checkpoint=str(output / kind / "checkpoint-2"))
    results = {"whole": state_of(whole), "resumed": state_of(again)}
    if kind == "FULL_STATE_DICT" and dist.get_rank() == 0:  # others are in parts
        directory = output / kind / "checkpoint-3"
        checkpoint = AutoModelForImageClassification.from_pretrained(directory, dtype=torch.float64)
        results["checkpoint"] = checkpoint.state_dict()
    dist.barrier()
    return results


def stale(output: Path) -> dict:
    knobs = dict(knobs=dict(reuse="stale", interval=2))
    trainer = trainer_of(3, "global", output / "runs", **knobs)
    trainer.train()
    options = dict(optim="adamw_torch", save_strategy="steps", save_steps=1, **knobs)
    whole = trainer_of(3, "global", output / "stale", **options)
    whole.train()
    again = trainer_of(3, "global", output / "stale resumed", **options)
    again.train(resume_from_checkpoint=str(output / "stale" / "checkpoint-1"))  # step 2 needs the eps of step 1
    return {"trained": state_of(trainer), "whole": state_of(whole), "resumed": state_of(again)}


def last_layers(output: Path) -> dict:
    late = trainer_of(3, "global", output / "runs", knobs=dict(ascent_depth=0.5))
    late.train()
    return {"trained": state_of(late), "first": late.minimizer.late.first}


def radius_matched(output: Path) -> dict:
    matched = trainer_of(3, "global", output / "runs", knobs=MATCHED, callbacks=[LooksWithoutGradients()])
    matched.train()
    return {"trained": state_of(matched), **matched.scheduled_step.radius.state()}


def refused(output: Path) -> dict:
    common = dict(sync="local", output=output / "refused")
    return {
        "case": raised(case=2, **common),
        "version": raised(case=3, fsdp={"version": 1, "sync_module_states": False}, **common),
        **{name: raised(case=3, knobs=knobs, **common) for name, knobs in NOT_SHARDED.items()},
        "loading": raised(case=3, fsdp={"cpu_ram_efficient_loading": True}, **common),
    }


PARTS = {
    "runs": runs,
    "more runs": more_runs,
    "FULL_STATE_DICT": partial(resumed, "FULL_STATE_DICT"),
    "SHARDED_STATE_DICT": partial(resumed, "SHARDED_STATE_DICT"),
    "stale": stale,
    "last layers": last_layers,
    "radius matched": radius_matched,
    "refused": refused,
}
"""What is done in both processes, by the name of its results."""


def run(output: Path, parts: list[str]) -> dict:
    """Results of `parts` by name."""
    AcceleratorState.__init__ = accept_cpu(AcceleratorState.__init__)
    return {name: PARTS[name](output) for name in parts}

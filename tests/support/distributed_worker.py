"""Two processes: trains what `test_distributed.py` asks for; rank 0 leaves the results in a file."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from forked import run_in_processes
from tiny_models import TRANSFORMERS_MODELS
from training import HOW, SCHEDULES, InOrder, make_trainer


def all_of(*values: float) -> torch.Tensor:
    """`(2, values)`: those of both processes."""
    own = torch.tensor(values, dtype=torch.float64)
    gathered = [torch.zeros_like(own) for _ in range(2)]
    torch.distributed.all_gather(gathered, own)
    return torch.stack(gathered)


def scheduled_runs(output: Path) -> dict:
    results = {}
    for k, (family, case, accumulation, sync, knobs) in enumerate(SCHEDULES):
        trainer = make_trainer(family, case, accumulation, sync, output / "runs", processes=2, knobs=knobs)
        trainer.train()
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        total = float(sum(p.detach().sum() for p in trainer.model.parameters()))
        tensors, values = trainer.scheduled_step.state()
        kept = float(sum(t.abs().sum() for t in tensors.values()))
        results[k] = {"state": state, "replicas": all_of(total), "kept": all_of(kept, values.get("mean") or 0.0)}
    return results


def resumed_run(output: Path) -> dict:
    """`reuse="previous"` with an `eps` on each process of its own, interrupted half-way."""
    how = dict(processes=2, knobs=dict(reuse="previous"), max_steps=4, save_strategy="steps", save_steps=2)
    how["dtype"] = torch.float32  # `from_pretrained` reads step sizes as float32
    whole = make_trainer("vit", 3, 2, "local", output / "resume", **how)
    whole.train()
    resumed = make_trainer("vit", 3, 2, "local", output / "resumed", **how)
    resumed.train(resume_from_checkpoint=str(output / "resume" / "checkpoint-2"))
    pairs = [(whole.model.state_dict(), resumed.model.state_dict())]
    pairs.append((whole.scheduled_step.state()[0], resumed.scheduled_step.state()[0]))
    equal = all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)
    kept = float(sum(t.abs().sum() for t in pairs[1][0].values()))
    return {"equal": all_of(float(equal)), "kept": all_of(kept)}


def distilled_run(output: Path) -> dict:
    """Each process asks a teacher of its own about its own images."""
    make = partial(InOrder, teacher=TRANSFORMERS_MODELS["vit"](seed=5).double(), distill_alpha=0.7)
    trainer = make_trainer("vit", 3, 2, "local", output / "runs", processes=2, cls=make)
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def main(output: Path) -> None:
    results = {"schedules": scheduled_runs(output), "resumed": resumed_run(output), "distilled": distilled_run(output)}
    for family, how, accumulation in torch.load(output / "runs.pt"):
        trainer = make_trainer(family, HOW[how][0], accumulation, HOW[how][1], output / "runs", processes=2)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        total = float(sum(p.detach().sum() for p in trainer.model.parameters()))
        results[family, how, accumulation] = {"state": state, "logs": logs, "replicas": all_of(total)}
    if torch.distributed.get_rank() == 0:
        torch.save(results, output / "results.pt")
    Accelerator().end_training()


if __name__ == "__main__":
    run_in_processes(2, main, Path(sys.argv[1]))

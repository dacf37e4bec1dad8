"""Started by tests of FSDP2: trains in two processes and leaves the results of rank 0 in a file.

First the parts of `fsdp_trainer_runs.py` that are asked for, since Accelerate makes the process group there; then,
where "minimizer" is asked for, the minimizer alone.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import fsdp_trainer_runs
import torch
import torch.distributed as dist
from forked import run_in_processes
from fsdp_runs import LEARNING_RATE, MICRO_BATCHES, PROCESSES, RHO, RUNS, STEPS, batch, loss_of, net
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_saq import SharpnessAwareMinimizer


def shard(model: nn.Module) -> nn.Module:
    fully_shard(model[0])
    fully_shard(model[3])
    return fully_shard(model)


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in state.items()}


def train(model: nn.Module, minimizer: SharpnessAwareMinimizer, global_sync: bool) -> dict[str, torch.Tensor]:
    """`MICRO_BATCHES` in each of `STEPS`; all but the last under no_sync, as Accelerate does it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    rank = dist.get_rank()
    for step in range(STEPS):
        optimizer.zero_grad()
        pending = list(range(MICRO_BATCHES))
        for micro in range(MICRO_BATCHES):
            model.set_requires_gradient_sync(micro == MICRO_BATCHES - 1)
            climbing, pending = (pending, []) if global_sync else ([micro], pending)
            for k in climbing:
                with minimizer.ascent():
                    (loss_of(model, batch(step, rank, k)) / MICRO_BATCHES).backward()
            with minimizer.perturbed():
                (loss_of(model, batch(step, rank, micro)) / MICRO_BATCHES).backward()
            with torch.no_grad():
                model(batch(step, rank, 0)[0])  # leaves the outermost parameters whole
        model.reshard()
        optimizer.step()
    return full_state(model)


def raised(action) -> str:
    """The message of what `action` raises."""
    try:
        action()
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "nothing"


def interrupted_pass() -> tuple[bool, bool]:
    """Whether shards, and the function of the next forward, are those of before after a loss that fails."""
    model = shard(net())
    minimizer = SharpnessAwareMinimizer(model, rho=RHO)
    before = [p.to_local().clone() for p in model.parameters()]
    x, y = batch(0, dist.get_rank(), 0)
    with torch.no_grad():
        clean = model(x)
    with minimizer.ascent():
        loss_of(model, (x, y)).backward()

    def fail():
        with minimizer.perturbed():
            assert not torch.equal(model(x), clean)
            raise RuntimeError("stop")

    assert "stop" in raised(fail)
    same = all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        return same, torch.equal(model(x), clean)


def unreduced_gradients() -> str:
    model = shard(net())
    minimizer = SharpnessAwareMinimizer(model, rho=RHO)
    model.set_requires_gradient_sync(False)
    loss_of(model, batch(0, dist.get_rank(), 0)).backward()
    return raised(lambda: minimizer.ascent().__enter__())


def plain_first_pass() -> str:
    model = shard(net())
    minimizer = SharpnessAwareMinimizer(model, rho=RHO)
    loss_of(model, batch(0, dist.get_rank(), 0)).backward()
    return raised(lambda: minimizer.perturbed().__enter__())


def minimizer_alone() -> dict:
    results = {}
    for name, options in RUNS.items():
        # Half of the runs shard under a minimizer that is already there, as SAQTrainer does.
        model = net()
        early = SharpnessAwareMinimizer(model, rho=RHO, **options) if options["sync"] == "global" else None
        model = shard(model)
        minimizer = early or SharpnessAwareMinimizer(model, rho=RHO, **options)
        state = train(model, minimizer, options["sync"] == "global")
        results[name] = {"state": copy.deepcopy(state), "norm": minimizer.ascent_norm, "skipped": minimizer.skipped}
        seam = minimizer._seam
        assert minimizer._eps is None and not seam._added and not seam.leaves  # nothing is left over
    results["restored"], results["function restored"] = interrupted_pass()
    results["unreduced"] = unreduced_gradients()
    results["plain first pass"] = plain_first_pass()
    for case in (1, 2):
        results[f"case {case} local"] = raised(lambda c=case: SharpnessAwareMinimizer(shard(net()), rho=RHO, case=c))
    return results


def main(output: Path, parts: list[str]) -> None:
    results = fsdp_trainer_runs.run(output, [part for part in parts if part != "minimizer"])
    if "minimizer" in parts:
        results["minimizer"] = minimizer_alone()
    if dist.get_rank() == 0:
        torch.save(results, output / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_in_processes(PROCESSES, main, Path(sys.argv[1]), sys.argv[2:])

"""Started by torchrun: trains every combination of `test_distributed.py`; rank 0 leaves the results in a file."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from training import FAMILIES, HOW, make_trainer


def main(output: Path) -> None:
    results = {}
    for family in FAMILIES:
        for case, sync in HOW:
            for accumulation in (1, 2):
                trainer = make_trainer(family, case, accumulation, sync, output / "runs", processes=2)
                trainer.train()
                logs = [entry for entry in trainer.state.log_history if "loss" in entry]
                state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
                results[family, case, accumulation, sync] = {"state": state, "logs": logs}
                gathered = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
                own = sum(p.detach().sum() for p in trainer.model.parameters()).reshape(1)
                torch.distributed.all_gather(gathered, own)
                results[family, case, accumulation, sync]["replicas"] = torch.cat(gathered)
    if torch.distributed.get_rank() == 0:
        torch.save(results, output / "results.pt")
    Accelerator().end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

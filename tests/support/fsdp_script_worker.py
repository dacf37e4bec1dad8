"""Two processes under FSDP2: the example script, from the float stage to the table."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from forked import run_in_processes
from fsdp_trainer_runs import accept_cpu

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import run_image_classification as script  # noqa: E402

ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ViTLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch` makes of examples/accelerate/fsdp2.yaml."""


def main(output: Path) -> None:
    os.environ.update(ENVIRONMENT)
    AcceleratorState.__init__ = accept_cpu(AcceleratorState.__init__)  # type: ignore[method-assign]
    seen, top1_of = [], script.top1_of
    script.top1_of = lambda model, trainer: seen.append(trainer.is_fsdp_enabled) or top1_of(model, trainer)
    script.main(
        [
            *("--float_epochs=1", "--num_train_epochs=1", "--max_train_samples=64", "--max_eval_samples=48"),
            *("--disable_tqdm=true", "--use_cpu", "--weight_bits=3", "--per_device_train_batch_size=8"),
            *("--distill_alpha=0.5", f"--output_dir={output / 'out'}"),
        ]
    )
    assert seen == [True, True], seen


if __name__ == "__main__":
    run_in_processes(2, main, Path(sys.argv[1]))

"""Does sharpness-aware quantization beat plain quantization-aware training? A sweep over tasks, bits and methods.

    python -m benchmarks.accuracy.sweep            # what `make results` runs; goes on where it stopped
    python -m benchmarks.accuracy.sweep --tasks digits --bits 2 --methods qat "case 3" --seeds 0 1 --processes 2
    python -m benchmarks.accuracy.sweep --tasks digits --bits 2 --images_per_class 5 30 60 --methods qat "case 3"

For every task and number of bits: learning rates and radii, chosen on validation images with seeds of their own (how:
`benchmarks/accuracy/choosing.py`, docs/protocol.md); then all methods on all seeds from the same float model. One JSON
for each run; `benchmarks/accuracy/page.py` makes docs/results.md of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..shared.command_line import parsed
from ..shared.runs import Runs
from .arguments import AccuracyArguments
from .study import Study
from .task import Paths
from .tasks import TASKS
from .training import ensure_float_model, float_file, workers


def main(argv: Sequence[str] | None = None) -> None:
    args, command = parsed(AccuracyArguments, argv, "benchmarks.accuracy.sweep", __doc__)
    runs = Runs(Path(args.results), command)
    paths = args.paths()
    tasks = [name for name in args.tasks if is_at_hand(name, paths)]
    with workers(args.processes) as pool:
        shared = [name for name in tasks if not TASKS[name].float_per_seed]
        list(pool.map(ensure_float_model, shared, [paths] * len(shared)))  # made once, before many ask for it
        studies = [
            Study(name, bits, args, paths, runs, pool)
            for name in tasks
            for bits in args.bits or TASKS[name].bits
            if bits in TASKS[name].bits
        ]
        with ThreadPoolExecutor(max(1, len(studies))) as threads:  # they only wait for the pool
            for future in [threads.submit(study.run) for study in studies]:
                future.result()


def is_at_hand(task_name: str, paths: Paths) -> bool:
    """Whether the data of a task is there, or what was made of it; says what is missing if it is not."""
    task = TASKS[task_name]
    if task.decoded and all((paths.cache / name).is_file() for name in (task.decoded, float_file(task_name))):
        return True
    missing = {option: getattr(paths, option) for option in task.needs if not getattr(paths, option).exists()}
    for option, path in missing.items():
        print(f"{task_name}: skipped, {path} is not there; name another place with --{option}.", flush=True)
    return not missing


if __name__ == "__main__":
    main()

"""Let the forms of a model take turns, so that what slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..layers import PackedLayer, QuantizedLayer
from ..outputs import class_axis, logits_of
from ..tables import bits_name
from .forms import FORMS, StoredForms
from .inputs import images_for
from .machine import cores, machine, versions
from .processes import Worker, WorkerError
from .results import BenchmarkResult, FormResult, Timing

CLOCKS = {"wall": "wall", "process": "cpu"}
REFERENCES = ("onnx-float", "float")
"""What ratios are to: the first of these that was measured, or whatever was."""
SECONDS = 0.1
"""How long a turn takes at least."""


class _Cell(NamedTuple):
    """Holds what the forms answered with one number of threads and one batch size, round by round."""

    threads: int
    batch: int
    turns: dict[str, list[dict[str, Any]]]


def benchmark(
    source: str | Path,
    *,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    rounds: int = 10,
    forms: Collection[str] | None = None,
    images: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    target: str = "cpu",
    clock: str = "wall",
    tell: Callable[[str], None] = lambda _: None,
) -> BenchmarkResult:
    """Measure the forms of a saved quantized model side by side: time, memory, size, and agreement with the model.

    Each form is loaded by a process of its own that has as many threads as it is told. The processes take turns, for
    `rounds` rounds, so that ratios of one run are fair also where the machine does other things.

    Args:
        source: Directory of the saved model, in float or packed storage, or a repository on the Hub.
        batch_sizes: Images of a call.
        threads: Threads of a form.
        rounds: How often each form is timed with every size of batch, in turns, >= 1.
        forms: Keys of `FORMS`; `None` for all. Those whose libraries are not installed are skipped, with the reason.
        images: Folder of pictures to measure with; `None` takes noise. Times do not depend on it, agreement does.
        image_size: Height and width in pixels, where neither the processor nor the model's configuration says; what
            the processor makes of pictures is scaled to it.
        target: That of `export_onnx`.
        clock: `"wall"`, or `"process"` for processor time, which suffers less from what else the machine does; with
            several threads it sums up all of them.
        tell: Is called with a line of text whenever something is done.

    Raises:
        ValueError: If an argument is wrong, `source` is no saved quantized model, or no form can be measured.
        RuntimeError: If the model is not calibrated.
    """
    _check(batch_sizes, threads, rounds, forms, clock)
    batch_sizes, threads = list(dict.fromkeys(batch_sizes)), list(dict.fromkeys(threads))  # each once
    with tempfile.TemporaryDirectory(prefix="hf_saq_timing_") as directory, ExitStack() as on_exit:
        on_exit.callback(torch.set_num_threads, torch.get_num_threads())
        stored = StoredForms(str(source), Path(directory), target)
        inputs, told = images_for(stored.model, stored.processor, images, image_size)
        np.save(stored.stage / "images.npy", inputs.numpy())
        with torch.inference_mode():
            dtype = stored.model.dtype
            expected = np.concatenate([logits_of(stored.model(x.to(dtype))).float().numpy() for x in inputs.split(1)])
        skipped: dict[str, str] = {}
        requests = _written(stored, inputs, [form for form in FORMS if forms is None or form in forms], skipped, tell)
        found: dict[str, FormResult] = {}
        cells: list[_Cell] = []
        for count in threads:
            cells += _measured(stored.stage, requests, count, batch_sizes, rounds, expected, found, skipped, tell)
        names = [name for name in FORMS if name in found and name not in skipped]
        if not names:
            listed = "; ".join(f"{form}: {reason}" for form, reason in skipped.items())
            raise ValueError(f"no form of {source} can be measured. {listed}")
        return BenchmarkResult(
            model=type(stored.model).__name__,
            bits=_bits(stored.model),
            images=f"{told}, {' x '.join(map(str, inputs.shape[1:]))}",
            reference=(reference := _reference(names)),
            clock=clock,
            rounds=rounds,
            machine=machine(),
            versions=versions(),
            forms=tuple(found[name] for name in names),
            timings=tuple(timing for cell in cells for timing in _timings(cell, names, reference, clock)),
            skipped=skipped,
            count=expected.size // expected.shape[class_axis(expected.ndim)],
        )


def _check(
    batch_sizes: Sequence[int], threads: Sequence[int], rounds: int, forms: Collection[str] | None, clock: str
) -> None:
    for name, values in (("batch_sizes", batch_sizes), ("threads", threads), ("rounds", [rounds])):
        if not values or not all(isinstance(value, int) and value > 0 for value in values):
            raise ValueError(f"{name}={values!r}; expected positive integers.")
    if max(threads) > cores():
        raise ValueError(f"threads={max(threads)}; this process may use {cores()} cores. Ask for at most as many.")
    unknown = set(forms or ()) - set(FORMS)
    if unknown or (forms is not None and not forms):
        raise ValueError(f"forms={list(forms or ())!r}; expected some of {list(FORMS)}.")
    if clock not in CLOCKS:
        raise ValueError(f"clock={clock!r}; expected one of {list(CLOCKS)}.")


def _written(
    stored: StoredForms, inputs: Tensor, names: list[str], skipped: dict[str, str], tell: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Write the files of all forms; returns what starts the process of each that has one."""
    requests = {}
    for name in names:
        tell(f"writing {name}")
        try:
            path, size = stored.write(FORMS[name], inputs)
        except (ImportError, ValueError) as error:
            skipped[name] = str(error)
            tell(f"skipped {name}: {error}")
            continue
        images = str(stored.stage / "images.npy")
        requests[name] = {
            "name": name,
            "loader": FORMS[name].loader,
            "path": str(path.resolve()),
            "images": images,
            "size": size,
        }
    return requests


def _measured(
    stage: Path,
    requests: dict[str, dict[str, Any]],
    threads: int,
    batch_sizes: Sequence[int],
    rounds: int,
    expected: np.ndarray,
    found: dict[str, FormResult],
    skipped: dict[str, str],
    tell: Callable[[str], None],
) -> list[_Cell]:
    """Start the forms with so many threads and time them; add to `found` and `skipped`."""
    cells = []
    with ExitStack() as on_exit:
        workers: dict[str, Worker] = {}
        for name, request in requests.items():
            if name in skipped:
                continue
            tell(f"loading {name}, threads {threads}")
            try:
                worker = on_exit.enter_context(Worker({**request, "threads": threads}, stage))
                worker.ask({"logits": str(stage / f"{name}.npy")})
            except WorkerError as error:
                skipped[name] = str(error)
                tell(f"skipped {name}: {error}")
                continue
            workers[name] = worker
            found[name] = _compared(name, request["size"], np.load(stage / f"{name}.npy"), expected)
        for batch in batch_sizes:
            cells.append(_in_turns(workers, threads, batch, rounds, skipped, tell))
    return cells


def _in_turns(
    workers: dict[str, Worker],
    threads: int,
    batch: int,
    rounds: int,
    skipped: dict[str, str],
    tell: Callable[[str], None],
) -> _Cell:
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in workers if name not in skipped}
    for turn in range(-1, rounds):  # the first one warms up
        tell(f"threads {threads}, batch {batch}: " + (f"round {turn + 1} of {rounds}" if turn >= 0 else "warming up"))
        for name in list(turns):
            try:
                answer = workers[name].ask({"batch": batch, "seconds": SECONDS})
            except WorkerError as error:
                skipped[name] = f"batch {batch}: {error}"
                del turns[name]
                continue
            if turn >= 0:
                turns[name].append(answer)
    return _Cell(threads, batch, turns)


def _timings(cell: _Cell, names: Sequence[str], reference: str, clock: str) -> list[Timing]:
    """Evaluate the forms called `names`: those that nothing happened to, in this cell or in another."""
    own = CLOCKS[clock]
    medians = {name: [statistics.median(answer[own]) for answer in cell.turns[name]] for name in names}
    return [
        _timing(name, cell, own, [a / b for a, b in zip(medians[name], medians[reference], strict=True)])
        for name in names
    ]


def _timing(name: str, cell: _Cell, clock: str, ratios: list[float]) -> Timing:
    answers = cell.turns[name]
    seconds = {key: [one for answer in answers for one in answer[key]] for key in ("wall", "cpu")}
    lower, median, upper = (float(value) for value in np.quantile(seconds[clock], (0.25, 0.5, 0.75)))
    memory = [answer["memory"] for answer in answers if answer["memory"] is not None]
    return Timing(
        form=name,
        threads=cell.threads,
        batch=cell.batch,
        median=median,
        lower_quartile=lower,
        upper_quartile=upper,
        fastest=min(seconds[clock]),
        ratio=statistics.median(ratios),
        wall=statistics.median(seconds["wall"]),
        cpu=statistics.median(seconds["cpu"]),
        memory_bytes=max(memory) if memory else None,
        calls=len(seconds["wall"]),
    )


def _compared(name: str, size: int, logits: np.ndarray, expected: np.ndarray) -> FormResult:
    # Sorting takes NaN for the largest score: such an image has no class, and nothing gives it the same one.
    axis = class_axis(expected.ndim)
    has_class = ~(np.isnan(logits).any(axis) | np.isnan(expected).any(axis))
    same = int((has_class & (logits.argmax(axis) == expected.argmax(axis))).sum())
    scale = np.sqrt(np.mean(np.square(expected, dtype=np.float64)))
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        difference = np.sqrt(np.mean(np.square(logits - expected, dtype=np.float64))) / max(scale, 1e-30)
    return FormResult(name, FORMS[name].about, size, same, float(difference))


def _reference(names: Sequence[str]) -> str:
    return next((name for name in REFERENCES if name in names), names[0])


def _bits(model: nn.Module) -> dict[str, int]:
    """Count the quantized layers by their bits, the most frequent first."""
    found: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, (QuantizedLayer, PackedLayer)):
            weight = layer.bits if isinstance(layer, PackedLayer) else getattr(layer.weight_quantizer, "bits", None)
            activation = getattr(layer.activation_quantizer, "bits", None)
            found[bits_name(weight, activation)] += 1
    return dict(found.most_common())

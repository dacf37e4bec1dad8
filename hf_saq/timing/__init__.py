"""Measure how fast, how large and how faithful the forms of one quantized model are, side by side.

Comes in: the directory of a saved quantized model. Goes out: times, memory, sizes and agreement of each form, as a
table and as plain values. Must not know: training, the Hub, the command line.

`forms` lists what is measured and writes it; `worker` runs one form in a process of its own, as `loading` and
`memory` say; `processes` talks to it; `measuring` lets them take turns; `inputs` makes images, `machine` names the
processor, `results` holds what was found. `nodes/` times single nodes of exports, for `hf_saq.analysis`.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .forms import FORMS
    from .measuring import benchmark
    from .results import BenchmarkResult, FormResult, Timing

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "forms": ("FORMS",),
        "measuring": ("benchmark",),
        "results": ("BenchmarkResult", "FormResult", "Timing"),
    },
)

__all__ = ["FORMS", "BenchmarkResult", "FormResult", "Timing", "benchmark"]

"""Write quantized models as integer graphs for other engines, and check that they predict what the model predicts.

Comes in: quantized or packed models, calibrated. Goes out: a directory with an ONNX graph, and a report of what in it
was verified. Must not know: training, pushing, the command line. The libraries it needs are extras, imported when they
are used.

`stored_grids` says how grids are held, `integer_layers` what a layer computes from them, `operators` how that is
written in ONNX; `integer_copy` and `tracing` make the graph, `passes/` make it fast, `checks/`
verify it, `onnx_export` writes it; `engine_model` runs it.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .checks import ExportCheckError
    from .engine_model import ExportedClassifier
    from .extras import ENGINES, check_can_export
    from .onnx_export import export_onnx
    from .report import ExportedLayer, ExportReport

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "checks": ("ExportCheckError",),
        "engine_model": ("ExportedClassifier",),
        "extras": ("ENGINES", "check_can_export"),
        "onnx_export": ("export_onnx",),
        "report": ("ExportReport", "ExportedLayer"),
    },
)

__all__ = [
    "ENGINES",
    "ExportCheckError",
    "ExportReport",
    "ExportedClassifier",
    "ExportedLayer",
    "check_can_export",
    "export_onnx",
]

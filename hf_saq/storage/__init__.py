"""Write models to directories and read them back: what a checkpoint holds, and that nothing else is ever loaded.

Comes in: quantized and packed models, directories, names of repositories to read. Goes out: `config.json` and weight
files, written whole and sealed; models through `from_pretrained`; what a saved model was found to hold. Must not know:
pushing, model cards, training, the command line.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_exports

if TYPE_CHECKING:
    from .inspection import inspect_checkpoint
    from .inspection_report import StoredLayer, StoredModel
    from .rewriting import dequantize_saved, pack_saved
    from .saved_directory import load_saved
    from .staging import staged
    from .weight_files import weight_file_bytes

# Import lazily: `from_pretrained` is imported while transformers is half loaded, and inspection needs all of it.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "inspection_report": ("StoredLayer", "StoredModel"),
        "inspection": ("inspect_checkpoint",),
        "rewriting": ("dequantize_saved", "pack_saved"),
        "saved_directory": ("load_saved",),
        "staging": ("staged",),
        "weight_files": ("weight_file_bytes",),
    },
)

__all__ = [
    "StoredLayer",
    "StoredModel",
    "dequantize_saved",
    "inspect_checkpoint",
    "load_saved",
    "pack_saved",
    "staged",
    "weight_file_bytes",
]

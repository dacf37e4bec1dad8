"""Make transformers know `quant_method="saq"` as soon as it is loaded, without loading it.

Importing what `from_pretrained` needs takes seconds, so `import hf_saq` does not do it. It leaves a finder in
`sys.meta_path` that waits for two modules of transformers. When one of them is loaded completely, for whatever reason,
the finder imports the module of ours that extends it; that module registers itself at its end. When both are done, the
finder is removed.

Both modules of ours may also be imported first, by themselves. They then import transformers, and the finder meets a
module of ours that is half loaded. As that one registers itself at its end, nothing is left to do.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTERED_BY = {
    "transformers.quantizers": "hf_saq.storage.from_pretrained",
    "transformers.modeling_utils": "hf_saq.conversion.attention_interface",
}
"""Module of transformers -> the module of ours that extends it.

There are two, because the first may be imported alone: it has the tables that `quant_method` is looked up in. The
second imports the first. Our attention needs its classes, so it can be made only when the second is complete.
"""


def register_when_loaded(registered_by: Mapping[str, str] = REGISTERED_BY) -> None:
    """Import our modules as soon as those of transformers are loaded: now, if they are loaded already.

    It may be called again.

    Raises:
        ImportError: If one of our modules cannot be imported. Where that happens later, the import of transformers
            raises it: without our module a quantized checkpoint could not be loaded.
    """
    _stop_waiting()
    # Insert the finder first, so that it sees what another thread begins to load from here on. If another thread is
    # loading a module now, our module waits for it, because it imports that module.
    sys.meta_path.insert(0, _RegisteringFinder(registered_by))
    try:
        for theirs in registered_by:
            if sys.modules.get(theirs) is not None:
                _register(theirs, registered_by)
    except ImportError:
        _stop_waiting()  # `import hf_saq` fails, so transformers has to do without it
        raise


def _stop_waiting() -> None:
    """Remove our finders from `sys.meta_path`, also one that was left there when this module was reloaded."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != __name__]


class _RegisteringFinder(MetaPathFinder):
    """Finds a module as the other finders do, and makes its loader import one of our modules after it."""

    def __init__(self, registered_by: Mapping[str, str]):
        self.registered_by = registered_by

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.registered_by:
            return None
        for finder in list(sys.meta_path):  # other threads may change it
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader, self.registered_by)
                return spec
        return None


class _RegisteringLoader(Loader):
    """Loads a module with its own loader, then imports one of our modules."""

    def __init__(self, loader: Loader, registered_by: Mapping[str, str]):
        self.loader, self.registered_by = loader, registered_by

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Give the module its own loader back: `inspect` and `importlib.reload` ask for it.
        module.__loader__ = self.loader
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register(module.__name__, self.registered_by)


def _register(theirs: str, registered_by: Mapping[str, str]) -> None:
    """Import the module of ours that extends `theirs`, and stop waiting when all are loaded."""
    ours = registered_by[theirs]
    try:
        import_module(ours)
    except Exception as error:
        # Raise no RuntimeError: transformers would say that its own requirements are missing.
        raise ImportError(
            f"hf_saq could not register with transformers: {ours} failed to import after {theirs} was loaded "
            f"({type(error).__name__}: {error}). Install versions of hf_saq and transformers that go together, or do "
            "not import hf_saq here."
        ) from error
    if all(name in sys.modules for pair in registered_by.items() for name in pair):
        _stop_waiting()

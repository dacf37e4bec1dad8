"""Import what a package exports only when it is asked for (PEP 562), so that importing the package itself is quick.

Such a package lists its names three times: in the call of [`lazy_exports`], under `TYPE_CHECKING` for editors
and mypy, and in `__all__`. `tests/package/test_public_names.py` compares them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, Collection[str]], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the functions `__getattr__` and `__dir__` of a package.

    Args:
        package: Its `__name__`.
        exports: Module of the package -> the names that the package exports from it. None of them may be the name of a
            module of the package, because importing that module would put it in the place of the export.
        modules: Modules of the package that may be used as its attributes without being imported first.
    """
    origin = {name: module for module, names in exports.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in origin:
            value = getattr(import_module(f".{origin[name]}", package), name)
        elif name in modules:
            value = import_module(f".{name}", package)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # look it up only once
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *origin, *modules})

    return __getattr__, __dir__

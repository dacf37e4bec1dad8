"""The import arrows between rooms: data flows downwards, imports point one way."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import hf_saq

PACKAGE = Path(hf_saq.__file__).parent
ROOT = PACKAGE.name

# Each room may import from those before it. A new one takes its place here, deliberately.
ORDER = (
    "version",
    "installing",
    "progress",
    "lazy",
    "registration",
    "tables",
    "outputs",
    "data",
    "quantizers",
    "layers",
    "sharpness",
    "config",
    "conversion",
    "storage",
    "export",
    "timing",
    "analysis",
    "hub",
    "training",
    "cli",
    "__main__",
    "__init__",
)
MAY_IMPORT = {
    "quantizers": set(),
    "layers": {"quantizers"},
    "sharpness": {"quantizers", "layers"},
}
"""Rooms that know less than the order would let them."""
METHOD = {"quantizers", "layers", "sharpness"}
METHOD_LIBRARIES = {"torch", "numpy"}
"""The method itself: torch, and numpy for its random state."""
KNOW_TRANSFORMERS = {"config", "storage", "hub", "training", "cli"}
TRANSFORMERS = {"transformers", "accelerate", "huggingface_hub"}
AT_THE_SEAM = {"conversion.attention_interface", "export.engine_model"}
"""Attention products can only be quantized where transformers looks its attention functions up; what runs in its
pipelines returns its outputs."""
LARGEST_ROOM = 14


def modules() -> dict[str, Path]:
    """Dotted names below the package, `layers.linear` for example; packages under their own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imported(name: str, path: Path) -> set[str]:
    """Absolute dotted names that a module imports, also inside functions: `hf_saq.layers`, `torch.nn`."""
    is_package = path.name == "__init__.py"
    package = [ROOT, *name.split(".")] if is_package and name != "__init__" else [ROOT, *name.split(".")[:-1]]
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from . import layers` names a module, `from .layers import QuantLinear` what is inside one.
                inner = f"{base}.{alias.name}"
                targets.add(inner if inner.removeprefix(f"{ROOT}.") in MODULES else base)
    return targets


MODULES = modules()
GRAPH = {name: imported(name, path) for name, path in MODULES.items()}


def internal(name: str) -> set[str]:
    return {target.removeprefix(f"{ROOT}.") for target in GRAPH[name] if target.split(".")[0] == ROOT}


def room(name: str) -> str:
    return name.split(".")[0]


def test_the_graph_is_seen():
    """Guards the parser itself: were it to find nothing, everything below would pass."""
    assert len(GRAPH) > 20
    assert "layers.quantized" in internal("layers.linear")
    assert "quantizers" in internal("layers.quantized")
    assert "sharpness.sharding" in internal("sharpness.displacement")
    assert "transformers" in {room(target) for target in GRAPH["training.trainer"]}


def test_every_room_has_a_place():
    unknown = {room(name) for name in GRAPH} - set(ORDER)
    assert not unknown, f"{sorted(unknown)} have no place in the order of imports"


def test_imports_point_to_earlier_rooms_only():
    wrong = [
        f"{name} imports {target}"
        for name in GRAPH
        for target in internal(name)
        if room(target) != room(name) and ORDER.index(room(target)) > ORDER.index(room(name))
    ]
    assert not wrong


def test_there_is_no_cycle():
    TopologicalSorter({name: internal(name) - {name} for name in GRAPH}).prepare()  # raises CycleError


def test_the_method_knows_torch_and_what_is_below_it():
    for name in GRAPH:
        if room(name) in METHOD:
            assert {room(target) for target in internal(name)} <= MAY_IMPORT[room(name)] | {room(name)}, name
            libraries = {room(target) for target in GRAPH[name]} - {ROOT} - sys.stdlib_module_names
            assert libraries <= METHOD_LIBRARIES, name


def test_only_the_seams_know_transformers():
    know = {name for name, targets in GRAPH.items() if {room(target) for target in targets} & TRANSFORMERS}
    assert {room(name) for name in know - AT_THE_SEAM} <= KNOW_TRANSFORMERS


def test_every_room_says_what_it_is_for():
    for path in PACKAGE.rglob("__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, f"{path.parent.name} has no docstring"
        if path.parent not in (PACKAGE, *PACKAGE.glob("*/*/")):
            assert "Comes in:" in docstring and "Goes out:" in docstring, path.parent.name


def test_rooms_and_files_stay_small():
    """A file above 300 lines says in its docstring why it is one."""
    for directory in {path.parent for path in MODULES.values()}:
        files = list(directory.glob("*.py"))
        assert len(files) <= LARGEST_ROOM, f"{directory.name} has {len(files)} files"
    lengths = {}
    for path in MODULES.values():
        text = path.read_text(encoding="utf-8")
        lengths[path.name] = len(text.splitlines())
        if lengths[path.name] > 300:
            assert "One file because" in (ast.get_docstring(ast.parse(text)) or ""), path.name
    assert sorted(lengths.values())[len(lengths) // 2] <= 120

"""The house of the benchmarks: who imports whom, how big rooms are, and that make targets name scripts that exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "benchmarks"
ROOMS = sorted(path.parent.name for path in HOUSE.glob("*/__init__.py"))
SCRIPTS = sorted(set(re.findall(r"-m (benchmarks[.\w]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))))


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the benchmarks that the module at `path` imports from."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("benchmarks.")}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_itself_and_the_shared_parts(room):
    """Nothing runs between two rooms, so that each can be read by itself; the shared parts know no room."""
    modules = list((HOUSE / room).rglob("*.py"))
    found = {path.name: imported_rooms(path) - {room, "shared"} for path in modules}
    assert modules and not any(found.values()), found


def test_imports_between_rooms_are_seen():
    assert {"shared", "step_cost"} <= imported_rooms(HOUSE / "step_cost" / "sweep.py")
    assert "shared" in imported_rooms(HOUSE / "accuracy" / "tasks" / "flowers.py")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for(room):
    doc = ast.get_docstring(ast.parse((HOUSE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    for words in ("Comes in:", "Goes out:", "Must not"):
        assert words in doc, (room, words)
    for target in re.findall(r"`make ([\w-]+)`", doc):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target
    assert room in (HOUSE / "__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_small(room):
    assert len(list((HOUSE / room).glob("*.py"))) <= 15


@pytest.mark.parametrize("script", SCRIPTS)
def test_make_targets_name_scripts(script):
    spec = importlib.util.find_spec(script)
    assert spec is not None and spec.origin is not None
    assert 'if __name__ == "__main__":' in Path(spec.origin).read_text(encoding="utf-8")

"""What may be imported from the package: the lists agree, and whatever users are told to import is on them."""

from __future__ import annotations

import ast
import copy
import importlib
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANGS

import hf_saq

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_saq"
INITS = sorted(PACKAGE.rglob("__init__.py"))
ROOMS = {".".join(path.relative_to(ROOT).parent.parts): path for path in INITS}
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]
EXAMPLES = sorted(ROOT.glob("examples/**/*.py"))


def for_type_checkers(tree: ast.Module) -> dict[str, str]:
    """Name -> module relative to the package, of the imports under `if TYPE_CHECKING`; "" for modules themselves."""
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


def lazy_table(tree: ast.Module) -> tuple[dict[str, str], tuple[str, ...]] | None:
    """Name -> module, and modules, of the call of `lazy_exports`."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "lazy_exports":
            table = ast.literal_eval(call.args[1])
            modules = next((ast.literal_eval(k.value) for k in call.keywords if k.arg == "modules"), ())
            return {name: module for module, names in table.items() for name in names}, modules
    return None


LAZY = [room for room, path in ROOMS.items() if lazy_table(ast.parse(path.read_text())) is not None]


def test_lazy_packages_are_seen():
    """Guards the parser: were it to find none, the tests below would pass."""
    assert {"hf_saq", "hf_saq.conversion", "hf_saq.storage", "hf_saq.hub", "hf_saq.training"} <= set(LAZY)


@pytest.mark.parametrize("room", LAZY)
def test_the_three_lists_of_a_lazy_package_agree(room: str):
    tree = ast.parse(ROOMS[room].read_text())
    table, modules = lazy_table(tree)
    checked = for_type_checkers(tree)
    assert {name: module for name, module in checked.items() if module} == table
    assert {name for name, module in checked.items() if not module} <= set(modules)
    package = importlib.import_module(room)
    eager = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level and node.module != "lazy"
        for alias in node.names
    } - {"lazy_exports", "register_when_loaded"}
    assert set(package.__all__) == set(checked) | eager
    assert len(set(package.__all__)) == len(package.__all__)


@pytest.mark.parametrize("room", LAZY)
def test_a_lazy_name_is_not_also_a_module(room: str):
    """Importing that module would put it in the place of the name."""
    table, _ = lazy_table(ast.parse(ROOMS[room].read_text()))
    beside = {path.stem for path in ROOMS[room].parent.glob("*.py")} | {
        path.parent.name for path in ROOMS[room].parent.glob("*/__init__.py")
    }
    assert not set(table) & beside


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_exports_is_there(room: str):
    package = importlib.import_module(room)
    assert package.__all__
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match=f"module '{room}' has no attribute 'no_such_name'"):
        package.no_such_name  # noqa: B018


def test_everything_with_a_star():
    namespace: dict = {}
    exec("from hf_saq import *", namespace)
    assert set(hf_saq.__all__) <= set(namespace)
    assert callable(namespace["cost"]) and callable(namespace["parameter_groups"])


def test_a_name_stays_what_it_is():
    """Whichever module was imported before."""
    import hf_saq.analysis.costs
    import hf_saq.training.trainer  # noqa: F401 (imports its neighbour `parameter_groups`)

    assert hf_saq.cost is hf_saq.analysis.cost and callable(hf_saq.cost)
    assert callable(hf_saq.training.parameter_groups) and hf_saq.parameter_groups is hf_saq.training.parameter_groups
    config = hf_saq.SAQConfig(rho=0.25)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(hf_saq.SAQTrainer)) is copy.copy(hf_saq.SAQTrainer) is hf_saq.SAQTrainer


def test_rooms_are_attributes_of_the_package():
    code = "import hf_saq; assert 'lsq' in hf_saq.quantizers.QUANTIZERS; hf_saq.storage.inspect_checkpoint"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS)
    assert outcome.returncode == 0, outcome.stderr


# What users read ---------------------------------------------------------------------------------------------------


def imports_of_ours(source: str) -> list[tuple[str, str]]:
    """Pairs of package and name that are imported; the name is "" for `import hf_saq.x`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_saq":
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "hf_saq"]
    return found


def told_to_import() -> list[tuple[str, str, str]]:
    sources = [(path, path.read_text()) for path in EXAMPLES]
    for path in DOCUMENTS:
        sources += [(path, block) for block in re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)]
    return [(path.name, *pair) for path, source in sources for pair in imports_of_ours(source)]


def test_users_import_from_the_package_and_its_rooms_only():
    told = told_to_import()
    assert {"README.md", "run_image_classification.py"} <= {document for document, _, _ in told}
    for document, package, name in told:
        assert package in ROOMS, f"{document} imports from {package}, which is no room"
        assert not name or name in importlib.import_module(package).__all__, f"{document}: {package}.{name}"


def mentions() -> list[tuple[str, str]]:
    """Dotted names of ours in the text of documents, and in the comments and strings of the package."""
    paths = [*DOCUMENTS, *EXAMPLES, *sorted(PACKAGE.rglob("*.py"))]
    return [
        (path.relative_to(ROOT).as_posix(), name)
        for path in paths
        for name in re.findall(r"(?<![\w/.\"'-])hf_saq(?:\.[A-Za-z_]\w*)+(?!/)", path.read_text())
    ]


def test_names_that_are_mentioned_exist():
    found = mentions()
    assert {"hf_saq.cost", "hf_saq.parameter_groups"} <= {name for _, name in found}
    for document, name in found:
        value, parts = hf_saq, name.split(".")[1:]
        for i, part in enumerate(parts):
            try:
                value = getattr(value, part)
            except AttributeError:
                try:
                    value = importlib.import_module(".".join(["hf_saq", *parts[: i + 1]]))
                except ImportError:
                    pytest.fail(f"{document} mentions {name}, which does not exist")

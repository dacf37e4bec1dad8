"""The import arrows: data flows downwards, imports point one way."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import hf_saq

PACKAGE = Path(hf_saq.__file__).parent
ROOT = PACKAGE.name

# Each unit may import from those before it. A new module takes its place here, deliberately.
ORDER = (
    "version",
    "rng",
    "norm_statistics",
    "default_rho",
    "schedules",
    "trigger",
    "sub_batch",
    "packing",
    "quantizers",
    "scope",
    "parameter_groups",
    "sharding",
    "kept_weights",
    "displacement",
    "gradients",
    "perturbation",
    "look_sam",
    "scheduled_step",
    "schedule_checkpoint",
    "layers",
    "attention_interface",
    "config",
    "report",
    "planning",
    "first_scales",
    "conversion",
    "calibration",
    "bias_correction",
    "cost",
    "packed_model",
    "seal",
    "hf_quantizer",
    "staging",
    "checkpoints",
    "model_card",
    "training_curve",
    "hub",
    "inspection",
    "saved_models",
    "publishing",
    "trainer",
    "export",
    "analysis",
    "cli",
    "__main__",
    "__init__",
)
KNOW_TRANSFORMERS = {"attention_interface", "config", "hf_quantizer", "model_card", "hub", "inspection"} | {
    "publishing",
    "trainer",
    "cli",
}
# The method itself: torch (numpy for its random state), quantizers, and one another.
METHOD = {"scope", "rng", "norm_statistics", "schedules", "sharding", "perturbation"} | {
    "kept_weights",
    "displacement",
    "gradients",
    "look_sam",
    "scheduled_step",
    "sub_batch",
    "trigger",
}
METHOD_MAY_IMPORT = METHOD | {"quantizers"}
METHOD_LIBRARIES = {"torch", "numpy"}


def modules() -> dict[str, Path]:
    """Dotted names below the package, `layers.linear` for example; packages under their own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imported(name: str, path: Path) -> set[str]:
    """Absolute dotted names that a module imports, also inside functions: `hf_saq.layers`, `torch.nn`."""
    package = [ROOT, *name.split(".")] if path.name == "__init__.py" else [ROOT, *name.split(".")[:-1]]
    if name == "__init__":
        package = [ROOT]
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            # `from . import layers` names modules, `from .layers import QuantLinear` names what is inside one.
            targets |= {f"{base}.{alias.name}" for alias in node.names} if base == ROOT else {base}
    return targets


GRAPH = {name: imported(name, path) for name, path in modules().items()}


def internal(name: str) -> set[str]:
    return {target.removeprefix(f"{ROOT}.") for target in GRAPH[name] if target.split(".")[0] == ROOT}


def unit(name: str) -> str:
    return name.split(".")[0]


def test_the_graph_is_seen():
    """Guards the parser itself: were it to find nothing, everything below would pass."""
    assert len(GRAPH) > 20
    assert "quantizers" in internal("layers.linear") | internal("layers.base")
    assert internal("layers") == {"layers.attention", "layers.base", "layers.conv", "layers.linear", "layers.packed"}
    assert "torch" in GRAPH["perturbation"] and "norm_statistics" in internal("perturbation")
    assert "transformers" in {unit(target) for target in GRAPH["trainer"]}


def test_every_module_has_a_place():
    unknown = {unit(name) for name in GRAPH} - set(ORDER)
    assert not unknown, f"{sorted(unknown)} have no place in the order of imports"


def test_imports_point_to_earlier_units_only():
    wrong = [
        f"{name} imports {target}"
        for name in GRAPH
        for target in internal(name)
        if unit(target) != unit(name) and ORDER.index(unit(target)) > ORDER.index(unit(name))
    ]
    assert not wrong


def test_there_is_no_cycle():
    TopologicalSorter({name: internal(name) - {name} for name in GRAPH}).prepare()  # raises CycleError


def test_quantizers_and_layers_import_nothing_above_them():
    allowed = {"quantizers": {"quantizers"}, "layers": {"layers", "quantizers", "packing"}}
    for name in GRAPH:
        if unit(name) in allowed:
            assert {unit(target) for target in internal(name)} <= allowed[unit(name)], name


def test_the_method_knows_torch_and_quantizers_only():
    for name in METHOD & GRAPH.keys():
        assert {unit(target) for target in internal(name)} <= METHOD_MAY_IMPORT, name
        libraries = {unit(target) for target in GRAPH[name]} - {ROOT} - sys.stdlib_module_names
        assert libraries <= METHOD_LIBRARIES, name


def test_only_the_seams_know_transformers():
    know = {
        unit(name)
        for name, targets in GRAPH.items()
        if {unit(target) for target in targets} & {"transformers", "accelerate", "huggingface_hub"}
    }
    assert know <= KNOW_TRANSFORMERS

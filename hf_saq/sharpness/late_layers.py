"""Find the layers at the end of a model, those that a perturbation of a part of its depth moves."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from . import sharding
from .perturbed_tensors import own_parameters

Edge = tuple[Any, int]
"""A node of autograd's graph and which of its outputs."""


@dataclass(frozen=True)
class LateLayers:
    """Holds the end of a model as names, so that it stays valid where parameters are replaced.

    Attributes:
        first: Module that it begins with. All that is computed later depends on what was computed earlier by the
            inputs of this module alone.
        share: Share of the operations of a forward pass that are done from `first` on, in (0, 1].
        modules: All modules that run from `first` on.
        before: Modules that end before `first` begins, without those inside of others of them.
        is_compiled: Whether `torch.compile` runs the model, which then does not notice what is done to its modules.
    """

    first: str
    share: float
    modules: frozenset[str]
    before: tuple[str, ...]
    is_compiled: bool = False


def find_late_layers(
    model: nn.Module, depth: float, perturbed: Collection[nn.Parameter], run: Callable[[], object]
) -> LateLayers:
    """Find the longest end of `model` with at most `depth` of the operations of a forward pass.

    An end must hold some of the `perturbed` parameters, and be reached from the rest of the model by the inputs of
    its first module alone, as the blocks of a ResNet or a ViT are. Where each such end has more operations than
    `depth`, the shortest is taken. Operations are those that torch's `FlopCounterMode` counts: convolutions, matrix
    products and attention.

    Args:
        depth: Share of the operations, in (0, 1).
        run: Runs forward, and may run backward, of one batch.

    Raises:
        ValueError: If the model has no such end.
    """
    visits = _Visits(model)
    with visits.watching():
        run()
    ends = {end.first: end for end in visits.ends() if visits.holds(end, perturbed)}
    affordable = sorted((end for end in ends.values() if end.share <= depth), key=lambda end: -end.share)
    longer = sorted((end for end in ends.values() if end.share > depth), key=lambda end: end.share)
    # Look at the graph last and only as often as needed: that is what takes time.
    found = next((end.first for end in [*affordable, *longer] if visits.is_separate(end)), None)
    found = sharding.of_first_process(found)  # batches of other shapes have other shares
    if found in ends:
        return ends[found]
    raise ValueError(
        f"ascent_depth={depth}: {type(model).__name__} has no layer through which all goes that comes before it, "
        "as where branches run side by side to the end, so that no part of its depth can be perturbed. "
        "Leave ascent_depth out."
    )


@dataclass
class _Visit:
    """Holds what is known of a module that ran.

    Attributes:
        done_before: Operations that were done before it.
        inputs: Edges of the graph at its inputs.
        keeps_inputs: Whether it leaves its inputs as they are, so that it can run again.
    """

    done_before: int
    inputs: set[Edge] = field(default_factory=set)
    keeps_inputs: bool = True


class _Visits:
    """Watches which modules run, in which order, and how their inputs hang together."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._visits: dict[str, _Visit] = {}  # in the order of their first run
        # Hold parameters as they are while a module runs: FSDP2 has others there than outside of it.
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._entered: dict[str, list[list[int]]] = {}  # versions of the inputs of modules that are running
        self._outputs: set[Edge] = set()
        self._total = 0
        self._is_compiled = False

    def watching(self) -> ExitStack:
        """Watch the forward passes inside the block."""
        stack = ExitStack()
        # Run compiled parts as written: what counts operations sees into nothing else.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Using `torch.compile")  # the counter watches modules by hooks
        counter = stack.enter_context(FlopCounterMode(display=False))

        def enter(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG001
                self._is_compiled |= name == "" and _runs_compiled()
                visit = self._visits.setdefault(name, _Visit(counter.get_total_flops()))
                args, kwargs = tree_map(_alias, (args, kwargs))  # what goes past the module has edges of its own
                visit.inputs |= _edges([args, kwargs])
                self._parameters[name] = list(module.parameters(recurse=False))
                self._entered.setdefault(name, []).append(versions_of([args, kwargs]))
                return args, kwargs

            return hook

        def check(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
                if versions_of([args, kwargs]) != self._entered[name].pop():
                    self._visits[name].keeps_inputs = False

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            self._total = counter.get_total_flops()
            self._outputs |= _edges(_what_is_trained_on(output))

        for name, module in self._model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(check(name), with_kwargs=True).remove)
        stack.callback(self._model.register_forward_hook(leave).remove)
        return stack

    def ends(self) -> list[LateLayers]:
        """List the ends that begin with each module that has others before it."""
        names = list(self._visits)
        ends = []
        for number, name in enumerate(names):
            share = 1 - self._visits[name].done_before / max(self._total, 1)
            earlier = [other for other in names[:number] if not _is_inside(name, other)]
            before = tuple(other for other in earlier if not any(_is_inside(other, outer) for outer in earlier))
            if before:
                ends.append(LateLayers(name, share, frozenset(names[number:]), before, self._is_compiled))
        return ends

    def holds(self, end: LateLayers, parameters: Collection[nn.Parameter]) -> bool:
        """Tell whether some of `parameters` belong to `end`."""
        return any(p in parameters for p in own_parameters(self._model, end.modules).values())

    def is_separate(self, end: LateLayers) -> bool:
        """Tell whether no parameter before `end` is reached but by the inputs of its first module, which it keeps."""
        first = self._visits[end.first]
        earlier = {p for name, own in self._parameters.items() if name not in end.modules for p in own}
        return first.keeps_inputs and not _leaves_behind(self._outputs, first.inputs) & earlier


def _alias(value: Any) -> Any:
    return value.view_as(value) if isinstance(value, Tensor) and value.requires_grad else value


def _edges(structure: Any) -> set[Edge]:
    """List where the tensors in a structure hang in autograd's graph, if they do."""
    tensors = [leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return {(t.grad_fn, t.output_nr) for t in tensors if t.grad_fn is not None}


def versions_of(structure: Any) -> list[int]:
    """List how often each tensor in a structure has been changed in place."""
    return [leaf._version for leaf in tree_leaves(structure) if isinstance(leaf, Tensor)]


def _what_is_trained_on(output: Any) -> Any:
    """Take the loss, else the logits of an output that names them: hidden states hang at earlier layers."""
    for name in ("loss", "logits"):
        found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(found, Tensor) and found.requires_grad:
            return found
    return output


def _runs_compiled() -> bool:
    """Tell whether the code that is running was called through what `torch.compile` returns."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_inside(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(f"{other}."))


def _leaves_behind(starts: Iterable[Edge], barrier: set[Edge]) -> set[Any]:
    """Collect the parameters that are reached from `starts` in autograd's graph without crossing `barrier`."""
    seen: set[Any] = set()
    leaves: set[Any] = set()
    waiting = [edge for edge in starts if edge not in barrier]
    while waiting:
        node, _ = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        waiting += [edge for edge in node.next_functions if edge[0] is not None and edge not in barrier]
    return leaves

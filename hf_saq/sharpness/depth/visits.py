"""Watch the modules of a model while it runs: their order, their operations, and what their inputs hang at."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from ...layers.as_written import run_as_written

Edge = tuple[Any, int]
"""A node of autograd's graph and which of its outputs."""


@dataclass
class Visit:
    """Holds what is known of a module that ran in the first forward of the model.

    Attributes:
        done_before: Operations that were done before it.
        inputs: Edges of the graph at its inputs, in all forwards.
        can_be_first: Whether it leaves its inputs as they are, so that it can run again, and runs once in a forward.
        latest: Number of the latest forward that it ran in.
        entered: Versions of the inputs of its calls that are running.
    """

    done_before: int
    inputs: set[Edge] = field(default_factory=set)
    can_be_first: bool = True
    latest: int = -1
    entered: list[list[int]] = field(default_factory=list)


class Visits:
    """Watches which modules run, in which order, and how their inputs hang together.

    Attributes:
        of: Module -> its visit, in the order of the first calls in the first forward of the model.
        outputs: Edges of the graph at what the model is trained on.
        total: Operations of the first forward.
        obstacle: Why a later pass cannot leave out modules or begin in the middle; `""` if it can.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self.of: dict[str, Visit] = {}
        # Note names of parameters while modules run: FSDP2 has other tensors there than outside of them.
        self._names: dict[Tensor, set[str]] = {}
        self.outputs: set[Edge] = set()
        self.total, self.obstacle = 0, ""
        self._forwards, self._is_inside = 0, False  # forwards that are over, and whether one is running

    def watching(self) -> ExitStack:
        """Watch the forward passes inside the block."""
        stack = ExitStack()
        # Run compiled parts as written: what counts operations sees into nothing else.
        stack.enter_context(run_as_written())
        counter = FlopCounterMode(display=False)
        # Count without a look at modules: torch's tracker of them fails where a loss asks for the gradient of images.
        counter.mod_tracker = _NoTracker()  # type: ignore[assignment]
        stack.enter_context(counter)
        started = 0

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001
            nonlocal started
            self._is_inside, started = True, counter.get_total_flops()
            if _runs_compiled():  # it does not notice what is done to its modules
                self.obstacle = "the model is compiled (torch.compile), layers that come before with it"
            elif any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves([args, kwargs])):
                self.obstacle = "the loss asks for gradients of the model's inputs"

        def end(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            self._is_inside = False
            if self._forwards == 0:
                self.total = counter.get_total_flops() - started
            self._forwards += 1
            self.outputs |= _edges(_what_is_trained_on(output))

        def enter(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
                is_plain, versions = _is_plain(args, kwargs), versions_of([args, kwargs])
                if is_plain:  # what goes past the module then has edges of its own, in recomputed forwards too
                    args, kwargs = tree_map(_alias, (args, kwargs))
                if not self._is_inside:
                    self.obstacle = self.obstacle or "parts of it also run outside of its forward, as in checkpointing"
                    return (args, kwargs) if is_plain else None
                for own, p in module.named_parameters(prefix=name, remove_duplicate=False):
                    self._names.setdefault(p, set()).add(own)
                if self._forwards == 0:
                    self.of.setdefault(name, Visit(counter.get_total_flops() - started))
                if (visit := self.of.get(name)) is not None:
                    visit.can_be_first &= visit.latest < self._forwards and is_plain
                    visit.latest = self._forwards
                    visit.entered.append(versions)
                    visit.inputs |= _edges([args, kwargs])
                return (args, kwargs) if is_plain else None

            return hook

        def check(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
                visit = self.of.get(name)
                if self._is_inside and visit is not None and versions_of([args, kwargs]) != visit.entered.pop():
                    visit.can_be_first = False

            return hook

        stack.callback(self._model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name, module in self._model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(check(name), with_kwargs=True).remove)
        stack.callback(self._model.register_forward_hook(end).remove)
        return stack

    def owner(self, parameter: str) -> str:
        """Find the module that a parameter belongs to: the innermost around it that ran, as some are only read."""
        module = parameter.rpartition(".")[0]
        while module and module not in self.of:
            module = module.rpartition(".")[0]
        return module

    def parameters_behind(self, starts: Iterable[Edge], but: Collection[Edge] = ()) -> frozenset[str]:
        """Name the parameters that are reached from `starts` in autograd's graph without crossing an edge of `but`."""
        return frozenset(name for leaf in _leaves_behind(starts, but) for name in self._names.get(leaf, ()))


class _NoTracker:
    """Stands for torch's tracker of modules: all operations belong to the whole."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether arguments hold no list or dict, which the module might change."""

    def holds_one(value: Any) -> bool:
        return isinstance(value, (list, dict)) or (isinstance(value, tuple) and any(map(holds_one, value)))

    return not any(map(holds_one, (*args, *kwargs.values())))


def _alias(value: Any) -> Any:
    return value.view_as(value) if isinstance(value, Tensor) and value.requires_grad else value


def _edges(structure: Any) -> set[Edge]:
    """List where the tensors in a structure hang in autograd's graph, if they do."""
    tensors = [leaf for leaf in tree_leaves(structure) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return {(t.grad_fn, t.output_nr) for t in tensors if t.grad_fn is not None}


def versions_of(structure: Any) -> list[int]:
    """List how often each tensor in a structure has been changed in place; those of inference mode do not count."""
    return [leaf._version for leaf in tree_leaves(structure) if isinstance(leaf, Tensor) and not leaf.is_inference()]


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


def is_inside(name: str, other: str) -> bool:
    """Tell whether module `name` is somewhere inside of module `other`."""
    return name != other and (other == "" or name.startswith(f"{other}."))


def _leaves_behind(starts: Iterable[Edge], barrier: Collection[Edge]) -> set[Any]:
    """Collect the leaves that are reached from `starts` in autograd's graph without crossing `barrier`."""
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

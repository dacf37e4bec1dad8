"""Run what comes before the perturbed layers once for both passes of a step.

A perturbation of the last layers leaves all before them as they are. So the first pass keeps what reaches the last
layers, with its graph, and sends its own backward no further than there. The second pass starts from what was kept:
its forward has only the last layers to run, its backward goes through everything. The gradients are those of two whole
passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import sharding
from ..buffer_state import has_running_statistics
from ..random_state import RNGState
from .late_layers import LateLayers
from .visits import is_inside, versions_of


def reason_against_sharing(model: nn.Module, late: LateLayers) -> str:
    """Say why the passes of `model` cannot share what comes before `late`; `""` if they can."""
    modules = list(model.modules())
    if any(sharding.is_sharded(p) for p in model.parameters()):
        return "its parameters are sharded (FSDP2) and go away after each layer"
    if any(
        getattr(m, name, False) is True for m in modules for name in ("gradient_checkpointing", "grad_checkpointing")
    ):
        return "gradient checkpointing keeps nothing of the layers that come before"
    if any(getattr(m, "_compiled_call_impl", None) is not None for m in modules):
        return "the model is compiled (torch.compile), layers that come before with it"
    return late.obstacle


class _Inputs:
    """Holds arguments of a module, still attached to their graph, and the random state at that moment."""

    def __init__(self, args: Any, kwargs: Any):
        self._arguments, self._random_state = (args, kwargs), RNGState()
        self._versions = versions_of(self._arguments)

    def again(self, name: str) -> tuple[Any, Any]:
        """Restore the random state and return the arguments, as they were."""
        if versions_of(self._arguments) != self._versions:
            raise RuntimeError(
                f"The input of {name} was changed in place after it was used, so that it cannot be used again. Leave "
                "ascent_depth out."
            )
        self._random_state.restore()
        return self._arguments


@dataclass
class _Kept:
    """Holds what one first pass leaves for its second: in the order of calls, for each module.

    Attributes:
        outputs: Of each module of the prefix. They only bring the model to the first late module, whose inputs are
            those of the first pass.
        inputs: What the first late module was called with.
    """

    outputs: dict[str, list[Any]] = field(default_factory=dict)
    inputs: list[_Inputs] = field(default_factory=list)


class SharedPrefix:
    """Records in first passes what second passes replay. Without late layers it does nothing.

    Args:
        model: The model that runs in both passes.
        late: The layers that are perturbed; `None`: all. If something speaks against sharing what comes before them,
            it warns and does nothing either.

    Attributes:
        parameters: All parameters but those of the late layers. The graph of a first pass must begin with them, as
            the second one goes on with it.
    """

    def __init__(self, model: nn.Module, late: LateLayers | None = None):
        reason = "" if late is None else reason_against_sharing(model, late)
        if late is not None and reason:
            warnings.warn(
                f"ascent_depth: perturbed steps take two whole passes, because {reason}. The result is the same.",
                stacklevel=2,
            )
            late = None
        self._model, self._late, self._kept = model, late, list[_Kept]()
        self._modules: dict[str, nn.Module] = {}
        self._norms: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []
        self._inside: list[nn.Parameter] = []
        if late is not None:
            self._modules = {name: model.get_submodule(name) for name in (*late.before, late.first)}
            own = {name: p for name, p in model.named_parameters() if name not in late.parameters}
            self.parameters = list(own.values())
            self._inside = [p for name, p in own.items() if any(is_inside(name, outer) for outer in late.before)]
            before = [m for name in late.before for m in self._modules[name].modules()]
            self._norms = [m for m in dict.fromkeys(before) if has_running_statistics(m)]

    def forget(self) -> None:
        """Let go of what first passes left; their graphs are freed."""
        self._kept = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the prefix computes inside the block, and end the backward of the block where the prefix ends.

        Raises:
            RuntimeError: If the backward reached the prefix all the same, or the first late module runs twice.
        """
        if self._late is None:
            yield
            return
        kept, first_name = _Kept(), self._late.first

        def keep_output(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
                if prefix.is_running:
                    # Keep tensors in lists of their own: the model may take them out of its.
                    kept.outputs.setdefault(name, []).append(tree_map(lambda leaf: leaf, output))

            return hook

        def keep_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG001
            if not prefix.is_running:
                raise RuntimeError(
                    f"{first_name} runs twice in a forward pass of the model, in this step though not in the first "
                    "one, so that its two passes cannot share what comes before. Leave ascent_depth out."
                )
            prefix.is_running = False
            kept.inputs.append(_Inputs(args, kwargs))
            return tree_map(_detached, (args, kwargs))

        with ExitStack() as stack:
            prefix = stack.enter_context(_Prefix(self._model))
            for name in self._late.before:
                stack.callback(self._modules[name].register_forward_hook(keep_output(name)).remove)
            for norm in self._norms:
                stack.enter_context(_updating_copies(norm))
            first = self._modules[first_name]
            stack.callback(first.register_forward_pre_hook(keep_inputs, with_kwargs=True).remove)
            yield
        if not kept.inputs:
            raise RuntimeError(
                f"{first_name}, where the perturbed layers begin, did not run in this step, so that its two passes "
                "cannot share what comes before. Leave ascent_depth out where a model leaves out layers."
            )
        if any(p.grad is not None for p in self._inside):
            raise RuntimeError(
                f"The loss reaches layers before {first_name} by another way than through it, so that the two passes "
                "of a step cannot share them. Leave ascent_depth out."
            )
        self._kept.append(kept)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Let the forward inside the block get past the prefix with what the oldest recording kept."""
        if self._late is None or not self._kept:
            yield
            return
        kept, first_name = self._kept.pop(0), self._late.first

        def replay(name: str) -> Callable[..., Any]:
            forward = self._modules[name].forward  # which modules that run later again need

            def replayed(*args: Any, **kwargs: Any) -> Any:
                if not prefix.is_running:
                    return forward(*args, **kwargs)
                # Copy, as what comes next may change it in place, and the graph needs it as it was.
                return tree_map(_copied, _next(kept.outputs[name], name))

            return replayed

        def put_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:  # noqa: ARG001
            prefix.is_running = False
            return _next(kept.inputs, first_name).again(first_name)

        with ExitStack() as stack:
            prefix = stack.enter_context(_Prefix(self._model))
            for name in kept.outputs:
                stack.enter_context(_with_forward(self._modules[name], replay(name)))
            first = self._modules[first_name]
            stack.callback(first.register_forward_pre_hook(put_inputs, with_kwargs=True).remove)
            yield


class _Prefix:
    """Tells where a forward of the model is: in the prefix, from its begin until somebody says otherwise."""

    def __init__(self, model: nn.Module):
        self.is_running = True
        self._model = model

    def __enter__(self) -> _Prefix:
        self._handle = self._model.register_forward_pre_hook(self._begin)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _begin(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        self.is_running = True


def _next(kept: list[Any], name: str) -> Any:
    if not kept:
        raise RuntimeError(
            f"{name} runs more often in the second pass of a step than in its first. Use the same batch and the same "
            "loss in both, or leave ascent_depth out."
        )
    return kept.pop(0)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


@contextmanager
def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` run `forward` inside the block."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def _updating_copies(norm: nn.Module) -> Iterator[None]:
    """Let `norm` update its running statistics in copies, whose values are then put into the buffers.

    Autograd keeps the buffers for the backward and refuses it once another forward, or DDP, has written to them.
    """
    buffers = {name: buffer for name, buffer in norm._buffers.items() if buffer is not None}

    def put_copies(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})

    def put_back(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        for name, buffer in buffers.items():
            copy = norm._buffers[name]
            if copy is not None and copy is not buffer:
                buffer.copy_(copy)
        norm._buffers.update(buffers)

    before = norm.register_forward_pre_hook(put_copies)
    after = norm.register_forward_hook(put_back, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()

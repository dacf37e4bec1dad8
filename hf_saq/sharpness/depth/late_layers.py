"""Find the layers at the end of a model, those that a perturbation of a part of its depth moves."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import nn

from .. import sharding
from .visits import Visits, is_inside


@dataclass(frozen=True)
class LateLayers:
    """Holds the end of a model as names, so that it stays valid where parameters are replaced.

    Attributes:
        first: Module that it begins with. All that is computed later depends on what was computed earlier by the
            inputs of this module alone.
        share: Share of the operations of a forward pass that are done from `first` on, in (0, 1].
        parameters: Parameters that are used from `first` on.
        before: Modules that run before `first` begins, without those inside of others of them.
        trainable: Parameters that were trainable when the layers were found.
        obstacle: Why two passes of the model cannot share what comes before `first`; `""`: they can.
    """

    first: str
    share: float
    parameters: frozenset[str]
    before: tuple[str, ...]
    trainable: frozenset[str]
    obstacle: str

    def is_current(self, model: nn.Module) -> bool:
        """Tell whether the same parameters are trainable still: with others, other ends are separate."""
        return self.trainable == _trainable(model)


def find_late_layers(
    model: nn.Module, depth: float, perturbed: Collection[nn.Parameter], run: Callable[[], object]
) -> LateLayers:
    """Find the longest end of `model` with at most `depth` of the operations of a forward pass.

    An end must hold some of the `perturbed` parameters, and be reached from the rest of the model by the inputs of
    its first module alone, which runs once in a forward pass: as the blocks of a ResNet or a ViT do. Where each such
    end has more operations than `depth`, the shortest is taken. Operations are those that torch's `FlopCounterMode`
    counts: convolutions, matrix products and attention.

    Args:
        depth: Share of the operations, in (0, 1).
        run: Runs forward, and may run backward, of one batch. If it calls the model several times, the first one
            counts.

    Raises:
        ValueError: If the model has no such end, or a part of it is compiled by itself.
    """
    _refuse_compiled_parts(model)
    visits = Visits(model)
    with visits.watching():
        run()
    wanted = {name for name, p in model.named_parameters(remove_duplicate=False) if p in perturbed}
    ends = {end.first: end for end in _ends(model, visits) if wanted & end.parameters}
    affordable = sorted((end for end in ends.values() if end.share <= depth), key=lambda end: -end.share)
    longer = sorted((end for end in ends.values() if end.share > depth), key=lambda end: end.share)
    # Look at the graph last and only as often as needed: that is what takes time.
    found = next((end.first for end in [*affordable, *longer] if _separated(visits, end)), None)
    found = sharding.of_first_process(found)  # batches of other shapes have other shares
    if found in ends:
        return _separated(visits, ends[found]) or ends[found]
    raise ValueError(
        f"ascent_depth={depth}: {type(model).__name__} has no layer through which all goes that comes before it, "
        "as where branches run side by side to the end, so that no part of its depth can be perturbed. "
        "Leave ascent_depth out."
    )


def _ends(model: nn.Module, visits: Visits) -> list[LateLayers]:
    """List the ends that begin with each module that has others before it."""
    owners = {name: visits.owner(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    names = list(visits.of)
    ends = []
    for number, name in enumerate(names):
        earlier = [other for other in names[:number] if not is_inside(name, other)]
        if not earlier or not visits.of[name].can_be_first:
            continue
        late = set(names[number:])
        ends.append(
            LateLayers(
                first=name,
                share=1 - visits.of[name].done_before / max(visits.total, 1),
                parameters=frozenset(p for p, owner in owners.items() if owner in late),
                before=tuple(other for other in earlier if not any(is_inside(other, outer) for outer in earlier)),
                trainable=_trainable(model),
                obstacle=visits.obstacle,
            )
        )
    return ends


def _separated(visits: Visits, end: LateLayers) -> LateLayers | None:
    """Return `end` with all parameters that are reached past its first module's inputs, if no others reach these.

    `None`: some parameter before `end` is reached by another way than through these inputs.
    """
    inputs = visits.of[end.first].inputs
    strange = visits.parameters_behind(visits.outputs, but=inputs) - end.parameters
    # Parameters of modules around the first one may be used after it, such as the scale of logits.
    if not all(is_inside(end.first, visits.owner(name)) for name in strange):
        return None
    parameters = end.parameters | strange
    return None if parameters & visits.parameters_behind(inputs) else replace(end, parameters=parameters)


def _refuse_compiled_parts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        is_compiled = isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        if name and is_compiled:
            raise ValueError(
                f"ascent_depth: {name} is compiled by itself (torch.compile of a part of a model). What torch "
                "compiled for layers that are not perturbed would run those that are as well. Compile the whole "
                "model, or leave ascent_depth out."
            )


def _trainable(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, p in model.named_parameters() if p.requires_grad)

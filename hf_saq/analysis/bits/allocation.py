"""Give each layer the bits that lose least within a budget of bit operations, bytes or time."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from torch import Tensor, nn

from ...conversion.module_names import ModuleNames
from ..batch_losses import LabelledBatches, Loss, left_as_it_was
from ..costs import cost
from .allocated import OBJECTIVES, UNITS, Allocation, By, LayerBits, Unit
from .candidates import QuantizedOperand, quantized_operands
from .integer_program import Option, solve
from .layer_sensitivity import CANDIDATES, Sensitivity, sensitivity
from .prices import Latencies, check_latencies, cost_of_layer, loss_curve, never_rising, read_budget, why
from .shared_inputs import layers_that_share_inputs, merged, refuse_shared_quantizers

KINDS = ("weight", "activation")
LEFT_BY_TRAINING = 0.1
"""What counts of the noise of weights: training moves them so that their errors cancel, while those of activations
come anew with each image. A judgement, not a measurement: docs/flatness.md has what came of it."""


def allocate_bits(
    model: nn.Module,
    batches: Iterable[Any],
    budget: float | str,
    *,
    unit: Unit = "bops",
    latencies: Mapping[str, Latencies] | None = None,
    candidates: Sequence[int] = CANDIDATES,
    by: By = "noise",
    found: Sensitivity | None = None,
    fixed: Collection[str] | None = None,
    minimum_bits: int | Mapping[str, int] = 2,
    alike: Iterable[Sequence[str]] | None = None,
    inputs: Any = None,
    loss: Loss | None = None,
    passes: float = 16.0,
    progress: bool = True,
) -> Allocation:
    """Choose bits for every quantized layer so that what they are predicted to do is smallest within a budget.

    The prediction adds up what each operand does alone, as [`sensitivity`] finds it; more bits never count as worse
    than fewer, whatever the noise of a measurement. The choice is solved exactly, as an integer program. Quantize a
    float model anew with `allocation.applied_to(config)`, and fine-tune it.

    Args:
        model: A quantized, calibrated model; it is left as it was.
        batches: As [`sensitivity`] takes them.
        budget: Most that the quantized layers may cost, in `unit`; `"0.8x"` for that part of what they cost in
            `model`, `"3 bits"` for what they cost with 3 bits wherever there is a choice. Everything else, such as
            layers in float, is not counted, because bits do not change it.
        unit: `"bops"` for bit operations (multiply-accumulates x weight bits x activation bits, one example),
            `"bytes"` for packed weights; activations then keep their bits; `"ns"` for the time in `latencies`.
        latencies: Nanoseconds of every layer for one example, by bits of weights and of activations, as
            [`measure_latencies`] finds them on the machine that the model is for. Kernels of CPUs take 2 to 8 bits
            alike, which leaves little to choose from there.
        candidates: Bits to choose from, each 2 to 8.
        by: What is added up and kept small. `"noise"`: noise to signal of the logits, the least uncertain of the
            three, and a tenth of it for weights, since training takes most of theirs back; `"measured"` or
            `"estimated"`: rises of the loss, smaller than their errors where the model fits the batches well.
        found: What `sensitivity` found for this model and these candidates, or more, to spare measuring it again.
        fixed: Layers that keep their bits, as `modules_to_not_convert` names them; by default the first layer and the
            heads, where `model` treats them apart.
        minimum_bits: Fewest bits of any operand, or a dict of a name or pattern -> fewest bits.
        alike: Groups of layers that must have the same bits for their activations; by default those that are seen to
            read the same tensor, which is quantized once. Layers that are fixed do not bind others. Full names.
        inputs: One example as `hf_saq.cost` takes it; by default the first of the first batch.
        loss: Computes the mean loss from model and batch.
        passes: Most passes over the data for the sensitivities.
        progress: Whether to show a bar after a few seconds.

    Raises:
        ValueError: If the budget is too small for any choice, if `found` lacks bits that a layer may get, or if an
            argument or the model is not what is expected.
        ImportError: If scipy is not installed.
    """
    if unit not in UNITS:
        raise ValueError(f"allocate_bits: unit={unit!r}; expected one of {list(UNITS)}.")
    if by not in OBJECTIVES:
        raise ValueError(f"allocate_bits: by={by!r}; expected 'noise', 'measured' or 'estimated'.")
    refuse_shared_quantizers(model, "allocate_bits")
    data = LabelledBatches("allocate_bits", batches, loss)
    names = ModuleNames(model)
    quantized = list(dict.fromkeys(operand.name for operand in quantized_operands(model)))
    names.add(quantized)
    report = getattr(model, "quantization_report", None)
    patterns = (getattr(report, "first_last_modules", None) or []) if fixed is None else list(fixed)
    minima = {"*": minimum_bits} if isinstance(minimum_bits, int) else dict(minimum_bits)
    names.check("allocate_bits: fixed", patterns, quantized)
    names.check("allocate_bits: minimum_bits", minima, quantized)
    together = [] if alike is None else [list(group) for group in alike]
    _check_alike(together, model)
    with left_as_it_was(model):
        if alike is None:
            together = layers_that_share_inputs(model, data)
        macs = {
            c.name: c.macs for c in cost(model, _one_example(data.batches[0]) if inputs is None else inputs).layers
        }
    operands: dict[str, dict[str, QuantizedOperand]] = {}
    for operand in quantized_operands(model):
        operands.setdefault(operand.name, {})[operand.operand] = operand
    layers = list(operands)
    free = [name for name in layers if not names.any_matches(patterns, name)]
    present = {name: [of[k].bits if k in of else None for k in KINDS] for name, of in operands.items()}
    work: Mapping[str, Any] = macs
    if unit == "ns":
        choices = {n: [[b, *candidates] if b and n in free else [b] for b in present[n]] for n in layers}
        work = check_latencies(latencies, {n: list(product(*of_layer)) for n, of_layer in choices.items()})
    before = [cost_of_layer(unit, of_layer, work[name], *present[name]) for name, of_layer in operands.items()]

    def options_with(rise: Callable[[str, str, int], float]) -> list[list[Option]]:
        """List what each layer may have, where `rise` says what bits of one operand lose."""
        options = []
        for name, of_layer in operands.items():
            fewest = max((b for pattern, b in minima.items() if names.matches(pattern, name)), default=2)
            losses: dict[str, dict[int | None, float]] = {
                kind: {of_layer[kind].bits if kind in of_layer else None: 0.0} for kind in KINDS
            }
            for kind in of_layer if name in free else ():
                if kind == "activation" and unit == "bytes":
                    continue
                allowed = [b for b in sorted(set(candidates)) if b >= fewest]
                if not allowed:
                    raise ValueError(
                        f"allocate_bits: {name} needs {fewest} bits at least, but candidates={list(candidates)}; add "
                        "some."
                    )
                losses[kind] = never_rising({b: rise(name, kind, b) for b in allowed})
            costs = {(w, a): cost_of_layer(unit, of_layer, work[name], w, a) for w, a in product(*losses.values())}
            options.append(
                [Option(w, a, spent, losses["weight"][w] + losses["activation"][a]) for (w, a), spent in costs.items()]
            )
        return options

    groups = [[layers.index(name) for name in group if name in free] for group in merged(together)]
    groups = [] if unit == "bytes" else [group for group in groups if len(group) > 1]
    options = options_with(lambda name, kind, bits: _zero_if_found(found, name, kind, bits))  # costs alone
    most = read_budget(budget, sum(before), options)
    if solve(options, most, groups) is None:  # before anything is measured, which takes long
        least = sum(min(option.cost for option in layer) for layer in options)
        raise ValueError(
            f"allocate_bits: no choice keeps to budget={budget!r} ({most:,} {unit}); expected at least {least:,}. "
            "Allow fewer bits in `candidates` or `minimum_bits`, or name fewer layers in `fixed`."
        )
    if found is None:
        found = sensitivity(model, data.batches, candidates=candidates, loss=loss, passes=passes, progress=progress)
    measured = found
    options = options_with(lambda name, kind, bits: _rise(measured, name, kind, bits, by))
    chosen = solve(options, most, groups)
    assert chosen is not None
    partners = {k: [layers[j] for j in group if j != k] for group in groups for k in group}
    result = []
    for k, (name, option) in enumerate(zip(layers, chosen, strict=True)):
        reason = why(option, options[k], most, partners.get(k, [])) if name in free else "fixed"
        result.append(
            LayerBits(
                name=name,
                weight_bits=option.weight_bits,
                activation_bits=option.activation_bits,
                chosen=_up_for_choice(operands[name], unit) if name in free else (),
                cost=option.cost,
                objective=option.loss,
                why=reason,
            )
        )
    return Allocation(
        unit=unit,
        budget=most,
        cost=sum(option.cost for option in chosen),
        cost_before=sum(before),
        by=by,
        objective=sum(option.loss for option in chosen),
        layers=tuple(result),
        curve=loss_curve(options, groups),
    )


def _check_alike(groups: Sequence[Sequence[str]], model: nn.Module) -> None:
    quantized = [operand.name for operand in quantized_operands(model) if operand.operand == "activation"]
    for name in dict.fromkeys(name for group in groups for name in group):
        if name not in quantized:
            raise ValueError(
                f"allocate_bits: alike names {name!r}, which is no layer of {type(model).__name__} with quantized "
                f"activations; expected some of {quantized[:5]}{' and so on' if len(quantized) > 5 else ''}."
            )


def _zero_if_found(found: Sensitivity | None, name: str, kind: Any, bits: int) -> float:
    """Stand for a rise where costs alone are asked for; raise `ValueError` if a given sensitivity lacks the entry."""
    try:
        if found is not None:
            found.entry(name, kind, bits)
    except KeyError:
        raise ValueError(
            f"allocate_bits: `found` has no entry for {bits} bits of the {kind} of {name}; expected one for all "
            "`candidates` of every layer with a choice. Measure with the same candidates, or leave `found` out."
        ) from None
    return 0.0


def _up_for_choice(of_layer: Collection[str], unit: Unit) -> tuple[str, ...]:
    return tuple(f"{kind}_bits" for kind in of_layer if kind == "weight" or unit != "bytes")


def _rise(found: Sensitivity, name: str, kind: Any, bits: int, by: str) -> float:
    entry = found.entry(name, kind, bits)
    if by == "noise":
        rise = 10 ** (-entry.snr / 10) * (LEFT_BY_TRAINING if kind == "weight" else 1.0)
    else:
        rise = entry.loss_rise if by == "measured" else entry.estimate
    if by == "estimated" and rise != rise:
        raise ValueError(f"allocate_bits: {name} has no estimate for its {kind}, which is frozen; use by='measured'.")
    if not math.isfinite(rise):
        raise ValueError(
            f"allocate_bits: {bits} bits for the {kind} of {name} were measured to do {rise} by {by!r}; expected "
            "finite numbers, which can be added up. The logits overflow with these bits, or are all zero without: "
            "leave them out of `candidates`, raise `minimum_bits`, or choose by another of 'noise', 'measured'."
        )
    return rise


def _one_example(batch: Any) -> Any:
    """Cut the inputs of one example out of a batch."""
    if isinstance(batch, Mapping):
        return {key: value[:1] if isinstance(value, Tensor) else value for key, value in batch.items()}
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(first, Tensor):
        return first[:1]
    raise ValueError(
        f"allocate_bits: cannot cut one example out of a {type(batch).__name__}; expected a dict or a pair of "
        "tensors. Pass one as `inputs=`, to count bit operations."
    )

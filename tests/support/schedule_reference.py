"""Every schedule as a plain-PyTorch training loop that shares no code with the package.

One primitive, `gradients_at`, gives the gradients of one micro-batch at a perturbed point; each schedule is then a few
lines over simulated processes and micro-batches.
"""

from __future__ import annotations

import math

import torch
from reference import biases_and_norms, gradients, layers_of
from torch import nn

ALPHA = 0.7


def statistics_of(model):
    return [b for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for b in m.buffers()]


def gradients_at(model, loss, case, eps=None, frozen=False):
    """`(of all parameters, of what is perturbed)` of `loss(model)`, at the point displaced by `eps`."""
    layers, in_place, parameters = layers_of(model), biases_and_norms(model), list(model.parameters())
    moved = in_place + [layer.weight for layer in layers]
    saved = [t.detach().clone() for t in moved + statistics_of(model)]
    eps = eps or [torch.zeros_like(t) for t in [layer.weight for layer in layers] + in_place]
    with torch.no_grad():
        for layer, e in zip(layers, eps[: len(layers)], strict=True):
            if case == 2:
                layer.weight += e
            else:
                layer.mode, layer.eps = "eps", e.clone().requires_grad_()
        for p, e in zip(in_place, eps[len(layers) :], strict=True):
            p += e
    leaves = [layer.weight if case == 2 else layer.eps for layer in layers]
    found = gradients(model, loss(model), parameters + leaves)
    found = [torch.zeros_like(t) if g is None else g for t, g in zip(parameters + leaves, found, strict=True)]
    with torch.no_grad():
        for t, value in zip(moved + (statistics_of(model) if frozen else []), saved, strict=False):
            t.copy_(value)
    for layer in layers:
        layer.mode, layer.eps = "clean", None
    by_parameter = dict(zip(parameters, found, strict=False))
    of_weights = found[len(parameters) :] if case == 3 else [by_parameter[layer.weight] for layer in layers]
    return found[: len(parameters)], of_weights + [by_parameter[p] for p in in_place]


def length(tensors):
    return math.sqrt(sum(float((t**2).sum()) for t in tensors))


def add(total, grads, factor=1.0):
    grads = [g * factor for g in grads]
    return grads if total is None else [t + g for t, g in zip(total, grads, strict=True)]


def train_with_schedule(
    model, loss_of, steps, optimizer, rho, case=3, sync="local", interval=1, start=0.0, ascent_fraction=1.0,
    reuse=None, trigger=False, still=(),
):  # fmt: skip
    """Train; `steps` holds, for each, the micro-batches of every process. Returns the gradients' kind of each step.

    Parameters whose names begin with one of `still` are not perturbed."""
    memory = {"eps": None, "look": None, "mean": None, "variance": 0.0}
    first = math.ceil(start * len(steps))
    parameters = list(model.parameters())
    perturbed = [layer.weight for layer in layers_of(model)] + biases_and_norms(model)
    index_of = [next(i for i, q in enumerate(parameters) if q is p) for p in perturbed]
    names = {id(p): name for name, p in model.named_parameters()}
    moves = [not names[id(p)].startswith(tuple(still)) if still else True for p in perturbed]
    did = []

    def climb(of_ranks):
        """One eps for each process, from the gradients of each."""
        if sync == "global":
            mean = None
            for grads in of_ranks:
                mean = add(mean, grads, 1 / len(of_ranks))
            of_ranks = [mean] * len(of_ranks)
        of_ranks = [[g * does for g, does in zip(grads, moves, strict=True)] for grads in of_ranks]
        return [[rho * g / length(grads) for g in grads] for grads in of_ranks]

    def whole_pass(ranks, eps_of_ranks, frozen=False, part=1.0):
        """`(mean gradient over processes, what each climbs with)` of one pass over all micro-batches."""
        total, climbing = None, []
        for r, batches in enumerate(ranks):
            before, own = [b.clone() for b in statistics_of(model)], None
            for x, y in batches:
                first, micro_batches = math.ceil(part * len(y)), len(batches)

                def loss(m, batch=(x[:first], y[:first]), share=1 / micro_batches):
                    return loss_of(m, batch) * share

                grads, of_perturbed = gradients_at(model, loss, case, eps_of_ranks and eps_of_ranks[r], frozen)
                total, own = add(total, grads, 1 / len(ranks)), add(own, of_perturbed)
            climbing.append(own)
            if r > 0:  # DDP broadcasts buffers from rank 0, so what the others saw is lost
                for b, value in zip(statistics_of(model), before, strict=True):
                    b.copy_(value)
        return total, climbing

    def two_passes(ranks):
        """`(clean, perturbed)` gradient, and the eps of each process.

        Running statistics are updated by the first pass, or by the second if the first sees only a part."""
        partial = ascent_fraction < 1
        if sync == "local" and reuse != "stale":  # each micro-batch for itself
            clean = total = None
            for batches in zip(*ranks, strict=True):
                alone = [[batch] for batch in batches]
                one, climbing = whole_pass(alone, None, frozen=partial, part=ascent_fraction)
                eps = climb(climbing)
                share = 1 / len(ranks[0])
                clean = add(clean, one, share)
                total = add(total, whole_pass(alone, eps, frozen=not partial)[0], share)
            return clean, total, eps
        clean, climbing = whole_pass(ranks, None, frozen=partial, part=ascent_fraction)
        eps = climb(climbing)
        return clean, whole_pass(ranks, eps, frozen=not partial)[0], eps

    model.train()
    for t, ranks in enumerate(steps):
        renew = (t - first) % interval == 0
        if t < first:
            kind, grads = "plain", whole_pass(ranks, None)[0]
        elif trigger:
            kind, (grads, climbing) = "plain", whole_pass(ranks, None)
            square = length(grads) ** 2
            memory["mean"] = square if memory["mean"] is None else 0.9 * memory["mean"] + 0.1 * square
            memory["variance"] = 0.9 * memory["variance"] + 0.1 * (square - memory["mean"]) ** 2
            c = 1 - 2 * t / len(steps)
            if square >= memory["mean"] + c * math.sqrt(memory["variance"]):
                kind, grads = "fired", whole_pass(ranks, climb(climbing), frozen=True)[0]
        elif reuse == "previous":
            kind, (grads, climbing) = "reused", whole_pass(ranks, memory["eps"])
            memory["eps"] = climb(climbing)
        elif reuse == "echo":
            kind = "recorded" if renew else "reused"
            memory["batches"] = ranks if renew else memory["batches"]
            grads, climbing = whole_pass(memory["batches"], None if renew else memory["eps"], frozen=not renew)
            memory["eps"] = climb(climbing)
        elif renew:
            kind, (clean, grads, memory["eps"]) = "two passes", two_passes(ranks)
            if reuse == "look":
                g, g_s = [clean[i] for i in index_of], [grads[i] for i in index_of]
                cosine = sum(float((a * b).sum()) for a, b in zip(g, g_s, strict=True)) / length(g) / length(g_s)
                memory["look"] = [b - length(g_s) * cosine / length(g) * a for a, b in zip(g, g_s, strict=True)]
        elif reuse == "stale":
            kind, grads = "reused", whole_pass(ranks, memory["eps"])[0]
        else:
            kind, grads = "plain", whole_pass(ranks, None)[0]
            if reuse == "look":
                kind, g_v = "reused", memory["look"]
                ratio = ALPHA * length([grads[i] for i in index_of]) / length(g_v)
                for i, v in zip(index_of, g_v, strict=True):
                    grads[i] = grads[i] + ratio * v
        did.append(kind)
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g
        optimizer.step()
    return did

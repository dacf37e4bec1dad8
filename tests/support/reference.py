"""A plain-PyTorch Sharpness-Aware Quantization step that shares no code with the package.

Every quantized layer becomes a `ReferenceLayer` that spells out `w_q`, its leaf and `eps`; a training step is a loop
over simulated processes and micro-batches with `torch.autograd.grad`. Slow, obvious, and what the package must equal.
"""

from __future__ import annotations

import copy
import itertools
import math

import torch
from torch import nn

from hf_saq.layers import QuantizedLayer


def lsq(x, s, qmin, qmax, g):
    """LSQ retyped with detach: value `s * clip(round(x/s))`, gradient of `s` times `g`."""
    s = (s * g) + (s - s * g).detach()
    v = torch.clamp(x / s, qmin, qmax)
    return (v + (torch.round(v) - v).detach()) * s


class ReferenceLayer(nn.Module):
    """A quantized linear or convolution layer in three modes: clean, leaf (first pass), eps (second pass)."""

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        wq, aq = layer.weight_quantizer, layer.activation_quantizer
        self.w_scale = nn.Parameter(wq.scale.detach().clone())
        self.w_range = (-(2 ** (wq.bits - 1)), 2 ** (wq.bits - 1) - 1)
        self.a_scale = None if aq is None else nn.Parameter(aq.scale.detach().clone())
        if aq is not None:
            signed = aq.signed
            self.a_range = (-(2 ** (aq.bits - 1)), 2 ** (aq.bits - 1) - 1) if signed else (0, 2**aq.bits - 1)
        self.conv = None
        if isinstance(layer, nn.Conv2d):
            assert layer.padding_mode == "zeros"
            # MobileNetV2 reads these to pad as TensorFlow does.
            self.stride, self.kernel_size, self.dilation = layer.stride, layer.kernel_size, layer.dilation
            self.conv = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups)
        self.mode, self.leaf, self.eps = "clean", None, None

    def q(self):
        n = self.weight.numel() / self.w_scale.numel()
        return lsq(self.weight, self.w_scale, *self.w_range, 1 / math.sqrt(n * self.w_range[1]))

    def forward(self, x):
        if self.a_scale is not None:
            n = x.numel() / x.shape[0]
            x = lsq(x, self.a_scale, *self.a_range, 1 / math.sqrt(n * self.a_range[1]))
        w_q = self.q()
        if self.mode == "leaf":
            w_q = w_q.detach().requires_grad_()
            self.leaf = w_q
        elif self.mode == "eps":
            w_q = w_q + self.eps
        if self.conv is None:
            return nn.functional.linear(x, w_q, self.bias)
        return nn.functional.conv2d(x, w_q, self.bias, **self.conv)


def to_reference(model: nn.Module) -> nn.Module:
    """An independent copy of a quantized model, made of `ReferenceLayer`s."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ReferenceLayer(module))
    return model


def package_name(reference_name: str) -> str:
    """The package's name of a reference parameter."""
    return reference_name.replace(".w_scale", ".weight_quantizer.scale").replace(
        ".a_scale", ".activation_quantizer.scale"
    )


def layers_of(model: nn.Module) -> list[ReferenceLayer]:
    return [m for m in model.modules() if isinstance(m, ReferenceLayer)]


def biases_and_norms(model: nn.Module) -> list[nn.Parameter]:
    norms = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)
    found = []
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, norms) or name == "bias":
                found.append(p)
    return found


def gradients(model, loss, tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def reference_gradients(
    model, loss_of, ranks, case, rho, sync, adaptive=False, eta=0.01, sharded=False, weights_only=False
):
    """Gradients that the optimizer gets, averaged over processes, in the order of `model.parameters()`.

    Args:
        loss_of: `(model, batch) -> loss`.
        ranks: One list of micro-batches for each simulated process.
        sharded: What "local" means under FSDP2: in-place tensors are perturbed by the average gradient.
        weights_only: Perturb no biases and norms.
    """
    parameters = list(model.parameters())
    layers, in_place = layers_of(model), [] if weights_only else biases_and_norms(model)
    accumulation = len(ranks[0])
    statistics = [b for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for b in m.buffers()]

    def first_pass(batch):
        if case == 3:
            for layer in layers:
                layer.mode = "leaf"
        loss = loss_of(model, batch) / accumulation
        wanted = [layer.leaf if case == 3 else layer.weight for layer in layers] + in_place
        grads = gradients(model, loss, wanted)
        for layer in layers:
            layer.mode, layer.leaf = "clean", None
        return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]

    def stretches(grads):
        scales = []
        for k, _ in enumerate(grads):
            if not adaptive:
                scales.append(1.0)
            elif k < len(layers):
                at = layers[k].weight if case == 2 else layers[k].q()
                scales.append(at.detach().abs() + eta)
            else:
                p = in_place[k - len(layers)]
                is_bias = any(q is p and n.endswith("bias") for n, q in model.named_parameters())
                scales.append(1.0 if is_bias else p.detach().abs() + eta)
        return scales

    def norm_of(grads):
        pairs = zip(stretches(grads), grads, strict=True)
        return math.sqrt(sum(float(((t * g) ** 2).sum(dtype=torch.float64)) for t, g in pairs))

    def perturbation(grads):
        scales, norm = stretches(grads), norm_of(grads)
        if norm == 0 or not math.isfinite(norm):
            return [torch.zeros_like(g) for g in grads]
        return [rho * t * t * g / norm for t, g in zip(scales, grads, strict=True)]

    def sharded_perturbations(grads_of_ranks):
        """One list of eps for each process; those of biases and norms are the same everywhere."""
        weights = len(layers)
        columns = list(zip(*grads_of_ranks, strict=True))[weights:]
        mean = [torch.stack(column).mean(dim=0) for column in columns]
        mixed = [[*grads[:weights], *mean] for grads in grads_of_ranks]
        norms = [norm_of(grads) for grads in mixed]
        shared = math.sqrt(sum(norm**2 for norm in norms) / len(norms))
        found = []
        for grads, norm in zip(mixed, norms, strict=True):
            divisors = [norm] * weights + [shared] * len(mean)
            found.append([rho * t * t * g / d for t, g, d in zip(stretches(grads), grads, divisors, strict=True)])
        return found

    def second_pass(batch, eps, frozen):
        saved = [p.detach().clone() for p in in_place + [layer.weight for layer in layers]]
        with torch.no_grad():
            for k, layer in enumerate(layers):
                if case == 2:
                    layer.weight += eps[k]
                else:
                    layer.mode, layer.eps = "eps", eps[k]
            for p, e in zip(in_place, eps[len(layers) :], strict=True):
                p += e
        grads = gradients(model, loss_of(model, batch) / accumulation, parameters)
        with torch.no_grad():
            for p, value in zip(in_place + [layer.weight for layer in layers], saved, strict=True):
                p.copy_(value)
            for b, value in zip(statistics, frozen, strict=True):
                b.copy_(value)
        for layer in layers:
            layer.mode, layer.eps = "clean", None
        return grads

    total = [torch.zeros_like(p) for p in parameters]

    def add(grads):
        for t, g in zip(total, grads, strict=True):
            if g is not None:
                t += g / len(ranks)

    def keep_statistics_of_rank_zero(rank, before):
        """DDP broadcasts buffers from rank 0, so what the others saw is lost."""
        if rank > 0:
            for b, value in zip(statistics, before, strict=True):
                b.copy_(value)

    model.train()
    if sharded and sync == "local" and case is not None:
        for batches in zip(*ranks, strict=True):
            all_eps = sharded_perturbations([first_pass(batch) for batch in batches])
            for batch, eps in zip(batches, all_eps, strict=True):
                add(second_pass(batch, eps, [b.clone() for b in statistics]))
        return total
    mean, states = None, []
    for rank, batches in enumerate(ranks):
        before = [b.clone() for b in statistics]
        for batch in batches:
            if case is None:
                add(gradients(model, loss_of(model, batch) / accumulation, parameters))
                continue
            state = torch.get_rng_state()
            grads = first_pass(batch)
            if sync == "local":
                frozen = [b.clone() for b in statistics]
                torch.set_rng_state(state)
                add(second_pass(batch, perturbation(grads), frozen))
            else:
                states.append(state)
                grads = [g / len(ranks) for g in grads]
                mean = grads if mean is None else [a + b for a, b in zip(mean, grads, strict=True)]
        keep_statistics_of_rank_zero(rank, before)
    if mean is not None:
        frozen, eps = [b.clone() for b in statistics], perturbation(mean)
        for batch in itertools.chain(*ranks):
            torch.set_rng_state(states.pop(0))
            add(second_pass(batch, eps, frozen))
    return total


def train_reference(model, loss_of, steps, optimizer, max_grad_norm=0.0, **how):
    """Run optimizer steps; `steps` holds, for each, the micro-batches of every simulated process."""
    for ranks in steps:
        grads = reference_gradients(model, loss_of, ranks, **how)
        if max_grad_norm:
            norm = math.sqrt(sum(float((g**2).sum(dtype=torch.float64)) for g in grads))
            factor = min(1.0, max_grad_norm / (norm + 1e-6))
            grads = [g * factor for g in grads]
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        optimizer.step()


def largest_difference(model: nn.Module | dict[str, torch.Tensor], reference: nn.Module) -> float:
    """Over all parameters and floating point buffers of the reference; `model` may be a state."""
    state = model.state_dict() if isinstance(model, nn.Module) else model
    worst = 0.0
    for name, value in reference.state_dict().items():
        if value.is_floating_point():
            worst = max(worst, float((state[package_name(name)] - value).abs().max()))
    return worst

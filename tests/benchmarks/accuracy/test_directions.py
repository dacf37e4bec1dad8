"""Where a cheap perturbation points: the table of docs/directions.md."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import images
from torch.nn.functional import cross_entropy
from training import quantized_model

from benchmarks.accuracy.directions.measure import directions_of
from hf_saq import SharpnessAwareMinimizer
from hf_saq.sharpness import Displacement


def test_the_whole_batch_in_the_last_layers_is_a_projection():
    """Its cosine is the share of the last layers in the length of the whole `eps`; made as long as that, they are the
    `eps` of the last layers."""
    model = quantized_model("resnet").train()
    batch = {"pixels": images(8).double(), "labels": torch.arange(8) % 3}
    found = {way: (values, share) for way, values, share in directions_of(model, batch, 0.01)}
    assert found["whole batch, all layers"] == ((1.0, 1.0), 1.0)
    minimizer = SharpnessAwareMinimizer(model, 0.01)

    def loss():
        return cross_entropy(model(batch["pixels"]).logits, batch["labels"])

    late = minimizer.perturb_last_layers(0.5, loss)
    minimizer.perturb_all()
    with minimizer.ascent():
        loss().backward()
    whole = minimizer.climb()
    moved = {
        name: f"{before}.weight" if (before := name.rpartition(".weight_quantizer")[0]) else name
        for name in whole.named(model)
    }
    parts = {name: eps for name, eps in whole.named(model).items() if moved[name] in late.parameters}
    length = math.sqrt(sum(eps.square().sum().item() for eps in parts.values()))
    longer = Displacement.from_named({name: eps * 0.01 / length for name, eps in parts.items()}, model)
    losses = [loss().item()]
    for eps in (whole, longer):
        with minimizer.displaced(eps):
            losses.append(loss().item())
    (cosine, rise), share = found["last layers, depth 0.5"]
    assert cosine == pytest.approx(length / 0.01, rel=1e-9) and share == late.share and 0 < share < 0.5
    assert rise == pytest.approx((losses[2] - losses[0]) / (losses[1] - losses[0]), rel=1e-6)
    assert -1 < found["1/4 of the batch"][0][0] < 1


def test_the_images_with_the_largest_losses():
    """Where all others have losses near zero, theirs are the whole gradient. Batch norms must not mix the images."""
    model = quantized_model("resnet").eval()
    pixels = images(8).double()
    with torch.no_grad():
        labels = model(pixels).logits.argmax(-1)
        labels[5:7] = (labels[5:7] + 1) % 3  # two are wrong
        head = model.classifier[1]
        for value in (head.weight, head.bias, head.weight_quantizer.scale):
            value.mul_(300)
    found = {way: values for way, values, _ in directions_of(model, {"pixels": pixels, "labels": labels}, 1e-4)}
    cosine, _ = found["the 1/4 with the largest losses"]
    assert cosine > 0.9 > found["1/4 of the batch"][0]

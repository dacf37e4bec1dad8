"""Means over all examples, also where a batch is no pair of tensors: each batch counts for its examples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_saq.analysis import compare, landscape
from hf_saq.analysis.batch_losses import LabelledBatches


def batch_of(kind: str, count: int) -> object:
    x, y = torch.ones(count, 2), torch.zeros(count, 1)
    return {
        "paths first": ([f"{k}.png" for k in range(count)], x, y),
        "numbers first": {"image_id": list(range(count)), "pixel_values": x, "labels": y},
        "targets": (list(x), [{"boxes": y[k]} for k in range(count)]),
        "several inputs": ((x, x), y),
        "nested": {"first": {"x": x}, "second": {"x": x}},
    }[kind]


@pytest.mark.parametrize("kind", ["paths first", "numbers first", "targets", "several inputs", "nested"])
def test_batches_count_for_their_examples(kind: str):
    """A list of names before the images made each batch count as one example."""
    data = LabelledBatches("test", [batch_of(kind, 6), batch_of(kind, 2)])
    assert data.sizes == [6, 2] and data.mean([1.0, 5.0]) == pytest.approx(2.0)


def test_the_loss_of_an_analysis_is_the_mean_over_all_images():
    net = nn.Sequential(nn.Linear(2, 1))
    x = torch.randn(8, 2)
    batches = [([f"{k}.png" for k in range(len(part))], part) for part in x.split(6)]
    found = landscape(net, batches, points=3, loss=lambda model, batch: model(batch[1]).square().mean())
    assert found.surfaces[0].losses[1] == pytest.approx(net(x).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("sizes", [(0,), (4, 0)])
def test_a_batch_without_examples_is_named(sizes):
    """Its mean loss is NaN, and so was the one over all examples."""
    net = nn.Sequential(nn.Linear(2, 3))
    batches = [(torch.randn(n, 2), torch.zeros(n, dtype=torch.long)) for n in sizes]
    with pytest.raises(ValueError, match=rf"^compare: batch {len(sizes) - 1} has no examples"):
        compare(net, net, batches)

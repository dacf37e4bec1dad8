"""Every analysis leaves the model as it was, also one that breaks off, and with a loss that draws random numbers."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch
from labelled_models import labelled_vectors, nothing_changes, quantized_linear_net
from torch import nn

from hf_saq.analysis import allocate_bits, compare, landscape, sensitivity, sharpness

ANALYSES = {
    "sharpness": lambda net, batches, loss: sharpness(net, batches, 0.1, loss=loss),
    "landscape": lambda net, batches, loss: landscape(net, batches, places=("latent", "quantized"), loss=loss),
    "sensitivity": lambda net, batches, loss: sensitivity(net, batches, loss=loss),
    "allocate_bits": lambda net, batches, loss: allocate_bits(net, batches, "0.9x", loss=loss),
    "compare": lambda net, batches, loss: compare(net, quantized_linear_net(2), batches, loss=loss),
}


class Broken(Exception):
    pass


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("calls", [0, 3, 7, 12], ids=lambda n: f"after {n} calls")
def test_an_analysis_that_breaks_off(analysis: str, calls: int):
    left = calls

    def loss(model: nn.Module, batch) -> torch.Tensor:
        nonlocal left
        left -= 1
        value = nn.functional.cross_entropy(model(batch[0]), batch[1])
        if left < 0:
            raise Broken
        return value

    batches = labelled_vectors(batches=8)
    with nothing_changes(net := quantized_linear_net()), pytest.raises(Broken):
        ANALYSES[analysis](net, batches, loss)


@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_loss_that_changes_its_batch_in_place(analysis: str):
    """Images that are normalized in their own memory: every evaluation sees the same ones."""

    def loss(model: nn.Module, batch, in_place: bool = True) -> torch.Tensor:
        x = batch[0].sub_(0.5).mul_(1.5) if in_place else (batch[0] - 0.5) * 1.5
        return nn.functional.cross_entropy(model(x), batch[1])

    found = ANALYSES[analysis](quantized_linear_net(), labelled_vectors(), loss)
    expected = ANALYSES[analysis](quantized_linear_net(), labelled_vectors(), partial(loss, in_place=False))
    drop_times = {"seconds": 0}
    assert {**found.to_dict(), **drop_times} == {**expected.to_dict(), **drop_times}


@pytest.mark.parametrize("analysis", ANALYSES)
def test_a_loss_that_draws_random_numbers(analysis: str):
    def loss(model: nn.Module, batch) -> torch.Tensor:
        noise = torch.rand(()) + random.random() + np.random.rand()
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) * (1 + 0.01 * noise)

    with nothing_changes(net := quantized_linear_net()):
        ANALYSES[analysis](net, labelled_vectors(), loss)

"""What a schedule asks of the `backward` that a user writes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from minimizer_nets import batch, linear_net, loss_of, quantized

from hf_saq import SharpnessAwareMinimizer
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep


@pytest.mark.parametrize("knobs", [dict(), dict(ascent_fraction=0.5)], ids=str)
def test_a_backward_without_a_loss_is_refused_and_a_number_is_one(knobs):
    """A user ends `backward` without a return, or with `loss.item()`."""
    net = quantized(linear_net)
    step = ScheduledStep(SharpnessAwareMinimizer(net, 0.1), PerturbationSchedule(**knobs))

    def backward(data, reduce=True, returns=lambda loss: None):
        loss = loss_of(net, data)
        loss.backward()
        return returns(loss)

    with pytest.raises(TypeError, match="`backward` returned None; expected the loss"):
        step.micro_batch(0, [batch(net)], backward, 0, 1)
    number = step.micro_batch(0, [batch(net)], partial(backward, returns=torch.Tensor.item), 0, 1).loss
    tensor = step.micro_batch(0, [batch(net)], partial(backward, returns=torch.detach), 0, 1).loss
    torch.testing.assert_close(number, tensor)

"""What a schedule asks of the `backward` that a user writes."""

from __future__ import annotations

import textwrap
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from minimizer_nets import batch, linear_net, loss_of, quantized
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

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


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_documented_loop_communicates_once_for_each_micro_batch(one_process):
    """The example of `ScheduledStep`, word for word: first passes, on a part of each batch, communicate nothing."""
    loop = textwrap.dedent(ScheduledStep.__doc__.split("```python\n")[1].split("    ```")[0])
    net = quantized(linear_net)
    passes, reductions = [], []

    def wrapped(model):
        ddp = DistributedDataParallel(model)

        def count(state, bucket):
            reductions.append(len(passes))
            return allreduce_hook(state, bucket)

        ddp.register_comm_hook(None, count)
        return ddp

    def loss_under_ddp(ddp, data):
        passes.append(len(data[0]))
        return loss_of(ddp, data)

    names = dict(DistributedDataParallel=wrapped, loss_of=loss_under_ddp, model=net, nullcontext=nullcontext)
    names |= dict(PerturbationSchedule=PerturbationSchedule, SharpnessAwareMinimizer=SharpnessAwareMinimizer)
    names |= dict(ScheduledStep=ScheduledStep, steps=[[batch(net), batch(net)]] * 3, total_steps=3)
    exec(loop, names | dict(optimizer=torch.optim.SGD(net.parameters(), lr=0.01)))
    whole = len(batch(net)[0])
    assert len(passes) == 12 and all(n < whole for n in passes[::2]) and passes[1::2] == [whole] * 6
    assert reductions == [2, 4, 6, 8, 10, 12]

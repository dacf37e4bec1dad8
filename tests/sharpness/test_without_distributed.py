"""Builds of torch without `torch.distributed` have nothing of it but `is_available`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from minimizer_nets import batch, conv_net, quantized, two_passes

from hf_saq import SharpnessAwareMinimizer, correct_biases, reestimate_batch_norm
from hf_saq.sharpness.sharding import of_first_process


def test_a_step_and_statistics_need_no_distributed(monkeypatch):
    monkeypatch.setattr(dist, "is_available", lambda: False)
    monkeypatch.delattr(dist, "is_initialized")
    net = quantized(conv_net)
    two_passes(net, SharpnessAwareMinimizer(net, rho=0.1, sync="global"), batch(net))
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    reestimate_batch_norm(net, [batch(net)[0]])
    correct_biases(net, [batch(net)[0]])
    assert of_first_process("text") == "text"

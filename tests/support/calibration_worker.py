"""Two processes: each calibrates on data of its own, plain and under FSDP2; all leave what they have."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from forked import run_in_processes
from minimizer_nets import linear_net
from own_quantizer import PowerOfTwo
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_saq import SAQQuantizationConfig, calibrate, correct_biases, quantize, reestimate_batch_norm
from hf_saq.quantizers import QUANTIZERS


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def own_data(rank: int) -> torch.Tensor:
    own = torch.randn(32, 12, generator=torch.Generator().manual_seed(rank)) * (1 + 4 * rank)
    return own.abs() if rank else own  # the sign of the first layer differs


def main(output: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = own_data(rank)
    results = {}
    QUANTIZERS["power_of_two"] = PowerOfTwo
    for quantizer in ("lsq", "lsq_plus", "pact", "power_of_two"):
        for sharded in (False, True):
            net = quantize(linear_net().eval(), SAQQuantizationConfig(quantizer=quantizer))
            net = fully_shard(net) if sharded else net
            calibrate(net, [own])
            logits = net(torch.randn(4, 12, generator=torch.Generator().manual_seed(5))).detach()
            if sharded:
                net.reshard()
            state = {name: whole(t).detach().clone() for name, t in net.state_dict().items()}
            results[quantizer, sharded] = {"state": state, "logits": logits}
    norm = reestimate_batch_norm(nn.Sequential(nn.BatchNorm1d(12)), own.split(8))[0]
    results["batch_norm"] = {name: value.clone() for name, value in norm.state_dict().items()}
    net = quantize(linear_net().eval(), SAQQuantizationConfig(weight_bits=3))
    correct_biases(calibrate(net, [own]), own.split(16))
    results["biases"] = {name: value.clone() for name, value in net.state_dict().items()}
    torch.save(results, output / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_in_processes(2, main, Path(sys.argv[1]))

"""Two processes on the gloo backend against the plain-PyTorch reference, which simulates both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import largest_difference
from training import FAMILIES, HOW, reference_result

TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("distributed")
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tests / "distributed_worker.py"), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(output / "results.pt", weights_only=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("case", "sync"), HOW)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_the_reference(family, case, accumulation, sync, results):
    result = results[family, case, accumulation, sync]
    expected = reference_result(family, case, accumulation, sync, processes=2)
    state = result["state"]

    class Trained:  # `largest_difference` reads nothing but the state
        @staticmethod
        def state_dict():
            return state

    assert largest_difference(Trained, expected) < TOLERANCE
    assert result["replicas"][0] == result["replicas"][1]


def test_local_and_global_differ(results):
    """Otherwise the two modes, and the two simulations of them, would be one."""
    a, b = (results["vit", 3, 1, sync]["state"]["classifier.weight"] for sync in ("local", "global"))
    assert (a - b).abs().max() > 1e4 * TOLERANCE


def test_the_global_norm_is_that_of_all_processes(results):
    norms = {sync: results["vit", 3, 1, sync]["logs"][0]["ascent_norm"] for sync in ("local", "global")}
    assert norms["global"] < norms["local"]  # a mean of two different gradients is shorter than they are on average

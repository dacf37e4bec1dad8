"""FSDP2 with two processes on the gloo backend against the plain-PyTorch reference, which simulates both.

Schedules, sharded checkpoints and further cases are in test_fsdp_more.py.
"""

from __future__ import annotations

import pytest
import torch
from fsdp_runs import LEARNING_RATE, MICRO_BATCHES, PROCESSES, RHO, RUNS, STEPS, batch, loss_of, net
from fsdp_trainer_runs import NOT_SHARDED
from fsdp_trainer_runs import RUNS as TRAINER_RUNS
from processes import SUPPORT, run_python
from reference import largest_difference, to_reference, train_reference
from training import reference_result

TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("fsdp")
    run_python(SUPPORT / "fsdp_worker.py", output, "runs", "FULL_STATE_DICT", "refused", "minimizer")
    return torch.load(output / "results.pt", weights_only=True)


@pytest.fixture
def results(trained) -> dict:
    return trained["minimizer"]


def expected(case, sync, adaptive=False, perturb=("weight", "bias", "norm"), sharded=True) -> torch.nn.Module:
    model = to_reference(net())
    steps = [
        [[batch(step, rank, micro) for micro in range(MICRO_BATCHES)] for rank in range(PROCESSES)]
        for step in range(STEPS)
    ]
    how = dict(case=case, sync=sync, adaptive=adaptive, sharded=sharded, weights_only="bias" not in perturb)
    train_reference(model, loss_of, steps, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), rho=RHO, **how)
    return model


@pytest.mark.parametrize("name", RUNS)
def test_training_equals_the_reference(name, results):
    assert largest_difference(results[name]["state"], expected(**RUNS[name])) < TOLERANCE
    assert results[name]["skipped"] == 0


def test_global_equals_ddp(results):
    assert largest_difference(results["case 3 global"]["state"], expected(3, "global", sharded=False)) < TOLERANCE


def test_local_equals_ddp_where_nothing_is_perturbed_in_place(results):
    run = "case 3 local, weights only"
    assert largest_difference(results[run]["state"], expected(**RUNS[run], sharded=False)) < TOLERANCE


def test_local_differs_from_ddp_and_from_global(results):
    """Otherwise the comparisons above could not tell them apart."""
    for other in (expected(3, "local", sharded=False), expected(3, "global")):
        assert largest_difference(results["case 3 local"]["state"], other) > 1e3 * TOLERANCE


def test_shards_are_restored_after_an_exception(results):
    assert results["restored"]
    assert results["function restored"]


@pytest.mark.parametrize("case", [1, 2])
def test_local_needs_gradients_at_quantized_weights(case, results):
    message = results[f"case {case} local"]
    assert message.startswith("ValueError") and f"case={case}" in message and 'Pass sync="global"' in message


def test_gradients_left_by_no_sync_are_refused(results):
    assert "left a gradient that is not reduced" in results["unreduced"]


def test_a_plain_first_pass_is_refused(results):
    assert "minimizer.ascent()" in results["plain first pass"]


# SAQTrainer through Accelerate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "sync"), TRAINER_RUNS)
def test_trainer_equals_the_reference(case, sync, trained):
    result = trained["runs"][case, sync]
    reference = reference_result("vit", case, 2, sync, processes=2, sharded=True)
    assert result["sharded"]
    assert largest_difference(result["state"], reference) < TOLERANCE
    assert result["skipped"] == 0


def test_trainer_saves_a_packed_model(trained):
    packed = trained["runs"]["packed"]
    assert (packed["trained"] - packed["reloaded"]).abs().max() < 1e-5


def test_trainer_resumes_exactly(trained):
    whole, resumed = trained["FULL_STATE_DICT"]["whole"], trained["FULL_STATE_DICT"]["resumed"]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("kind", NOT_SHARDED)
def test_schedules_that_read_gradients_of_one_process_are_refused(kind, trained):
    assert f"SAQConfig({kind}) under FSDP2" in trained["refused"][kind]


def test_checkpoints_hold_the_whole_model_in_float(trained):
    whole, checkpoint = trained["FULL_STATE_DICT"]["whole"], trained["FULL_STATE_DICT"]["checkpoint"]
    assert whole.keys() == checkpoint.keys()
    # `from_pretrained` keeps step sizes in float32.
    assert all(torch.equal(whole[name].to(checkpoint[name].dtype), checkpoint[name]) for name in whole)


@pytest.mark.parametrize(
    ("what", "message"),
    [("case", 'Set sync="global"'), ("version", "fsdp_version: 2"), ("loading", "cpu_ram_efficient_loading: false")],
)
def test_trainer_refuses_what_cannot_work(what, message, trained):
    assert message in trained["refused"][what]

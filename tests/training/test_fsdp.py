"""FSDP2 with two processes on the gloo backend against the plain-PyTorch reference, which simulates both."""

from __future__ import annotations

import pytest
import torch
from fsdp_runs import LEARNING_RATE, MICRO_BATCHES, PROCESSES, RHO, RUNS, STEPS, batch, loss_of, net
from fsdp_trainer_runs import MATCHED, NOT_SHARDED
from fsdp_trainer_runs import RUNS as TRAINER_RUNS
from processes import SUPPORT, run_python
from reference import package_name, to_reference, train_reference
from training import make_trainer, reference_result, scheduled_reference

TOLERANCE = 1e-11


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("fsdp")
    run_python(SUPPORT / "fsdp_worker.py", output)
    return torch.load(output / "results.pt", weights_only=True)


def difference(state: dict, reference: torch.nn.Module) -> float:
    return max(float((state[package_name(n)] - t).abs().max()) for n, t in reference.state_dict().items())


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
    assert difference(results[name]["state"], expected(**RUNS[name])) < TOLERANCE
    assert results[name]["skipped"] == 0


def test_global_equals_ddp(results):
    assert difference(results["case 3 global"]["state"], expected(3, "global", sharded=False)) < TOLERANCE


def test_local_equals_ddp_where_nothing_is_perturbed_in_place(results):
    run = "case 3 local, weights only"
    assert difference(results[run]["state"], expected(**RUNS[run], sharded=False)) < TOLERANCE


def test_local_differs_from_ddp_and_from_global(results):
    """Otherwise the comparisons above could not tell them apart."""
    for other in (expected(3, "local", sharded=False), expected(3, "global")):
        assert difference(results["case 3 local"]["state"], other) > 1e3 * TOLERANCE


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


@pytest.fixture
def trained(results) -> dict:
    return results["trainer"]


@pytest.mark.parametrize(("case", "sync"), TRAINER_RUNS)
def test_trainer_equals_the_reference(case, sync, trained):
    result = trained[case, sync]
    reference = reference_result("vit", case, 2, sync, processes=2, sharded=True)
    assert result["sharded"]
    assert difference(result["state"], reference) < TOLERANCE
    assert result["skipped"] == 0


def test_trainer_saves_a_packed_model(trained):
    assert (trained["packed"]["trained"] - trained["packed"]["reloaded"]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_trainer_resumes_exactly(kind, trained):
    whole, resumed = trained[kind]["whole"], trained[kind]["resumed"]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stale_eps_equals_the_reference_and_resumes_exactly(trained):
    whole, resumed = trained["stale"]["whole"], trained["stale"]["resumed"]
    reference, _ = scheduled_reference("vit", 3, 2, "global", dict(reuse="stale", interval=2), processes=2)
    assert difference(trained["stale"]["trained"], reference) < TOLERANCE
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_last_layers_alone_equal_the_reference(trained):
    reference, _ = scheduled_reference("vit", 3, 2, "global", dict(ascent_depth=0.5), processes=2)
    assert trained["last layers"]["first"] == "vit.layers.1"
    assert difference(trained["last layers"]["trained"], reference) < TOLERANCE


def test_the_radius_is_matched_as_in_one_process(trained, tmp_path):
    """Which takes the micro-batches of both. Whole parameters left by a forward alone change nothing."""
    alone = make_trainer("vit", 3, 4, "global", tmp_path, knobs=MATCHED)
    alone.train()
    found, expected = trained["radius matched"], alone.scheduled_step.radius.state()
    assert found["steps"] == expected["steps"] == 3 and found["factor"] == pytest.approx(expected["factor"], rel=1e-9)
    assert abs(expected["factor"] - 1) > 1e-3  # something was matched
    state = alone.model.state_dict()
    assert max(float((found["trained"][name] - value).abs().max()) for name, value in state.items()) < TOLERANCE


@pytest.mark.parametrize("kind", NOT_SHARDED)
def test_schedules_that_read_gradients_of_one_process_are_refused(kind, trained):
    assert f"SAQConfig({kind}) under FSDP2" in trained["refused"][kind]


def test_checkpoints_hold_the_whole_model_in_float(trained):
    whole, checkpoint = trained["FULL_STATE_DICT"]["whole"], trained["checkpoint"]
    assert whole.keys() == checkpoint.keys()
    # `from_pretrained` keeps step sizes in float32.
    assert all(torch.equal(whole[name].to(checkpoint[name].dtype), checkpoint[name]) for name in whole)


@pytest.mark.parametrize(
    ("what", "message"),
    [("case", 'Set sync="global"'), ("version", "fsdp_version: 2"), ("loading", "cpu_ram_efficient_loading: false")],
)
def test_trainer_refuses_what_cannot_work(what, message, trained):
    assert message in trained["refused"][what]

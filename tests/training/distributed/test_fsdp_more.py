"""Further runs of SAQTrainer under FSDP2 with two processes: schedules, sharded checkpoints, cases of test_fsdp.py."""

from __future__ import annotations

import pytest
import torch
from fsdp_trainer_runs import MATCHED, MORE_RUNS
from processes import SUPPORT, run_python
from reference import largest_difference
from training import make_trainer, reference_result, scheduled_reference

pytestmark = pytest.mark.slow  # nine trainings, most of a minute of two cores
TOLERANCE = 1e-11
PARTS = ("more runs", "SHARDED_STATE_DICT", "stale", "last layers", "radius matched")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    output = tmp_path_factory.mktemp("fsdp")
    run_python(SUPPORT / "fsdp_worker.py", output, *PARTS)
    return torch.load(output / "results.pt", weights_only=True)


@pytest.mark.parametrize(("case", "sync"), MORE_RUNS)
def test_trainer_equals_the_reference(case, sync, trained):
    result = trained["more runs"][case, sync]
    reference = reference_result("vit", case, 2, sync, processes=2, sharded=True)
    assert result["sharded"]
    assert largest_difference(result["state"], reference) < TOLERANCE
    assert result["skipped"] == 0


def test_sharded_checkpoints_resume_exactly(trained):
    whole, resumed = trained["SHARDED_STATE_DICT"]["whole"], trained["SHARDED_STATE_DICT"]["resumed"]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stale_eps_equals_the_reference_and_resumes_exactly(trained):
    whole, resumed = trained["stale"]["whole"], trained["stale"]["resumed"]
    reference, _ = scheduled_reference("vit", 3, 2, "global", dict(reuse="stale", interval=2), processes=2)
    assert largest_difference(trained["stale"]["trained"], reference) < TOLERANCE
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_last_layers_alone_equal_the_reference(trained):
    reference, _ = scheduled_reference("vit", 3, 2, "global", dict(ascent_depth=0.5), processes=2)
    assert trained["last layers"]["first"] == "vit.layers.1"
    assert largest_difference(trained["last layers"]["trained"], reference) < TOLERANCE


def test_the_radius_is_matched_as_in_one_process(trained, tmp_path):
    """Which takes the micro-batches of both. Whole parameters left by a forward alone change nothing."""
    alone = make_trainer("vit", 3, 4, "global", tmp_path, knobs=MATCHED)
    alone.train()
    found, expected = trained["radius matched"], alone.scheduled_step.radius.state()
    assert found["steps"] == expected["steps"] == 3 and found["factor"] == pytest.approx(expected["factor"], rel=1e-9)
    assert abs(expected["factor"] - 1) > 1e-3  # something was matched
    state = alone.model.state_dict()
    assert max(float((found["trained"][name] - value).abs().max()) for name, value in state.items()) < TOLERANCE

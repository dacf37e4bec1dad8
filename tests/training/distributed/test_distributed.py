"""Two processes on the gloo backend against the plain-PyTorch reference, which simulates both."""

from __future__ import annotations

import pytest
import torch
from matrices import matrix
from processes import SUPPORT, run_python
from reference import largest_difference, train_reference
from tiny_models import TRANSFORMERS_MODELS
from training import FAMILIES, HOW, RHO, SCHEDULES, reference_result, reference_set_up, scheduled_reference

from hf_saq.training import distillation_loss

TOLERANCE = 1e-11
MATRIX = "test_training_equals_the_reference"
ALWAYS = [("vit", "3-local", 1), ("vit", "3-global", 1)]
"""Runs that tests below compare, whichever of the matrix are selected."""


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> dict:
    """Results of two processes, which train what the selected tests ask for."""
    output = tmp_path_factory.mktemp("distributed")
    items = [item for item in request.session.items if item.path == request.path and MATRIX in item.name]
    asked = [tuple(item.callspec.params[name] for name in ("family", "how", "accumulation")) for item in items]
    runs = {*asked, *ALWAYS}
    torch.save(sorted(runs), output / "runs.pt")
    run_python(SUPPORT / "distributed_worker.py", output)
    return torch.load(output / "results.pt", weights_only=True)


@matrix(4, accumulation=[2, 1], family=FAMILIES, how=HOW.keys())
def test_training_equals_the_reference(accumulation, family, how, results):
    case, sync = HOW[how]
    result = results[family, how, accumulation]
    expected = reference_result(family, case, accumulation, sync, processes=2)
    assert largest_difference(result["state"], expected) < TOLERANCE
    assert result["replicas"][0] == result["replicas"][1]


@pytest.mark.parametrize("k", range(len(SCHEDULES)), ids=[str(run) for run in SCHEDULES])
def test_schedules_equal_the_reference(k, results):
    family, case, accumulation, sync, knobs = SCHEDULES[k]
    result = results["schedules"][k]
    expected, _ = scheduled_reference(family, case, accumulation, sync, knobs, processes=2)
    assert largest_difference(result["state"], expected) < TOLERANCE
    assert result["replicas"][0] == result["replicas"][1]
    kept, mean = result["kept"].T
    assert mean[0] == mean[1]  # what the trigger decides by
    assert (mean[0] > 0) == ("trigger" in knobs)
    if sync == "local" and knobs.get("reuse") in ("stale", "previous", "echo"):
        assert kept[0] != kept[1]  # each process has an eps of its own
    else:
        assert kept[0] == kept[1]


def test_each_process_resumes_with_its_own_eps(results):
    assert results["resumed"]["equal"].all()
    kept = results["resumed"]["kept"].flatten()
    assert kept[0] != kept[1] and kept.min() > 0


def test_a_teacher_teaches_each_process(results):
    """By the formula of [`distillation_loss`], whose own test is in test_distillation.py."""
    teacher = TRANSFORMERS_MODELS["vit"](seed=5).double().eval()

    def loss_of(model, batch):
        with torch.no_grad():
            answers = teacher(pixel_values=batch[0]).logits
        return distillation_loss(model(pixel_values=batch[0]).logits, answers, batch[1], 0.7, 1.0)

    model, steps, optimizer = reference_set_up("vit", 2, processes=2)
    train_reference(model, loss_of, steps, optimizer, case=3, rho=RHO, sync="local")
    assert largest_difference(results["distilled"], model) < TOLERANCE


def test_local_and_global_differ(results):
    """Otherwise the two modes, and the two simulations of them, would be one."""
    a, b = (results["vit", f"3-{sync}", 1]["state"]["classifier.weight"] for sync in ("local", "global"))
    assert (a - b).abs().max() > 1e4 * TOLERANCE


def test_the_global_norm_is_that_of_all_processes(results):
    norms = {sync: results["vit", f"3-{sync}", 1]["logs"][0]["ascent_norm"] for sync in ("local", "global")}
    assert norms["global"] < norms["local"]  # a mean of two different gradients is shorter than they are on average

"""What must hold on every device, run on CPU here and on a card where there is one (`make gpu-campaign`).

The reference is always the CPU, in float64 where a value next to a rounding edge would decide.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_models import images
from torch import nn
from training import Images, InOrder, arguments, quantized_model
from transformers import TrainerCallback

from hf_saq import (
    SAQConfig,
    SAQQuantizationConfig,
    SharpnessAwareMinimizer,
    calibrate,
    pack,
    quantize,
    reestimate_batch_norm,
)
from hf_saq.quantizers import set_backend
from hf_saq.sharpness.schedules import PerturbationSchedule, ScheduledStep

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
LIKE_CPU = [pytest.param("cpu", marks=pytest.mark.slow), DEVICES[1]]
"""For comparisons with the CPU, which it passes for certain: there only the code of the test is tried."""
FAMILIES = ["vit", "resnet"]
SCHEDULES = {
    "full": dict(),
    "part": dict(ascent_fraction=0.5),
    "last layers": dict(ascent_depth=0.5),
    "previous": dict(reuse="previous"),
    "stale": dict(reuse="stale", interval=2),
    "look": dict(reuse="look", interval=2),
    "echo": dict(reuse="echo", interval=2),
    "trigger": dict(trigger=True),
}


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32, which has ten bits: products would differ from those of the CPU by more than the tolerances."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class _StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):  # noqa: ARG002
        control.should_training_stop = state.global_step == self.step


def batch_of(seed: int, device: str, dtype=torch.float64) -> dict[str, torch.Tensor]:
    pixels = images(4, seed=seed).to(device, dtype)
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 0], device=device)}


def some_steps(model: nn.Module, device: str, knobs: dict | None, case: int = 3) -> dict[str, torch.Tensor]:
    """Four steps of SGD under a schedule; the state afterwards, on CPU."""
    model = copy.deepcopy(model).to(device).train()
    step = None
    if knobs is not None:
        step = ScheduledStep(SharpnessAwareMinimizer(model, rho=0.1, case=case), PerturbationSchedule(**knobs))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def backward(batch, reduce=True):  # noqa: ARG001
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    for number in range(4):
        batch = batch_of(number, device)
        if step is None:
            backward(batch)
        else:
            step.micro_batch(0, [batch], backward, number, 4)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.cpu() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("device", LIKE_CPU)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["none", *SCHEDULES])
def test_steps_are_those_of_the_cpu(name, family, device):
    model, knobs = quantized_model(family), SCHEDULES.get(name)
    found = some_steps(model, device, knobs)
    for key, expected in some_steps(model, "cpu", knobs).items():
        torch.testing.assert_close(found[key], expected, atol=1e-9, rtol=1e-7, msg=key)


@pytest.mark.parametrize("device", LIKE_CPU)
@pytest.mark.parametrize("case", [1, 2])
def test_cases_are_those_of_the_cpu(case, device):
    model = quantized_model("vit")
    found = some_steps(model, device, {}, case)
    for key, expected in some_steps(model, "cpu", {}, case).items():
        torch.testing.assert_close(found[key], expected, atol=1e-9, rtol=1e-7, msg=key)


@pytest.mark.parametrize("device", LIKE_CPU)
@pytest.mark.parametrize("quantizer", ["lsq", "lsq_plus", "liq", "pact", "dorefa"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_quantizers_are_those_of_the_cpu(quantizer, granularity, device):
    """Outputs, and gradients of every parameter, of a small net calibrated on the device itself."""
    outcomes = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).double().to(place)
        config = SAQQuantizationConfig(weight_bits=3, activation_bits=4, quantizer=quantizer, first_last_bits=None)
        if granularity == "channel":
            if quantizer in ("liq", "dorefa"):
                pytest.skip("statistics and ranges of this quantizer are those of whole tensors")
            config.weight_granularity = granularity
        x = images(4, seed=1)[..., :8, :8].double().to(place)
        calibrate(quantize(net, config), [x])
        outputs = net(x)
        outputs.square().mean().backward()
        grads = {name: p.grad.cpu() for name, p in net.named_parameters() if p.grad is not None}
        outcomes.append((outputs.detach().cpu(), grads))
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], atol=1e-9, rtol=1e-7)
    assert outcomes[1][1].keys() == outcomes[0][1].keys()
    for name, expected in outcomes[0][1].items():
        torch.testing.assert_close(outcomes[1][1][name], expected, atol=1e-9, rtol=1e-6, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_models_answer_alike(family, device):
    """Up to float32 rounding of the products, which devices add up in their own order."""
    model = quantized_model(family, torch.float32).eval()
    batch = {"pixel_values": images(4, seed=3)}
    with torch.no_grad():
        expected = model(**batch).logits
        found = pack(model).to(device).eval()(pixel_values=batch["pixel_values"].to(device)).logits.cpu()
    # A value at a rounding edge of an activation may go the other way: one of 16 levels.
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.parametrize("device", LIKE_CPU)
def test_statistics_are_estimated_where_the_model_is(device):
    model = quantized_model("resnet").to(device)
    reestimate_batch_norm(model, [batch_of(0, device)])
    here = quantized_model("resnet")
    reestimate_batch_norm(here, [batch_of(0, "cpu")])
    for (name, found), expected in zip(model.named_buffers(), here.buffers(), strict=True):
        torch.testing.assert_close(found.cpu(), expected, atol=1e-9, rtol=1e-7, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_kernels_take_the_same_steps(precision):
    """Triton against eager operations in float32, where one edge may fall the other way: means are compared."""
    states = []
    for backend in ("eager", "compiled"):
        before = set_backend(backend)
        try:
            model = quantized_model("vit", torch.float32)
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                torch.manual_seed(0)
                states.append(_float32_steps(model))
        finally:
            set_backend(before)
    for name, expected in states[0].items():
        assert (states[1][name] - expected).abs().mean() <= 1e-3 * expected.abs().mean() + 1e-5, name


def _float32_steps(model: nn.Module) -> dict[str, torch.Tensor]:
    model = model.cuda().train()
    minimizer = SharpnessAwareMinimizer(model, rho=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for number in range(3):
        batch = batch_of(number, "cuda", torch.float32)
        for context in (minimizer.ascent, minimizer.perturbed):
            with context():
                model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.cpu() for name, value in model.state_dict().items() if value.is_floating_point()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("knobs", [None, {}, dict(reuse="echo", interval=2), dict(reuse="previous")], ids=str)
def test_a_step_waits_at_most_once(knobs):
    """By CUDA itself, which warns of every operation that makes the host wait."""
    model = quantized_model("vit", torch.float32).cuda().train()
    step = None
    if knobs is not None:
        step = ScheduledStep(SharpnessAwareMinimizer(model, rho=0.1), PerturbationSchedule(**knobs))
    batch = batch_of(0, "cuda", torch.float32)

    def backward(batch, reduce=True):  # noqa: ARG001
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    for number in range(4):
        torch.cuda.set_sync_debug_mode("warn" if number > 1 else "default")  # what happens once may wait
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                if step is None:
                    backward(batch)
                else:
                    step.micro_batch(0, [batch], backward, number, 4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in said if "synchroniz" in str(w.message)]
        assert len(waits) <= (knobs is not None), waits
        model.zero_grad()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("knobs", [dict(schedule="full"), dict(reuse="echo", interval=2)], ids=str)
def test_resume_is_exact(knobs, device, tmp_path):
    """`SAQTrainer` on the device: six steps at once, and three, a checkpoint, three."""
    states = []
    for stops in ([6], [3, 6]):
        place = tmp_path / str(len(stops))
        for steps in stops:
            trainer = InOrder(
                quantized_model("vit", torch.float32),
                arguments(place, use_cpu=device == "cpu", max_steps=6, save_strategy="steps", save_steps=3),
                saq_config=SAQConfig(rho=0.1, **knobs),
                train_dataset=Images(24, torch.float32),
            )
            if steps == 3:
                trainer.add_callback(_StopAt(3))
            trainer.train(resume_from_checkpoint=len(stops) > 1 and steps == 6)
        states.append({name: value.cpu() for name, value in trainer.model.state_dict().items()})
    for name, expected in states[0].items():
        assert torch.equal(states[1][name], expected), name

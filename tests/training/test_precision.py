"""Mixed precision, gradient checkpointing and compilation."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from resume_runs import swin
from tiny_models import images
from torch import nn
from training import Images, InOrder, arguments, quantized_model

from hf_saq import SAQConfig, SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, quantize

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def trained(family: str, output_dir, saq_config=None, **changes):
    trainer = InOrder(
        quantized_model(family, torch.float32),
        arguments(output_dir, learning_rate=1e-2, **changes),
        saq_config=saq_config or SAQConfig(rho=0.1, schedule="full"),
        train_dataset=Images(12, torch.float32),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", ["vit", "resnet"])
@pytest.mark.parametrize("case", [1, 2, 3])
def test_bf16_autocast(family, case, tmp_path):
    """Parameters stay in float32 and move; the first loss is that of the float32 run within 10 %: a value with 8 bits
    of precision often lands on another of 16 activation levels."""
    runs = [
        trained(family, tmp_path, SAQConfig(rho=0.1, schedule="full", case=case), bf16=bf16) for bf16 in (True, False)
    ]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in runs[0].model.parameters())
    losses = [[e["loss"] for e in run.state.log_history if "loss" in e] for run in runs]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.1)
    assert losses[0][0] != losses[1][0]  # otherwise nothing ran in bf16
    assert all(e["skipped_perturbations"] == 0 for e in runs[0].state.log_history if "loss" in e)
    sharpness = [[e["sharpness"] for e in run.state.log_history if "loss" in e] for run in runs]
    assert all(value > 0 for value in sharpness[0] + sharpness[1])


def test_autocast_around_both_passes_sees_the_perturbed_biases():
    """Autocast caches low-precision copies of parameters; the second pass must not read the first pass's copies."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    quantize(net, SAQQuantizationConfig(weight_bits=8, activation_bits=None))
    minimizer = SharpnessAwareMinimizer(net, rho=5.0, perturb=["bias"])
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    losses = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for context in (minimizer.ascent, minimizer.perturbed):
            with context():
                loss = nn.functional.cross_entropy(net(x), y)
                loss.backward()
                losses.append(loss.item())
    assert losses[1] > losses[0] + 1


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_fp16_with_a_gradient_scaler(family, tmp_path):
    trainer = trained(family, tmp_path, fp16=True, use_cpu=False, max_steps=12, num_train_epochs=12)
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert all(0 < e["ascent_norm"] < 1e3 for e in logs[-3:])  # the loss scale is divided out of what is logged


def test_a_loss_scale_cancels_in_eps():
    """What a GradScaler does to the first pass: gradients 65,536 times larger, the same eps."""
    grads = []
    for scale in (1.0, 65536.0):
        net = quantized_model("convnext")
        minimizer = SharpnessAwareMinimizer(net, rho=0.1)
        data = Images(4)
        for context in (minimizer.ascent, minimizer.perturbed):
            with context():
                loss = net(pixel_values=data.pixel_values, labels=data.labels).loss
                (loss * scale).backward()
        grads.append([p.grad / scale for p in net.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("case", [2, 3])
def test_gradient_checkpointing_changes_nothing(reentrant, case, tmp_path):
    how = SAQConfig(rho=0.1, schedule="full", case=case)
    plain = trained("vit", tmp_path, how)
    checkpointed = trained(
        "vit",
        tmp_path,
        how,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert checkpointed.model.vit.layers[0].gradient_checkpointing
    for (name, a), b in zip(plain.model.named_parameters(), checkpointed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_drop_path_is_the_same_in_both_passes(tmp_path):
    """Swin drops whole paths at random. With rho = 0 both passes are the same function only if they drop the same
    ones, and the run then equals plain training bit for bit."""
    states = []
    for config in (SAQConfig(rho=0.0, schedule="full"), SAQConfig(case=None)):
        model = swin()
        quantize(model, SAQQuantizationConfig())
        calibrate(model, [{"pixel_values": images(8)}])
        InOrder(model, arguments(tmp_path), saq_config=config, train_dataset=Images(12, torch.float32)).train()
        states.append(model.state_dict())
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), name


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo looks at every tensor
@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param(dict(ascent_depth=0.5), marks=pytest.mark.slow),
        pytest.param(dict(ascent_depth=0.5, match_radius=True), marks=pytest.mark.slow),
        pytest.param(dict(schedule="full"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_torch_compile(knobs, tmp_path):
    """`--torch_compile`: the same training as without, to float rounding. The backend that compiles nothing shows what
    matters here: that both passes are traced as they are meant, and that nothing of the first is put into the second,
    which compiled code would not notice."""
    how, steps = SAQConfig(rho=0.1, **knobs), 3 if "match_radius" in knobs else 2
    plain = trained("vit", tmp_path, how, max_steps=steps)
    torch._dynamo.reset()
    said = pytest.warns(UserWarning, match="two whole passes, because the model is compiled")
    with said if "ascent_depth" in knobs else nullcontext():
        compiled = trained("vit", tmp_path, how, max_steps=steps, torch_compile=True, torch_compile_backend="eager")
    for (name, a), b in zip(plain.model.named_parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)
    for name in ("sharpness", "radius_factor") if how.match_radius else ("sharpness",):
        logs = [[e[name] for e in run.state.log_history if "loss" in e] for run in (plain, compiled)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-2, abs=1e-5), name
        assert len(set(logs[0])) > 1, name

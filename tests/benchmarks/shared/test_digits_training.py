"""The task of few digits: its split, and training without a radius."""

from __future__ import annotations

import torch

from benchmarks.shared import digits_training
from benchmarks.shared.images import draw
from benchmarks.shared.schedule_variants import VARIANTS, saq_config
from hf_saq import SAQConfig


def test_images_are_of_one_use_only():
    pool, validation, test = digits_training.load_split(450, 350)
    seen = [tuple(image.flatten().tolist()) for part in (pool, validation, test) for image in part.pixels]
    assert len(seen) == 1797
    assert not set(seen[:450]) & set(seen[450:]) and not set(seen[450:800]) & set(seen[800:])
    drawn = [draw(pool, 300, seed) for seed in (0, 1)]
    assert all(len(d) == 300 for d in drawn) and not torch.equal(drawn[0].labels, drawn[1].labels)
    assert {tuple(image.flatten().tolist()) for image in drawn[0].pixels} <= set(seen[:450])


def test_rho_zero_is_plain_training():
    """The step of every schedule, with a radius that moves nothing, ends at the parameters of plain QAT."""
    pool, _, _ = digits_training.load_split(60, 1700)
    state = digits_training.tiny_vit(3).state_dict()

    def trained(saq):
        model = digits_training.quantized(state, pool)
        found = digits_training.train(model, pool, 3, 4e-3, 1, saq)
        return model.state_dict(), found

    plain, found = trained(SAQConfig(**VARIANTS["qat"]))
    assert found["steps"] == 6 and found["perturbed_share"] == 0
    assert any(not torch.equal(plain[name], value) for name, value in state.items() if name in plain)
    for method in ("full", "start 0.5", "previous"):
        other, found = trained(saq_config(0.0, VARIANTS[method]))
        assert all(torch.equal(plain[name], value) for name, value in other.items()), method

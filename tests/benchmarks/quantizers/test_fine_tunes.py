"""What one run of the quantizer sweep starts from and reports."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quantizers import fine_tunes
from benchmarks.shared.cifar_resnet import CifarResNet
from benchmarks.shared.images import Images
from hf_saq.quantizers import QUANTIZERS, LSQQuantizer, Quantizer, QuantizerSettings


@pytest.mark.parametrize("name", ["lsq", "pact"])
def test_quantizers_start_from_the_same_weights(name):
    state = CifarResNet(20).state_dict()
    images = Images(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.zeros(8, dtype=torch.long))
    material = fine_tunes.Material(images, images, images, state)
    model = fine_tunes.start(material, {"quantizer": name, "bits": 3})
    quantizers = [m for m in model.modules() if isinstance(m, Quantizer)]
    assert len(quantizers) == 40
    assert {type(q) for q in quantizers} == {QUANTIZERS[name]}
    assert [q.bits for q in quantizers] == [8, 8] + [3] * 36 + [8, 8]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert state["conv1.weight"].any()  # a run changes nothing of what the next starts from


def test_first_weight_grids_by_hand():
    """All weights of a layer -2, -1, 0 or 1 times one number: LSQ's four levels, without error."""
    state = CifarResNet(20).state_dict()
    for name, value in state.items():
        if value.ndim == 4:
            levels = torch.tensor([-2.0, -1.0, 0.0, 1.0]).repeat(value.numel() // 4 + 1)
            state[name] = 0.1 * levels[: value.numel()].view_as(value)
    found = fine_tunes.first_weight_grids(
        fine_tunes.Material(None, None, None, state), {"quantizers": ["lsq", "liq"], "bits": [2]}
    )
    assert set(found) == {"lsq-2", "liq-2"}
    assert found["lsq-2"]["error"] == pytest.approx(0, abs=1e-6)
    assert found["lsq-2"]["outermost"] == pytest.approx(0.5, abs=0.01)
    assert found["liq-2"]["error"] == pytest.approx(0, abs=1e-3)  # the mean, -1/2, is the middle of its levels


def test_learned_values_have_the_names_of_the_parameters():
    model = torch.nn.Sequential(LSQQuantizer(QuantizerSettings(4, "weight")))
    model[0].path = "layer.weight_quantizer"
    with torch.no_grad():
        model[0].scale.fill_(1.0)
    assert fine_tunes.learned_values(model) == {"layer.weight_quantizer.scale": 1.0}

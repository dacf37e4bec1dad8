"""Two models side by side, against numbers from their layers run by hand."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from labelled_models import labelled_images, labelled_vectors, nothing_changes, quantized_linear_net, quantized_vit
from tiny_models import linear_net, vit
from torch import nn

from hf_saq import SAQQuantizationConfig, dequantize, pack, quantize
from hf_saq.analysis import compare, sensitivity

W3 = SAQQuantizationConfig(weight_bits=3, activation_bits=None, first_last_bits=None)


def test_layers_and_predictions_are_those_of_the_models_run_by_hand():
    """Tolerance 1e-3 dB."""
    a, b = linear_net(), quantized_linear_net(2, 2)
    batches = labelled_vectors(32)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with nothing_changes(b), nothing_changes(a):
        found = compare(a, b, batches)
    assert [layer.name for layer in found.layers] == ["0", "2", "4"]
    with torch.no_grad():
        values = [x, x]
        for k in range(5):
            values = [net[k](value) for net, value in zip((a, b), values, strict=True)]
            if k % 2 == 0:
                ratio = values[0].square().sum() / (values[1] - values[0]).square().sum()
                assert found.layers[k // 2].snr == pytest.approx(10 * math.log10(ratio), abs=1e-3)
    y_a, y_b = values
    assert found.snr == pytest.approx(found.layers[-1].snr) and found.examples == 48
    assert found.loss_a == pytest.approx(nn.functional.cross_entropy(y_a, y).item(), rel=1e-5)
    assert found.loss_b == pytest.approx(nn.functional.cross_entropy(y_b, y).item(), rel=1e-5)
    different = (y_a.argmax(1) != y_b.argmax(1)).nonzero().flatten().tolist()
    assert len(different) > 1 and found.agreement == pytest.approx(1 - len(different) / 48)
    farthest = max(different, key=lambda k: (y_a[k] - y_b[k]).norm().item())
    assert found.parted[0].example == farthest
    assert found.parted[0].prediction_a == y_a[farthest].argmax() != found.parted[0].prediction_b


def test_forms_of_one_model_can_be_compared():
    model = quantized_vit(activation_bits=None)
    batches = labelled_images()
    for other in (pack(model), dequantize(model)):
        found = compare(model, other, batches)
        assert found.agreement == 1 and not found.parted
        assert len(found.layers) == 14 and min(layer.snr for layer in found.layers) > 100
    worse = compare(vit(), model, batches)
    assert len(worse.layers) == 14 and max(layer.snr for layer in worse.layers) < 60


def test_the_result_prints_draws_and_becomes_json(tmp_path):
    net = quantized_linear_net(2, 2)
    found = compare(linear_net(), net, labelled_vectors(32))
    assert f"{found.agreement:.1%} of 48 predictions agree" in str(found)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain and len(plain["parted"]) <= 10
    found.plot(tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert compare(net, net, labelled_vectors()).to_dict()["snr"] is None  # no noise: infinite


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_predict_nothing(value: float):
    """Sorting takes NaN for the largest score, so that a diverged model agrees with itself, and by chance with others.

    A score of infinity is the largest, and all of the logits are noise then.
    """
    plain, diverged = linear_net(), linear_net()
    with torch.no_grad():
        diverged[4].bias[1] = value
    batches = labelled_vectors(batches=2)
    found = compare(plain, diverged, batches)
    classes = plain(torch.cat([x for x, _ in batches])).argmax(1).tolist()
    assert found.layers[-1].snr == found.snr or value != value
    if value == math.inf:
        assert (found.nan_a, found.nan_b, found.snr) == (0, 0, -math.inf)
        assert found.agreement == pytest.approx(classes.count(1) / len(classes))
        return
    assert found.agreement == 0 and (found.nan_a, found.nan_b) == (0, found.examples) and math.isnan(found.snr)
    assert [(p.example, p.prediction_a, p.prediction_b) for p in found.parted] == [
        (k, label, None) for k, label in enumerate(classes[:10])
    ]
    assert f"the second model gives scores that are NaN to {found.examples} of {found.examples} examples" in str(found)
    assert f"example 0: {classes[0]} and nothing" in str(found)
    itself = compare(diverged, diverged, batches)
    assert itself.agreement == 0 and itself.nan_a == itself.nan_b == found.examples
    json.dumps(itself.to_dict(), allow_nan=False)


def test_one_example_without_scores_comes_first():
    net = linear_net()
    (x, y), *_ = labelled_vectors(batches=1)
    x = x.clone()
    x[3] = math.nan
    found = compare(net, quantized_linear_net(2, 2), [(x, y)])
    assert found.parted[0].example == 3 and found.nan_a == found.nan_b == 1
    distances = [p.distance for p in found.parted[1:]]
    assert distances == sorted(distances, reverse=True) and all(map(math.isfinite, distances))


class ForTokens(nn.Module):
    """Scores `(n, queries, classes)`, as models of transformers that answer for many queries have them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, pixel_values, labels):
        logits = self.layer(pixel_values)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits.mT, labels)}


def with_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    return model(**batch)["loss"]


def test_classes_are_those_of_the_loss():
    """Queries were taken for classes: here all of their largest scores are at the same query in both models."""
    x, y = torch.randn(6, 7, 4), torch.randint(5, (6, 7))
    x[:, 2] += 10 * x.sign()[:, 2]
    a = ForTokens()
    b = quantize(copy.deepcopy(a), W3)
    equal = (a(x, y)["logits"].argmax(2) == b(x, y)["logits"].argmax(2)).double().mean().item()
    batches = [{"pixel_values": x, "labels": y}]
    found = compare(a, b, batches, loss=with_loss)
    assert 0.1 < equal < 1 and found.agreement == pytest.approx(equal) and found.examples == 42
    entries = sensitivity(b, batches, candidates=(3,), loss=with_loss, passes=99, trace_samples=2).entries
    assert entries[0].agreement == pytest.approx(equal)
    # The cross-entropy of torch has classes in dimension 1 of a pair.
    first, second = (nn.Sequential(net.layer, Transposed()) for net in (a, b))
    assert compare(first, second, [(x, y)]).agreement == pytest.approx(equal)


class Transposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mT


def test_a_loss_calls_the_model_once():
    """Its logits are what is compared. The error was "too many values to unpack", or a missing key."""
    net = quantized_linear_net(2, 2)
    losses = {2: lambda m, b: m(b[0]).sum() + m(b[0]).sum(), 0: lambda m, b: m[4](m[2](m[0](b[0]))).sum()}
    for times, loss in losses.items():
        with pytest.raises(ValueError, match=f"batch 0 called the models {times} and {times} times; expected one"):
            compare(linear_net(), net, labelled_vectors(), loss=loss)
    with pytest.raises(ValueError, match="has returned no logits; expected a `loss` that calls the model itself"):
        sensitivity(net, labelled_vectors(), candidates=(2,), loss=losses[0], trace_samples=2)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="have no layer of the same name; expected two models of one architecture"):
        compare(vit(), linear_net(), labelled_images())
    wider = linear_net()
    wider[4] = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"4: \(8, 3\) in the first model and \(8, 5\) in the second"):
        compare(linear_net(), wider, labelled_vectors())

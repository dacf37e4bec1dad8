"""ResNets for CIFAR: parameters, option-A shortcuts, and the published weights where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shared.cifar_data import load_cifar
from benchmarks.shared.cifar_resnet import BasicBlock, CifarResNet, load_weights, option_a_shortcut
from benchmarks.shared.cifar_training import accuracy

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data"
WEIGHTS = DATA / "cifar10-resnet20" / "resnet20-12fca82f.th"


# Table 6 of the paper, in millions.
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameter_count_of_the_paper(depth, millions):
    parameters = sum(p.numel() for p in CifarResNet(depth).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.005)


def test_a_depth_without_a_network():
    with pytest.raises(ValueError, match=r"depth=18; expected 6n \+ 2"):
        CifarResNet(18)


def test_logits_and_stages():
    model = CifarResNet(20, classes=7).eval()
    shapes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize(("channels", "stride", "size"), [(4, 1, 6), (8, 2, 6), (8, 2, 5)])
def test_option_a_shortcut(channels, stride, size):
    """Element by element: new channels are zero, the old ones sit in the middle, every second pixel stays."""
    x = torch.randn(2, 4, size, size)
    y = option_a_shortcut(x, channels, stride)
    before = (channels - 4) // 2
    kept = range(0, size, stride)
    assert y.shape == (2, channels, len(kept), len(kept))
    for c in range(channels):
        for i, row in enumerate(kept):
            for j, column in enumerate(kept):
                old = c - before
                expected = x[:, old, row, column] if 0 <= old < 4 else torch.zeros(2)
                assert torch.equal(y[:, c, i, j], expected)


def test_a_block_that_halves():
    block = BasicBlock(4, 8, stride=2).eval()
    for norm in (block.bn1, block.bn2):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(norm.bias)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)

    def normalized(x, norm):
        mean, var, scale, shift = (
            t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        return (x - mean) / (var + norm.eps).sqrt() * scale + shift

    x = torch.randn(2, 4, 6, 6)
    inner = normalized(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1).clamp_min(0)
    outer = normalized(F.conv2d(inner, block.conv2.weight, padding=1), block.bn2)
    outer[:, 2:6] += x[:, :, [0, 2, 4]][..., [0, 2, 4]]
    torch.testing.assert_close(block(x), outer.clamp_min(0))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("nested", [True, False])
def test_weights_load_strictly(tmp_path, prefix, nested):
    saved = CifarResNet(20)
    state = {prefix + name: value for name, value in saved.state_dict().items()}
    path = tmp_path / "weights.th"
    torch.save({"state_dict": state, "best_prec1": 1.0} if nested else state, path)
    loaded = load_weights(CifarResNet(20), path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), saved.state_dict().values(), strict=True)
    )

    state.pop(f"{prefix}linear.bias")
    torch.save(state, path)
    with pytest.raises(RuntimeError, match=r"Missing key.*linear\.bias"):
        load_weights(CifarResNet(20), path)


def test_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.th: no such weights file"):
        load_weights(CifarResNet(20), tmp_path / "absent.th")


@pytest.mark.skipif(
    not WEIGHTS.is_file(), reason=f"the published weights are not at {WEIGHTS.relative_to(ROOT.parent)}"
)
def test_the_published_weights(tmp_path):
    """200 test images of the JPEG copy, on which the publisher's 92 % have become about 81."""
    directory = tmp_path / "data"
    directory.mkdir()
    _first_rows(DATA / "cifar10-jpeg", directory, 200)
    model = load_weights(CifarResNet(20), WEIGHTS)
    assert accuracy(model, load_cifar(directory, tmp_path / "cache").test) > 0.70


def _first_rows(source: Path, target: Path, rows: int) -> None:
    """A copy of each parquet file, cut after its first `rows` rows: decoding all of them takes long."""
    import pyarrow.parquet as pq

    for path in source.glob("*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, rows), target / path.name)

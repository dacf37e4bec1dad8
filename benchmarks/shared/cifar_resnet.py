"""Residual networks for CIFAR: Section 4.2 of He et al., arXiv:1512.03385.

A 3x3 convolution, three stages of `n` basic blocks with 16, 32 and 64 channels on 32x32, 16x16 and 8x8 pixels, global
average pooling and a linear layer: `6n + 2` weighted layers. Shortcuts are option A of the paper, without parameters.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGE_WIDTHS = (16, 32, 64)
WRAPPER_PREFIX = "module."
"""What `nn.DataParallel` puts before the names of the weights that it saves."""


def option_a_shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """Identity in the shape of the residual: every `stride`-th pixel, zeros for the channels that `x` lacks.

    The paper leaves open where the zeros go; they are split evenly before and after, as in the published weights.

    Args:
        x: `(batch, in, height, width)`, with `channels - in` even and not negative.

    Returns:
        `(batch, channels, ceil(height / stride), ceil(width / stride))`.
    """
    missing = channels - x.shape[1]
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, missing // 2, missing // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut, rectified after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.channels, self.stride = channels, stride
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + option_a_shortcut(x, self.channels, self.stride))


class CifarResNet(nn.Module):
    """Images `(batch, 3, 32, 32)` to logits `(batch, classes)`. The first convolution and `linear` are its edges.

    Args:
        depth: Number of weighted layers, `6n + 2`: 20, 32, 44, 56, 110 in the paper.

    Raises:
        ValueError: If `depth` is not `6n + 2`.
    """

    def __init__(self, depth: int = 20, classes: int = 10):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"CifarResNet: depth={depth}; expected 6n + 2 with n >= 1, such as 20 or 56.")
        self.conv1 = nn.Conv2d(3, STAGE_WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGE_WIDTHS[0])
        self.layer1 = _stage(STAGE_WIDTHS[0], STAGE_WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(STAGE_WIDTHS[0], STAGE_WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(STAGE_WIDTHS[1], STAGE_WIDTHS[2], blocks, stride=2)
        self.linear = nn.Linear(STAGE_WIDTHS[2], classes)
        for module in self.modules():  # He et al., arXiv:1502.01852, as the paper has it
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load the weights file `path` into `model`, in place and strictly; returns `model`.

    The file holds a state dict, or a dict with one under `state_dict`; its names may carry the prefix `module.`. It is
    read with `weights_only=True`, so that it can run no code.

    Raises:
        FileNotFoundError: If there is no such file.
        RuntimeError: If its names or shapes are not those of `model`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file; expected a state dict saved by torch.save.")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    state = saved.get("state_dict", saved)
    model.load_state_dict({name.removeprefix(WRAPPER_PREFIX): value for name, value in state.items()}, strict=True)
    return model

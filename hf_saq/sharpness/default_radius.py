"""Choose the radius where none is given: a starting point by model family, not a tuned value."""

from __future__ import annotations

from torch import nn

CONVOLUTIONAL_RHO = 0.05
"""SAM's own default for CNNs (arXiv:2010.01412). The SAQ authors' scripts use 0.3 to 0.9, but on standardised weights,
which are larger."""

TRANSFORMER_RHO = 0.1
"""The upper end of 0.001 to 0.1, which the authors' scripts for ViTs sweep."""


def default_rho(model: nn.Module) -> tuple[float, str]:
    """Return `(rho, family)`: convolutional if most weights of linear and convolution layers are in convolutions."""
    counts = {True: 0, False: 0}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            counts[isinstance(module, nn.modules.conv._ConvNd)] += module.weight.numel()
    if counts[True] > counts[False]:
        return CONVOLUTIONAL_RHO, "convolutional"
    return TRANSFORMER_RHO, "transformer-like"

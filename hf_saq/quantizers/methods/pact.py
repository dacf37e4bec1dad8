"""Quantize by PACT, parameterized clipping activation: Choi et al., arXiv:1805.06085."""

from __future__ import annotations

from .dorefa import DoReFaQuantizer


class PACTQuantizer(DoReFaQuantizer):
    """Clips activations at a learned `alpha` (the Parameter `clip_value`); weights are as in DoReFa, as in the paper.

    With `n = 2^b - 1`:

        y   = clip(x, 0, alpha)
        y_q = round(y * n / alpha) * alpha / n
        d y_q / d alpha = 0 where x < alpha, 1 where x >= alpha

    so that `alpha` learns from clipped values only, unlike in LSQ and LIQ. Signed activations, which the paper does
    not have, are told of in `ClipQuantizer`; a value below their range counts with `qmin / qmax`.

    The paper starts `alpha` high and adds `lambda * alpha^2` to the loss. Here it starts at the calibrated range, and
    `SAQTrainer` decays no quantizer value; a regularised `alpha` needs a parameter group of its own.
    """

    learns_activation_clip = True
    through_rounding = False

"""Compute fake quantization in few passes over memory: eager, or compiled by `torch.compile`.

The formulas are written once, in `formulas`: autograd's double backward and a surrounding `torch.compile` run them
unchanged. Two backends compute the same values faster:

- `eager`: ordinary torch operations, chosen and ordered for few passes and few temporaries. On CPU the gradients for
  one scale per tensor go through `blocks`, which stay in cache.
- `compiled`: one pass, by inductor (C++ on CPU, Triton on CUDA). On CPU its results are those of eager bit for bit,
  because the sum for the gradient of the scale stays outside. It compiles once per kind of use, not per shape.

`backend` chooses between them, `dispatch` is what the autograd function calls; `layouts` has views that all share.

Comes in: tensors, a `Grid`, a positive scale. Goes out: quantized tensors, and gradients of them and of the scale
without its factor. Must not know: quantizers, and what a gradient is used for.
"""

from .backend import Backend, set_backend
from .dispatch import quantize_backward, quantize_forward
from .formulas import Grid

__all__ = ["Backend", "Grid", "quantize_backward", "quantize_forward", "set_backend"]

"""Find layers that read the same tensor, which may then quantize it once.

Comes in: a model. Goes out: names of layers, group by group. Must not know: files, training.

`finding` runs a copy of a model without values and sees which layers are given the same tensor; `image_size` says what
to run it on; `grouping` decides which of them share a quantizer.
"""

from .finding import find_shared_inputs, readers_of_the_same_tensor
from .grouping import groups_to_share
from .image_size import image_channels, image_size, pair

__all__ = [
    "find_shared_inputs",
    "groups_to_share",
    "image_channels",
    "image_size",
    "pair",
    "readers_of_the_same_tensor",
]

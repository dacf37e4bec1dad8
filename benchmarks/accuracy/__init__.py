"""Does sharpness-aware quantization beat plain quantization-aware training, at the same steps and at the same cost?

`make results` runs `sweep` over `tasks` (images and a float model), bits and `methods`, then `page`.
`convergence` tells whether the training of a task is long enough. docs/protocol.md has the rules of comparison.
`cheaper` searches for ways to pay less on pretrained models.
`make results-quick` runs `quick`: a small part of the stored runs once more, to compare.

Comes in: the images and float weights that the tasks name. Goes out: `benchmarks/results/accuracy/*.json`, one for
each run; docs/results.md and its plots. Must not know: other rooms.
"""

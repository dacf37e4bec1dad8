"""What does a packed file take: bytes on disk, memory and time to load, next to the float model?

`make packed-size` runs `measure`.

Comes in: a model with random weights, made here. Goes out: `benchmarks/results/packed_size.json`; no page. Must not
know: other rooms, training.
"""

"""Ask what it does to accuracy to quantize once what several layers read.

Comes in: settings of stored runs. Goes out: accuracies with a scale for each layer and with a shared one, for
docs/cost.md. Must not: choose settings. `make shared-inputs` runs `measure`.
"""

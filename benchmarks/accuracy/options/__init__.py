"""Ask what options of quantization that make steps cheaper do to accuracy.

Comes in: settings of stored runs. Goes out: accuracies without and with an option, for docs/cost.md. Must not: choose
settings. `make cheaper-options` runs `measure`.
"""

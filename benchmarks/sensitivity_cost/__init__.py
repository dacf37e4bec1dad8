"""What does it cost to find the sensitive layers of a model, in evaluation passes over the same data?

`make sensitivity-cost` runs `measure`.

Comes in: a model with random weights and images of noise, made here. Goes out: `benchmarks/results/sensitivity_cost`,
which docs/analysis.md quotes. Must not know: other rooms, training.
"""

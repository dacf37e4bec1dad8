"""What do cheaper schedules keep of the accuracy that SAQ gains, and what do they cost?

`make schedules` runs `sweep`, which writes the page at its end.

Comes in: scikit-learn's digits; the cost of a step as `benchmarks/results/step_cost` has it. Goes out:
`benchmarks/results/schedules/*.json`, one for each run; docs/schedules.md and its plot. Must not know: other rooms; of
`step_cost` only the stored figures.
"""

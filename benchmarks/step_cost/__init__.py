"""What does a training step cost in time and memory?

These scripts measure: `fake_quant`, plain quantization-aware training against float and against other libraries;
`step_profile`, which part of a step takes how long (both by `make fake-quant`); `sweep`, every schedule against plain
quantization-aware training (`make step-cost`, which writes the page, too). `launches` counts kernels and waits of a
step, for a GPU.

Comes in: models with random weights, made here. Goes out: `fake_quant*.json`, `step_profile.json` and
`step_cost/*.json` in `benchmarks/results`; docs/cost.md by `page`. Must not know: other rooms, real images.
"""

"""What do the forms of a quantized model cost in time, memory and size, side by side?

`make deploy-benchmark` runs `measure`: `hf-saq benchmark` on five models, and `page`, its part of docs/deploy.md.

Comes in: weights where they are at hand, else random ones. Goes out: `benchmarks/results/deploy/*.json`, one for each
model; a section of docs/deploy.md. Must not know: other rooms, how forms are measured (`hf_saq.timing` does).
"""

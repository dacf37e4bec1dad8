"""What do the forms of a quantized model cost in time, memory and size, side by side?

`make deploy-benchmark` runs `measure`: `hf-saq benchmark` on six models, and `page`, its part of docs/deploy.md.
`make deploy-operators` runs `operators`: where the time of one of them goes. `other_exits` tries other ways out.

Comes in: weights where they are at hand, else random ones. Goes out: `benchmarks/results/deploy/*.json`, one for each
model, `deploy_operators` and `other_exits` beside it; two sections of docs/deploy.md. Must not know: other rooms, how
forms are measured (`hf_saq.timing` does).
"""

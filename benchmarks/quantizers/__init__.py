"""What do quantizers keep of the float model's accuracy at 4, 3 and 2 bits, after the same short fine-tune?

`make quantizers` runs `sweep`, which writes the page at its end; `fine_tunes` has what one run computes.

Comes in: CIFAR-10 and float weights of ResNet-20. Goes out: `benchmarks/results/quantizers/*.json`, one for each run;
docs/quantizers.md. Must not know: other rooms, the perturbation.
"""

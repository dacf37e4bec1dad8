"""What does one GPU say: do its tests pass, what do steps cost there, and what do a few minutes of training show?

`make gpu-data` packs images and weights into one file; `make gpu-campaign` runs `campaign` where the card
is: the checks of `requirements`, then the `stages`, each a script of another room in a process of its own, within a
time limit in all. `page` writes docs/gpu.md.

Comes in: the packed file. Goes out: `benchmarks/results/gpu/*.json` and what the stages write below it; docs/gpu.md.
Must not know: how other rooms do their work; it runs their scripts and reads their files.
"""

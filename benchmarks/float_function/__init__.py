"""What do conversion and training keep of the function of a float MobileNetV2?

`make float-function` runs `measure`, which writes the page at its end.

Comes in: Oxford Flowers-102 and MobileNetV2 with ImageNet weights. Goes out:
`benchmarks/results/float_function/*.json`, one for each conversion and one for training; docs/float_function.md.
Must not know: other rooms.
"""

"""Where data, results and caches are unless a script is told otherwise, as seen from the root of the repository."""

from __future__ import annotations

RESULTS = "benchmarks/results"
CIFAR = "../shared/data/cifar10-jpeg"
RESNET20 = "../shared/data/cifar10-resnet20/resnet20-12fca82f.th"
FLOWERS = "../shared/data/flowers102"
CALTECH = "../shared/data/caltech101"
MOBILENET = "../shared/data/mobilenet_v2-imagenet"
VIT_TINY = "../shared/data/vit-tiny-imagenet"
EFFICIENTNET = "../shared/data/efficientnet_lite0-imagenet"

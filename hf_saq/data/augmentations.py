"""Name the augmentations of training images. Apart from what does them, since a command names them in its help."""

AUGMENTATIONS = ("crop_flip", "rand_augment", "pad_crop_flip", "shift", "none")

"""Add the arguments that say which images a command looks at. Their names are those of the example script as well."""

from __future__ import annotations

import argparse

from ..data.augmentations import AUGMENTATIONS


def add_data_arguments(command: argparse.ArgumentParser, most: int | None) -> None:
    """Add arguments for labelled images.

    Args:
        most: How many images are used at most unless the user says otherwise; `None`: all.
    """
    group = command.add_argument_group("images")
    group.add_argument(
        "--data",
        "--dataset_name",
        required=True,
        metavar="DATA",
        help="directory with a folder of images for each class or with parquet files, a data set on the Hub, or "
        "digits (those of scikit-learn)",
    )
    group.add_argument("--dataset-config-name", "--dataset_config_name", help="configuration of a data set on the Hub")
    group.add_argument(
        "--split", "--eval_split", help="split to look at; default: validation, else test, else the only one"
    )
    group.add_argument("--image-column-name", "--image_column_name", help="default: the first column of images")
    group.add_argument("--label-column-name", "--label_column_name", help="default: the first column of labels")
    group.add_argument(
        "--max-samples",
        "--max_eval_samples",
        type=int,
        default=most,
        help="at most so many images, drawn with --seed; default: " + ("all" if most is None else str(most)),
    )
    group.add_argument("--skip-corrupt", "--skip_corrupt", action="store_true", help="leave unreadable images out")
    group.add_argument(
        "--augmentation",
        choices=AUGMENTATIONS,
        help="that of the training: after crop_flip and rand_augment, images are scaled and their middle is cut out, "
        "else they are only scaled; default: crop_flip, for digits none",
    )
    group.add_argument("--batch-size", type=int, default=64, help="images in a batch; default: 64")
    group.add_argument("--seed", type=int, default=42, help="of what is drawn; default: 42, as in training")
    group.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")

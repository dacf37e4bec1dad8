"""Take a task to a machine without its data: images as JPEG and the float model in one small file, and back.

    python -m benchmarks.accuracy.portable pack      # what `make gpu-data` runs; trains the float model if need be
    python -m benchmarks.accuracy.portable unpack    # there: fills the cache that the sweep reads

Images are those of the task at the size that is stored, and JPEG loses a little of them; the float model is rounded
to float16 once. All methods of the campaign start from what was unpacked, so that they are compared alike, but not
with runs on the original files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from ..shared.command_line import parsed
from ..shared.images import Images
from .arguments import AccuracyArguments
from .sweep import is_at_hand
from .task import Paths, Task
from .tasks import TASKS
from .training import float_file, float_state, images_of

LIMIT = 40 * 10**6
"""Bytes that the file may have: it must travel wherever a GPU is lent."""
WEIGHTS = "weights."


@dataclass
class PortableArguments(AccuracyArguments):
    """What to pack. The options of the sweep say where data are."""

    task: str = field(default="flowers-vit-224", metadata={"help": "A task of the sweep."})
    file: str = field(
        default="outputs/gpu-data/flowers-vit-224.safetensors", metadata={"help": "To write, or to read."}
    )
    quality: int = field(default=80, metadata={"help": "Of the JPEG images, 1 to 100."})
    count: int = field(default=600, metadata={"help": "Test images to take along; half as many to choose by."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS or TASKS[self.task].decoded is None:
            raise ValueError(
                f"--task {self.task}: cannot travel; expected one of {[n for n, t in TASKS.items() if t.decoded]}."
            )


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] not in ("pack", "unpack"):
        raise ValueError(f"{given[:1]}: expected pack or unpack, then options.")
    args, _ = parsed(PortableArguments, given[1:], "benchmarks.accuracy.portable", __doc__)
    (pack if given[0] == "pack" else unpack)(args, args.paths())


def pack(args: PortableArguments, paths: Paths) -> None:
    """Write the file.

    Raises:
        ValueError: If the data of the task is not there, or the file would be larger than `LIMIT`.
    """
    if not is_at_hand(args.task, paths):
        raise ValueError(f"{args.task}: nothing to pack. Say where its data is.")
    data = images_of(args.task, paths)
    taken = {
        "train": data.training,
        "validation": data.validation[slice(0, args.count // 2)],
        "test": data.test[slice(0, args.count)],
    }
    tensors = {f"{WEIGHTS}{name}": value.half() for name, value in float_state(args.task, paths, None, 0).items()}
    for split, images in taken.items():
        tensors |= {f"{split}.{name}": value for name, value in encoded(images, args.quality).items()}
    size = sum(value.nbytes for value in tensors.values())
    if size > LIMIT:
        raise ValueError(
            f"{args.file}: {size / 1e6:.1f} MB; expected at most {LIMIT / 1e6:.0f}. Lower --quality or --count."
        )
    Path(args.file).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, args.file)
    print(f"{args.file}: {size / 1e6:.1f} MB, {', '.join(f'{len(v)} {k}' for k, v in taken.items())} images")


def unpack(args: PortableArguments, paths: Paths) -> None:
    """Write decoded images and the float model into the cache."""
    task, tensors = TASKS[args.task], load_file(args.file)
    weights = {
        name.removeprefix(WEIGHTS): value.float() for name, value in tensors.items() if name.startswith(WEIGHTS)
    }
    check_weights(task, weights, args.file)
    splits = {split: decoded(tensors, split) for split in ("train", "validation", "test")}
    paths.cache.mkdir(parents=True, exist_ok=True)
    pixels = {f"{split}.pixels": images.pixels for split, images in splits.items()}
    labels = {f"{split}.labels": images.labels for split, images in splits.items()}
    assert task.decoded is not None
    save_file(pixels | labels, paths.cache / task.decoded)
    save_file(weights, paths.cache / float_file(args.task))
    print(f"{paths.cache}: {', '.join(f'{len(v)} {k}' for k, v in splits.items())} images and the float model")


def check_weights(task: Task, weights: dict[str, Tensor], file: str) -> None:
    """Raise `ValueError` if these are not the weights of the task's model."""
    expected = task.build().state_dict()
    differing = [n for n in {*expected, *weights} if n not in weights or n not in expected]
    differing += [n for n in weights if n in expected and weights[n].shape != expected[n].shape]
    if differing:
        raise ValueError(f"{file}: {sorted(differing)[:3]} differ from the model of {task.title}. Pack it anew.")


def encoded(images: Images, quality: int) -> dict[str, Tensor]:
    """JPEG files one after the other, where each ends, and the labels."""
    files = [encode_jpeg(pixels, quality=quality) for pixels in images.pixels]
    ends = torch.tensor([len(file) for file in files]).cumsum(0)
    return {"jpeg": torch.cat(files), "ends": ends, "labels": images.labels}


def decoded(tensors: dict[str, Tensor], split: str) -> Images:
    """What [`encoded`] packed, up to what JPEG loses."""
    ends = tensors[f"{split}.ends"].tolist()
    jpeg = tensors[f"{split}.jpeg"]
    parts = [jpeg[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return Images(torch.stack([decode_jpeg(part) for part in parts]), tensors[f"{split}.labels"])


if __name__ == "__main__":
    main()

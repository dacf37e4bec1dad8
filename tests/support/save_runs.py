"""Saves over earlier saves, killed at every moment; `test_staging.py` starts it and looks at what is left."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import transformers.modeling_utils
from resume_runs import make_trainer
from transformers import PreTrainedModel

from hf_saq.storage import staging

SINGLE, LARGE, SMALL = "50GB", "12KB", "6KB"
SAVES = {
    "single-single": (SINGLE, SINGLE),
    "shards-single": (LARGE, SINGLE),
    "single-shards": (SINGLE, LARGE),
    "shards-other-shards": (LARGE, SMALL),
}
"""`max_shard_size` of the earlier and of the later save."""
MOMENTS = ("at_the_start", "half_way_through_the_weights", *(f"before_rename_{i}" for i in range(30)))


def with_shards_of(size: str) -> None:
    PreTrainedModel.save_pretrained = lambda self, directory, **kwargs: save_pretrained(
        self, directory, **{**kwargs, "max_shard_size": size}
    )


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Replace what comes next at this moment by the end of the process."""
    if moment == "at_the_start":
        PreTrainedModel.save_pretrained = die
    elif moment == "half_way_through_the_weights":
        save_file = transformers.modeling_utils.safe_save_file

        def half(tensors, path, **kwargs):
            save_file(tensors, path, **kwargs)
            os.truncate(path, os.path.getsize(path) // 2)
            die()

        transformers.modeling_utils.safe_save_file = half
    else:
        replace, left = os.replace, [int(moment.rpartition("_")[2])]

        def count(source, target):
            if not left[0]:
                die()
            left[0] -= 1
            replace(source, target)

        staging.os.replace = count


def save_and_die(trainer, moment: str, size: str) -> None:
    with_shards_of(size)
    die_at(moment)
    trainer.save_model()


save_pretrained = PreTrainedModel.save_pretrained

if __name__ == "__main__":
    root = Path(sys.argv[1])
    trainer = make_trainer("vit", root / "run", max_steps=1)
    trainer.calibrate_if_needed()
    for name, (earlier, later) in SAVES.items():
        with_shards_of(earlier)
        trainer.save_model(root / name / "earlier")
        trainer.model.classifier.bias.data += 1
        with_shards_of(later)
        trainer.save_model(root / name / "later")
        trainer.model.classifier.bias.data -= 1
        for moment in MOMENTS:
            directory = root / name / moment
            shutil.copytree(root / name / "earlier", directory)
            child = os.fork()
            if child == 0:
                trainer.model.classifier.bias.data += 1
                trainer.args.output_dir = str(directory)
                save_and_die(trainer, moment, later)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if os.WIFEXITED(status):  # there were not as many renames
                assert os.WEXITSTATUS(status) == 0 and moment.startswith("before_rename")
                (directory / "whole").touch()
                break
            assert os.WTERMSIG(status) == signal.SIGKILL, (moment, status)

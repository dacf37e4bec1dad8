"""Settings of all tests."""

from __future__ import annotations

import functools
import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import pytest
import torch
import transformers

import hf_saq  # noqa: F401 (registers the quantization method)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Compute as the processes that tests start do: with more threads float32 differs in its last bits.
torch.set_num_threads(1)

TESTS = Path(__file__).parent

LONGEST = (
    "training/distributed/test_fsdp.py",
    "training/distributed/test_distributed.py",
    "training/test_resume.py",
    "examples/test_run_image_classification_no_trainer.py",
    "storage/test_staging.py",
    "test_architectures.py",
    "training/test_precision.py",
)
"""Files that take longest, in this order: where several processes share the files, none is left with one of them at
the end (`--no-loadscope-reorder`, since pytest-xdist would begin with the files of most tests)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {TESTS / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def _read_the_operators_of_exports_once() -> None:
    """torch.onnx parses the source of five hundred operators anew in each export, a quarter of the time of a small
    one. They are the same ones each time."""
    try:
        from torch.onnx._internal._lazy_import import onnxscript_apis as apis
    except ImportError:  # it is no public part of torch
        return

    @functools.cache
    def get_torchlib_ops() -> list:
        del apis.get_torchlib_ops
        try:
            return apis.get_torchlib_ops()
        finally:
            apis.get_torchlib_ops = get_torchlib_ops

    apis.get_torchlib_ops = get_torchlib_ops


_read_the_operators_of_exports_once()


def pytest_collection_finish() -> None:
    """Accelerate collects garbage whenever a training run starts. What the tests have imported by now is none, and
    without it a collection takes a few milliseconds instead of most of a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # extensions that count what is left at the end would call all of it leaked


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

"""Settings of all tests."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import pytest
import torch
import transformers

import hf_saq  # noqa: F401 (registers the quantization method)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


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

"""Run compiled models as they are written, for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.Lock()
_users = 0
_stance = ExitStack()


@contextmanager
def run_as_written() -> Iterator[None]:
    """Let compiled code run uncompiled inside the block: it does not see hooks that came after it.

    torch has one stance for all threads, so the first block that begins sets it and the last that ends restores it.
    """
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _stance.close()

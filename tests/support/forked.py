"""Processes of one training run, forked where everything is imported already: that takes longer than the runs."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable

from torch.distributed import TCPStore


def run_in_processes(count: int, function: Callable[..., None], *arguments: object) -> None:
    """Call `function(*arguments)` in `count` processes that find each other as those of torchrun do.

    Ends this process with an error where one of them fails, after what that one printed.
    """
    gc.freeze()  # what is imported is no garbage, which Accelerate looks for at each start of a run
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = {_forked(rank, count, store.port, function, arguments) for rank in range(count)}
    gc.unfreeze()
    while children:
        child, status = os.wait()
        children.discard(child)
        if status:
            for other in children:  # they wait for the one that failed
                os.kill(other, signal.SIGKILL)
            sys.exit(f"{function.__module__}.{function.__name__} failed in process {child}, wait status {status}")


def _forked(rank: int, count: int, port: int, function: Callable[..., None], arguments: tuple) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the store is in the process that forks
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)

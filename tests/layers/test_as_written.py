"""Compiled code runs as written while somebody needs it to, whichever thread is done first."""

from __future__ import annotations

import threading

import torch

from hf_saq.layers.as_written import run_as_written


def stance() -> str:
    return torch._dynamo.eval_frame._stance.stance


def test_blocks_of_two_threads_overlap():
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))
    seen = []

    def first() -> None:
        with run_as_written():
            first_is_in.set()
            second_is_in.wait(60)
        first_is_out.set()

    def second() -> None:
        first_is_in.wait(60)
        with run_as_written():
            second_is_in.set()
            first_is_out.wait(60)
            seen.append(stance())

    before = stance()
    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == ["force_eager"] and stance() == before == "default"

"""The campaign for a GPU, without one: what it would run, how stages end, what its page says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from benchmarks.accuracy.arguments import AccuracyArguments
from benchmarks.accuracy.portable import LIMIT, PortableArguments
from benchmarks.gpu_campaign import campaign, page, requirements
from benchmarks.gpu_campaign.stages import Stage, stages
from benchmarks.step_cost.sweep import CostArguments

OPTIONS = {
    "benchmarks.step_cost.sweep": CostArguments,
    "benchmarks.step_cost.launches": CostArguments,
    "benchmarks.accuracy.portable": PortableArguments,
    "benchmarks.accuracy.sweep": AccuracyArguments,
}


def planned(rehearsal: bool) -> list[Stage]:
    return stages(Path("results"), Path("cache"), Path("packed"), rehearsal, with_data=not rehearsal)


@pytest.mark.parametrize("rehearsal", [True, False])
def test_scripts_take_the_options_they_are_given(rehearsal):
    """By the parsers of the scripts themselves: what a card would run is read here, though it cannot run."""
    read = 0
    for stage in planned(rehearsal):
        module, options = stage.command[2], [o for o in stage.command[3:] if o != "unpack"]
        if module in OPTIONS:
            parser = HfArgumentParser(OPTIONS[module], allow_abbrev=False)
            (found,) = parser.parse_args_into_dataclasses(options)
            read += 1
            assert Path(found.results).parts[0] == "results" or module.endswith("portable")
    assert read >= 3
    assert planned(rehearsal)[0].command[2] == "pytest"


def test_stages_begin_within_the_time_of_the_campaign():
    """All before the last one, which takes what is left, at their limits: half of them end far earlier."""
    found = planned(False)
    assert found[-1].open_ended and found[-1].name == "training"
    assert sum(stage.seconds for stage in found[:-1]) < campaign.ENOUGH
    assert campaign.ENOUGH < 9 * 60


def test_how_stages_end(tmp_path):
    def python(code: str, **how) -> dict:
        return campaign.run(Stage("one", [sys.executable, "-S", "-c", code], **how), left=600)

    assert python("print('fine')", seconds=60)["state"] == "done"
    failed = python("raise SystemExit('no such card')", seconds=60)
    assert failed["state"] == "failed" and "no such card" in failed["output"]
    # A child that holds the pipe and would live on must go too.
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, pathlib, time\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    assert python(code, seconds=3)["state"] == "out of time"
    with pytest.raises(ProcessLookupError):
        for _ in range(1000):  # until the system has taken note
            os.kill(int(pid.read_text()), 0)
            os.sched_yield()
            os.system("sleep 0.01")
    assert python("import time; time.sleep(600)", seconds=1, open_ended=True)["state"] == "as much as fitted"


def test_what_is_missing_is_said_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(requirements.torch.cuda, "is_available", lambda: False)
    assert campaign.main(["--file", str(tmp_path / "none"), "--results", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "cannot start: torch sees no CUDA device; run on a machine with one, or rehearse with --rehearsal." in said
    assert f"note: {tmp_path / 'none'} is not there: no model is trained. `make gpu-data` writes it" in said
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(requirements.importlib.util, "find_spec", lambda name: None)
    fatal, lost = requirements.missing("cpu", tmp_path, needs_data=False)
    assert "timm is not installed: needed." in fatal
    assert lost == ["datasets is not installed: tests of the example script are skipped."]


def test_page_without_and_with_results(tmp_path):
    assert page.NOT_YET in page.page(tmp_path)
    report = {
        "machine": {"card": "Card", "memory": 2**34, "cores": 4, "versions": {"torch": "2", "timm": None}},
        "missing": ["no data"],
        "stages": {"tests": {"state": "done", "seconds": 3.2}},
    }
    cost = {
        "name": "m-batch2-processes1-cuda",
        "arguments": {"model": "m", "batch_size": 2, "bits": 4, "device": "cuda", "backend": "compiled"},
        "outcome": {
            "seconds_of_qat": 0.01,
            "times": {
                "float": {"ratio": 0.8, "lower_quartile": 0.7, "upper_quartile": 0.9},
                "full": {"ratio": 2.0, "lower_quartile": 1.9, "upper_quartile": 2.1},
            },
            "bytes": {"float": 2**30, "full": 2**31},
        },
    }
    count = {"name": "launches-m-batch2-cuda", "outcome": {"full": {"launches": 70.0, "waits": 1.0}}}
    files = {"campaign": report, f"step_cost/{cost['name']}": cost, f"step_cost/{count['name']}": count}
    for seed in (0, 1):
        for method, test in (("qat", 0.5), ("echo", 0.52 + 0.01 * seed)):
            a = {"method": method, "seed": seed, "task": "t", "bits": 4, "lr": 1e-3, "steps": 5, "batch_size": 8}
            a["saq"] = None if method == "qat" else {"rho": 0.1}
            run = {"name": f"{method}{seed}", "arguments": a, "outcome": {"test": test}}
            files[f"accuracy/{method}{seed}"] = run
    for name, content in files.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad"><failure/></testcase><testcase classname="a" name="idle"><skipped/>'
        "</testcase></testsuite></testsuites>"
    )
    found = page.page(tmp_path)
    assert "Machine: Card, 16 GiB, 4 cores; torch 2." in found
    assert "1 of 3 tests that need a card passed, 1 failed, 1 skipped." in found and "- failed: `a::bad`" in found
    assert "| full | 2.000 [1.900, 2.100] | 2.50 | 2.00 | 70 | 1.0 |" in found
    assert "| echo | 2 | 0.001 | 0.1 | 52.50 | +2.50 [-3.85, +8.85] |" in found  # t(1 degree) = 12.706, stdev 0.707
    assert "| tests | done | 3 |" in found


@pytest.mark.slow
def test_rehearsal(tmp_path, capsys):
    """Every stage in earnest, at the smallest sizes."""
    results = tmp_path / "results"
    given = ["--rehearsal", "--results", str(results), "--cache", str(tmp_path / "cache"), "--seconds", "3600"]
    assert campaign.main(given) == 0, capsys.readouterr().out
    assert len(list((results / "accuracy").iterdir())) == 2
    found = page.page(results)
    assert "no card: a rehearsal on CPU" in found and "| echo 2 |" in found and "| case 3 | 1 |" in found
    assert LIMIT == 40 * 10**6

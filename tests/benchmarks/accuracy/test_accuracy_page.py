"""The page on accuracy, from records by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.accuracy import page
from benchmarks.accuracy.methods import METHODS, QAT, SAQ
from benchmarks.accuracy.settings import Setting


def record(method, seed, test, bits=2, count=15, task="digits", float_model=None, float_test=0.9):
    saq = METHODS[method].saq
    return {
        "name": f"{task}-w{bits}-n{count}-{method}-{seed}",
        "arguments": {
            "kind": "run",
            "task": task,
            "bits": bits,
            "method": method,
            "seed": seed,
            "saq": None if saq is None else {"rho": 0.2, **saq},
            "images_per_class": count,
            "batch_size": 30,
            "optimizer": "adamw",
            "weight_decay": 0.05,
            "device": "cpu",
        },
        "outcome": {
            "test": test,
            "float_test": float_test,
            "float_model": float_model or f"of seed {seed}",
            "training_images": 10 * (count or 102),
            "cpu_seconds": 30.0,
        },
        "versions": {"torch": "1"},
    }


def test_the_page_by_hand(tmp_path):
    """QAT 80, 81, 82; SAQ one point above it each time; case 2 as good as SAQ in the mean; more images, no gain."""
    results = tmp_path / "runs"
    results.mkdir()
    for seed in range(3):
        base = 0.80 + seed / 100
        rows = [record(QAT, seed, base), record(SAQ, seed, base + 0.01 + (seed - 1) / 1000)]
        rows += [record("case 2", seed, base + 0.01 - (seed - 1) / 1000)]
        rows += [record(QAT, seed, base, count=60), record(SAQ, seed, base, count=60)]
        for r in rows:
            (results / f"{r['name']}.json".replace(" ", "")).write_text(json.dumps(r))
    page.write_page(results, tmp_path / "results.md")
    text = (tmp_path / "results.md").read_text()
    # Differences 0.9, 1.0, 1.1: 4.3027 * 0.1 / sqrt(3) = 0.248.
    assert "| digits, tiny ViT, W2A2 | 3 | **+1.00 [+0.75, +1.25]** | - | +0.00 [-0.50, +0.50] | - |" in text
    assert "| qat | 1.00 | - | 3 | 81.00 ± 1.00 | - |" in text
    assert "higher in mean in 1 of 1 settings, with an interval above zero in 1 and below zero in 0" in text
    assert "SAQ against case 1: no comparison was run." in text
    assert "| digits, tiny ViT, W2A2 | 150 | 90.00 | 81.00 | 82.00 | 3 | **+1.00 [+0.75, +1.25]** |" in text
    assert "| digits, tiny ViT, W2A2 | 600 | 90.00 | 81.00 | 81.00 | 3 | +0.00 [+0.00, +0.00] |" in text
    assert "15 runs; training them took 8 minutes" in text


def test_what_cheaper_ways_keep(tmp_path):
    """Full gains 2, 3, 4 points on seeds 0 to 2; balanced half of that on seeds 1 and 2; another task has no gain."""
    results = tmp_path / "runs"
    for seed in range(3):
        write(results, record(QAT, seed, 0.5, 4, None, "flowers"))
        write(results, record(SAQ, seed, 0.52 + seed / 100, 4, None, "flowers"))
        if seed:
            write(results, record("balanced", seed, 0.51 + seed / 200, 4, None, "flowers"))
        for method, gain in ((QAT, 0.0), (SAQ, 0.003), ("balanced", 0.003 * (-1) ** seed)):
            write(results, record(method, seed, 0.5 + gain))
            write(results, record(method, seed, 0.5 + gain, bits=3, task="flowers", count=None))
    page.write_page(results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    # On the seeds that both have: 3.5 and 1.75; half widths 12.7062 / 2 and a half of that.
    name = "Flowers-102, MobileNetV2"
    own, full = "+1.75 [-1.43, +4.93]", "+3.50 [-2.85, +9.85]"
    assert f"| balanced | 1.12 | **{name}, W4A4** | 2 | {own} | {full} | 50% |" in text
    full = "**+0.30 [+0.30, +0.30]**"  # less than a point: no share of it is given
    assert f"| balanced | 1.12 | digits, tiny ViT, W2A2 | 3 | +0.10 [-0.76, +0.96] | {full} | - |" in text
    # Squared errors 0.0625 (1 degree of freedom) and 0.04 (2): 2.232 degrees, t = 3.89, 0.925 +- 3.89 * 0.160.
    assert "| balanced | 1.12 | **average over 2 settings** |  | **+0.92 [+0.30, +1.55]** | +1.90 [" in text
    assert text.count("average over 2 settings") == 1
    # 0.3 on each of three seeds and 2, 3, 4 on others: the second alone has an error.
    assert "| average over all settings |  | **+1.20 [+0.37, +2.03]** (3 rows) |" in text
    assert "| average over settings that no preset was chosen on |  | **+1.65 [+0.41, +2.89]** (2 rows) |" in text


def write(results: Path, *records) -> None:
    results.mkdir(exist_ok=True)
    for r in records:
        (results / f"{r['name']}.json".replace(" ", "")).write_text(json.dumps(r))


def test_only_runs_from_one_float_model_are_compared(tmp_path):
    """Seeds 0 and 1 are of one machine, 2 and 3 of another; then a run of seed 2 from the first one's model."""
    models = {0: ("a", 0.7), 1: ("a", 0.7), 2: ("b", 0.8), 3: ("b", 0.8)}
    for seed, (name, test) in models.items():
        for method in (QAT, SAQ):
            write(tmp_path / "runs", record(method, seed, 0.6, 4, None, "flowers", name, test))
    page.write_page(tmp_path / "runs", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "2 float models, each trained on another machine and with seeds of its own: 70.00 %, 80.00 %." in text
    write(tmp_path / "runs", record(SAQ, 2, 0.6, 4, None, "flowers", "a", 0.7))
    with pytest.raises(
        ValueError, match="seed 2: 'case 3' starts from float model a, 'qat' from b; expected the same"
    ):
        page.write_page(tmp_path / "runs", tmp_path / "page.md")


def test_a_page_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="found 0 results and none of plain QAT"):
        page.write_page(tmp_path, tmp_path / "page.md")


def test_times_of_several_commits_are_not_compared():
    """Another machine can train the same float model: it then adds runs to a seed, in times of its own."""
    runs = {QAT: {}, SAQ: {}}
    for seed, commit, seconds in ((0, "of the first", 45.0), (1, "of the second", 1.0)):
        runs[QAT][seed] = {**record(QAT, seed, 0.8), "versions": {"commit": "of the first"}}
        runs[SAQ][seed] = {**record(SAQ, seed, 0.8), "versions": {"commit": commit}}
        runs[SAQ][seed]["outcome"]["cpu_seconds"] = seconds
    setting = Setting("digits", 2, 15, runs)
    assert setting.time(SAQ) == 45.0 / 30.0
    del runs[SAQ][0]
    assert setting.time(SAQ) is None

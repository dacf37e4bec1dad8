"""The sweep over tasks, bits and methods: a whole tiny run, going on after an interruption, and its page."""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import page
from benchmarks.accuracy import quick as results_quick
from benchmarks.accuracy import sweep as script
from benchmarks.accuracy.methods import METHODS, QAT, SAQ
from benchmarks.accuracy.tasks import TASKS
from benchmarks.shared.images import Images, center_crop, crop_and_mirror, draw_per_class, shuffled_batches
from benchmarks.shared.paired import difference
from benchmarks.shared.runs import Runs
from hf_saq.sharpness.schedules.schedule import PRESETS


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The task of digits, three steps long, with one candidate for the learning rate and two radii."""
    task = dataclasses.replace(
        TASKS["digits"], steps=3, learning_rates=(4e-3,), radii=(0.1, 0.3), trial_seeds=(100,), images_per_class=3
    )
    monkeypatch.setitem(TASKS, "digits", task)
    return [
        *("--tasks", "digits", "--bits", "2", "--seeds", "0", "1"),
        *("--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")),
    ]


def stored(tmp_path):
    return {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}


def test_a_sweep_and_what_a_restart_skips(tiny, tmp_path, monkeypatch):
    tiny += ["--methods", QAT, SAQ, "qat, twice the steps", "balanced", "case 3, distilled"]
    script.main(tiny)
    records = stored(tmp_path)
    names = {f"digits-w2-{m.replace(', ', '-').replace(' ', '-')}" for m in tiny[tiny.index("--methods") + 1 :]}
    trials = {"digits-w2-qat-trial-lr0.004-seed100"}
    trials |= {f"digits-w2-case-3-trial-lr0.004-rho{rho}-seed100" for rho in ("0.1", "0.3")}
    assert set(records) == {f"{name}-seed{seed}" for name in names for seed in (0, 1)} | trials
    outcomes = {m: records[f"digits-w2-{m}-seed0"]["outcome"] for m in ("qat", "case-3", "qat-twice-the-steps")}
    assert len({o["float_model"] for o in outcomes.values()}) == 1
    assert [o["steps"] for o in outcomes.values()] == [3, 3, 6]
    assert [o["perturbed_share"] for o in outcomes.values()] == [0, 1, 0]
    radii = {records[f"digits-w2-{m}-seed1"]["arguments"]["saq"]["rho"] for m in ("case-3", "balanced")}
    assert len(radii) == 1 and radii <= {0.1, 0.3}
    assert all("test" not in records[name]["outcome"] for name in trials)
    assert all(0 <= records[name]["outcome"]["test"] <= 1 for name in set(records) - trials)

    trained = []
    original = script.train_one
    monkeypatch.setattr(script, "train_one", lambda *a: trained.append(a) or original(*a))
    script.main(tiny)
    assert not trained
    (tmp_path / "results" / "digits-w2-case-3-seed1.json").unlink()
    script.main(tiny)
    assert len(trained) == 1
    again, before = stored(tmp_path)["digits-w2-case-3-seed1"]["outcome"], records["digits-w2-case-3-seed1"]["outcome"]
    assert {**again, "cpu_seconds": 0} == {**before, "cpu_seconds": 0}

    # Other numbers of images are other runs, with the settings chosen for the task's own.
    script.main([*tiny, "--images_per_class", "2", "4", "--methods", QAT, SAQ])
    found = stored(tmp_path)
    assert {f"digits-w2-n{n}-{m}-seed{s}" for n in (2, 4) for m in ("qat", "case-3") for s in (0, 1)} == set(
        found
    ) - set(records)
    assert (
        found["digits-w2-n4-case-3-seed0"]["arguments"]["saq"] == records["digits-w2-case-3-seed0"]["arguments"]["saq"]
    )
    assert found["digits-w2-n4-case-3-seed0"]["outcome"]["training_images"] == 40

    document = tmp_path / "docs" / "page.md"
    page.write_page(tmp_path / "results", document)
    text = document.read_text()
    assert "| digits, tiny ViT, W2A2 | 20 |" in text and "</svg>" in (document.parent / "page_images.svg").read_text()


def test_repeating_stored_runs(tiny, tmp_path, capsys):
    """The same numbers on the same machine; stored ones that they cannot come near are noticed."""
    script.main([*tiny, "--methods", QAT, SAQ])
    quick = ["--seeds", "0", "1", "--processes", "1", "--results", str(tmp_path / "results")]
    assert results_quick.main(quick) == 0
    assert capsys.readouterr().out.count("2 of 2 equal   ok") == 2
    for path in (tmp_path / "results").glob("digits-w2-case-3-seed*.json"):
        moved = json.loads(path.read_text())
        moved["outcome"]["test"] += 0.5
        path.write_text(json.dumps(moved))
    assert results_quick.main(quick) == 1
    with pytest.raises(ValueError, match=r"no stored runs of \{'qat': \[5\], 'case 3': \[5\]\}"):
        results_quick.main([*quick, "--seeds", "1", "5"])
    with pytest.raises(ValueError, match="no stored runs of digits at 4 bits"):
        results_quick.main([*quick, "--bits", "4"])


def test_hopeless_values_are_not_tried(tiny, tmp_path, monkeypatch):
    """Far below the best so far: the next larger radius is left out."""
    task = dataclasses.replace(TASKS["digits"], radii=(0.1, 0.2, 0.3, 0.4))
    monkeypatch.setitem(TASKS, "digits", task)
    scores = {None: 0.5, 0.1: 0.6, 0.2: 0.56, 0.3: 0.5}
    monkeypatch.setattr(
        script,
        "train_one",
        lambda a, paths: {"test": 0.5} if a["kind"] == "run" else {"validation": scores[(a["saq"] or {}).get("rho")]},
    )
    script.main([*tiny, "--methods", QAT, SAQ])
    records = stored(tmp_path).values()
    tried = {
        r["arguments"]["saq"]["rho"] for r in records if r["arguments"]["kind"] == "trial" and r["arguments"]["saq"]
    }
    assert tried == {0.1, 0.2, 0.3}


def test_the_best_radius_on_validation_is_taken(tiny, tmp_path, monkeypatch):
    """The smaller of equals; each case has its own, and `balanced` that of case 3."""
    scores = {(QAT, None): 0.5, (SAQ, 0.1): 0.6, (SAQ, 0.3): 0.6, ("case 2", 0.1): 0.2, ("case 2", 0.3): 0.4}

    def train_one(arguments, paths):
        rho = arguments["saq"]["rho"] if arguments["saq"] else None
        if arguments["kind"] == "run":
            return {"test": 0.5}
        return {"validation": scores[arguments["method"], rho]}

    monkeypatch.setattr(script, "train_one", train_one)
    script.main([*tiny, "--methods", QAT, SAQ, "case 2", "balanced"])
    chosen = {r["arguments"]["method"]: r["arguments"]["saq"] for n, r in stored(tmp_path).items() if "trial" not in n}
    assert chosen[QAT] is None and chosen[SAQ] == {"rho": 0.1} and chosen["case 2"] == {"rho": 0.3, "case": 2}
    assert chosen["balanced"] == {"rho": 0.1, **PRESETS["balanced"]}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "sam"], r"--methods \['sam'\]: unknown; expected some of \['qat'"),
        (["--tasks", "imagenet"], r"--tasks \['imagenet'\]: unknown"),
        (["--seeds", "100"], r"--seeds \[100\]: expected none of \[100\]"),
        (["--processes", "0"], "--processes 0: expected at least one"),
        (["--bits", "7"], r"--bits \[7\]: none of the tasks"),
    ],
)
def test_mistakes(tiny, extra, message):
    with pytest.raises(ValueError, match=message):
        script.main([*tiny, *extra])


def test_tasks_without_their_data_are_skipped(tiny, tmp_path, capsys):
    tiny[tiny.index("digits")] = "flowers"
    script.main([*tiny, "--bits", "3", "--flowers", str(tmp_path / "nowhere"), "--mobilenet", str(tmp_path)])
    assert f"flowers: skipped, {tmp_path / 'nowhere'} is not there; name another place with --flowers." in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "results").exists()


def test_two_studies_that_want_the_same_run(tmp_path):
    """Both get it, and it is trained once."""
    runs, trained = Runs(tmp_path, "python some.py"), []

    def train():
        trained.append(1)
        time.sleep(0.2)
        return {"test": 0.5}

    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(runs.once, "one", {"a": 1}, train) for _ in range(4)]
        assert [f.result()["outcome"] for f in found] == [{"test": 0.5}] * 4
    assert len(trained) == 1


def test_every_task_builds_the_model_that_it_quantizes():
    """Architectures of the tasks, without their data: all layers that have weights get quantizers."""
    for name, task in TASKS.items():
        assert sum(p.numel() for p in task.build().parameters()) > 10_000, name
        assert task.trial_seeds and not set(task.trial_seeds) & set(range(20)), name


def test_passes_of_the_methods():
    """Two passes cost twice, whether as SAQ or as twice the steps; the preset climbs on an eighth of the batch."""
    assert [METHODS[m].passes for m in (QAT, SAQ, "qat, twice the steps", "balanced")] == [1, 2, 2, 1.125]


# Images --------------------------------------------------------------------------------------------------------------


def test_images_of_each_class():
    labels = torch.tensor([0, 1, 1, 2, 0, 1, 0, 0])
    images = Images(torch.arange(8).view(8, 1, 1, 1), labels)
    few, more = draw_per_class(images, 2, 5), draw_per_class(images, 3, 5)
    assert few.labels.bincount().tolist() == [2, 2, 1] and more.labels.bincount().tolist() == [3, 3, 1]
    kept = [set(part.pixels.flatten().tolist()) for part in (few, more)]
    assert kept[0] <= kept[1] and all(
        labels[i] == label for i, label in zip(few.pixels.flatten(), few.labels, strict=True)
    )
    assert any(set(draw_per_class(images, 2, s).pixels.flatten().tolist()) != kept[0] for s in range(10))


def test_an_epoch_has_every_image_once():
    images = Images(torch.arange(7).view(7, 1, 1, 1), torch.arange(7))
    batches = shuffled_batches(images, 3, torch.Generator().manual_seed(0))
    epochs = [[next(batches) for _ in range(3)] for _ in range(2)]
    seen = [torch.cat([b.labels for b in epoch]) for epoch in epochs]
    assert [len(b) for b in epochs[0]] == [3, 3, 1]
    assert all(s.sort().values.tolist() == list(range(7)) for s in seen) and not torch.equal(*seen)


def test_cropped_and_mirrored_images_are_parts_of_the_images():
    """Every cut is found, as it is or mirrored, at some place of its image; both and all places come up."""
    pixels = torch.arange(3 * 25).view(3, 1, 5, 5)
    generator = torch.Generator().manual_seed(0)
    places = set()
    for _ in range(60):
        cut = crop_and_mirror(pixels, 4, generator)
        for image, part in zip(pixels, cut, strict=True):
            fits = [
                (y, x, flip)
                for y in (0, 1)
                for x in (0, 1)
                for flip in (False, True)
                if torch.equal(part.flip(-1) if flip else part, image[:, y : y + 4, x : x + 4])
            ]
            assert len(fits) == 1
            places.add(fits[0])
    assert len(places) == 8
    assert torch.equal(center_crop(pixels, 3), pixels[..., 1:4, 1:4])


# The page ------------------------------------------------------------------------------------------------------------


def test_differences_are_paired():
    """Seeds 0, 1, 2 are shared; differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.3027."""
    found = difference({0: 81.0, 1: 83.0, 2: 85.0, 9: 0.0}, {0: 80.0, 1: 81.0, 2: 82.0, 7: 0.0})
    assert found is not None and found.values == [1.0, 2.0, 3.0] and found.sign == 0
    assert str(found) == "+2.00 [-0.48, +4.48]"
    assert difference({0: 1.0, 1: 1.1, 2: 1.0}, {0: 0.0, 1: 0.0, 2: 0.0}).sign == 1
    assert difference({0: 0.0, 1: 0.0}, {0: 1.0, 1: 1.0}).sign == -1
    assert difference({0: 1.0}, {1: 1.0}) is None


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


def test_a_sweep_does_not_mix_float_models(tiny, tmp_path, monkeypatch):
    """A run that was stored elsewhere keeps others of its seed from starting here; other seeds may."""
    monkeypatch.setitem(TASKS, "digits", dataclasses.replace(TASKS["digits"], float_per_seed=False))
    script.main([*tiny, "--methods", QAT])
    path = tmp_path / "results" / "digits-w2-qat-seed1.json"
    moved = json.loads(path.read_text())
    moved["outcome"]["float_model"] = "another"
    path.write_text(json.dumps(moved))
    with pytest.raises(ValueError, match=r"digits-w2-qat-seed1: .* float model another, found .* other than \[0, 1\]"):
        script.main([*tiny, "--methods", QAT, SAQ])
    with pytest.raises(ValueError, match="digits-w2-qat-seed1: this run is stored"):
        script.main([*tiny, "--methods", SAQ])  # other methods alone are compared with it as well
    script.main([*tiny, "--methods", QAT])  # nothing to train, nothing to mix
    script.main([*tiny, "--methods", QAT, SAQ, "--seeds", "2"])
    assert "digits-w2-case-3-seed2" in stored(tmp_path) and "digits-w2-case-3-seed1" not in stored(tmp_path)


def test_a_page_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="found 0 results and none of plain QAT"):
        page.write_page(tmp_path, tmp_path / "page.md")

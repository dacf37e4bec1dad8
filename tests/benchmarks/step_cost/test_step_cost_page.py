"""The page on costs, from records by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks.step_cost import page as cost_page


def test_the_page_by_hand(tmp_path):
    """Records of two models; 130 bytes against 100 are 0.75 of 40 bytes of weights."""

    def record(model, ratio, batch=8, processes=1):
        ways = {"qat": 1.0, "qat again": 1.01, "full": ratio}
        outcome = {
            "times": {w: {"ratio": t, "lower_quartile": t - 0.1, "upper_quartile": t + 0.1} for w, t in ways.items()},
            "bytes": {w: 130 if w == "full" else 100 for w in ways},
            "quantized_weight_bytes": 40,
            "seconds_of_qat": 0.05,
            "threads": 1,
            "allocator": {},
            "device_name": "cpu",
        }
        arguments = {"model": model, "batch_size": batch, "processes": processes, "bits": 4, "rounds": 3}
        arguments |= {"clock": "process", "device": "cpu"}
        return {"arguments": arguments, "outcome": outcome, "versions": {"commit": "abc"}}

    (tmp_path / "step_cost").mkdir()
    for number, r in enumerate([record("resnet18", 1.8), record("vit-small", 1.9), record("vit-small", 2.1, 2, 2)]):
        (tmp_path / "step_cost" / f"{number}.json").write_text(json.dumps(r))
    layers = {
        "linear": {"ratio_to_float": {"eager": 1.126, "torchao": 1.2}},
        "conv": {"ratio_to_float": {"eager": 1.1}},
    }
    setting = {"bits": 4, "batch": 8, "threads": 2, "device": "cpu", "clock": "wall", "repetitions": 9}
    kept = {"MALLOC_MMAP_THRESHOLD_": "1", "MALLOC_TRIM_THRESHOLD_": "2"}
    fake = {"setting": {**setting, "allocator": kept, "versions": {"torch": "2"}}, "layers": layers}
    faults = {"float": 0, "eager": 7.0, "compiled": 5}
    ratios = {"eager": 1.153, "compiled": 1.1, "compiled, inputs shared": 1.07, "eager, input scale kept": 1.06}
    fake["training_step"] = {"vit": {"seconds": {"float": 2.5}, "ratio_to_float": ratios, "page_faults": faults}}
    fake["kept_for_backward"] = {"vit": {"ratio": 1.184}}
    (tmp_path / "fake_quant.json").write_text(json.dumps(fake))
    fake["training_step"]["vit"] |= {"seconds": {"float": 0.5}, "ratio_to_float": {"eager": 1.4, "compiled": 1.3}}
    del fake["setting"]["allocator"]["MALLOC_TRIM_THRESHOLD_"]  # without it, memory is handed back
    fake["setting"]["versions"]["torchao"] = None
    (tmp_path / "fake_quant_other.json").write_text(json.dumps({**fake, "layers": {}}))
    top1 = {"without": [60.0, 62.0, 61.0], "with": [61.0, 62.5, 61.0]}
    option = {"fields": {"share_inputs": True}, "first_last_bits": 8, "seeds": [0, 1, 2]}
    option["accuracies"] = [{"setting": "vit:4", "method": "qat", "top1": top1}]
    (tmp_path / "options").mkdir()
    (tmp_path / "options" / "share_inputs.json").write_text(json.dumps(option))
    cost_page.write_page(tmp_path, tmp_path / "docs" / "cost.md")
    text = (tmp_path / "docs" / "cost.md").read_text()
    rows = [
        "| vit | kept | 2500 | 1.15 | 1.10 | 1.07 | 1.06 | - | 1.18 | 0, 7, 5 |",
        "| vit | handed back | 500 | 1.40 | 1.30 | - | - | - | 1.18 |",
    ]
    assert "\n".join(rows) in text and "1 thread(s) each, cpu, freed memory handed back," in text
    assert "| linear | 1.13 | 1.20 |\n| conv | 1.10 | - |" in text
    rows = [
        "| vit-small | 8 | 1 | 1.90 | - | - | - | - | 1.01 | +0.75 |",
        "| vit-small | 2 | 2 | 2.10 | - | - | - | - | 1.01 | +0.75 |",
    ]
    assert "\n".join([*rows, "| resnet18 | 8 | 1 | 1.80 | - | - | - | - | 1.01 | +0.75 |"]) in text
    assert "### vit-small, batches of 2, 2 processes" in text and "| full | 2.10 | 2.00 to 2.20 | +0.75 |" in text
    # Student's quantile for two degrees of freedom is 4.303, the standard error 0.5 / sqrt(3).
    shown = "| `share_inputs=True` | vit, W4 | 8 bits | qat | 3 | 61.00 | 61.50 | +0.50 [-0.74, +1.74] |"
    assert shown in text and "| all of these | 8 bits |  | 3 |  |  | +0.50 [-0.74, +1.74] |" in text
    with pytest.raises(ValueError, match="found neither fake_quant.json nor"):
        cost_page.write_page(tmp_path / "docs", tmp_path / "page.md")

"""Bad values are refused with the field, what was found and what was expected; good ones survive JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import fields

import pytest
from tiny_models import vit
from transformers import AutoConfig, HfArgumentParser, TrainingArguments

from hf_saq import SAQConfig, SAQQuantizationConfig
from hf_saq.config import FORMAT_VERSION
from hf_saq.sharpness.schedules import PerturbationSchedule

NAN, INF = float("nan"), float("inf")
BITS = "expected an integer from 2 to 8, or None for float."

BAD_QUANTIZATION = [
    *(
        pytest.param(name, bits, f"SAQQuantizationConfig.{name}={bits!r}; {BITS}", id=f"{name}={bits}")
        for name in ("weight_bits", "activation_bits", "first_last_bits")
        for bits in (1, 9, 0, -4, 4.0, True, "4")
    ),
    ("quantizer", "sawb", "SAQQuantizationConfig.quantizer='sawb' is unknown; expected one of ['dorefa',"),
    ("quantizer", ["lsq"], "SAQQuantizationConfig.quantizer=['lsq']; expected the name of a quantizer."),
    ("weight_granularity", "row", "weight_granularity='row'; expected one of ['tensor', 'channel']."),
    ("activation_mode", "both", "activation_mode='both'; expected one of ['auto', 'signed', 'unsigned', 'affine']."),
    (
        "activation_mode",
        "affine",
        "activation_mode='affine' is not possible with quantizer='lsq'; expected one of ['auto', 'signed', "
        "'unsigned'], or a quantizer that can do it: ['lsq_plus'].",
    ),
    ("scale_init", "max", "SAQQuantizationConfig.scale_init='max'; expected one of ['mse', 'mean']."),
    ("quantize_attention", 1, "SAQQuantizationConfig.quantize_attention=1; expected True or False."),
    ("share_inputs", None, "SAQQuantizationConfig.share_inputs=None; expected True or False."),
    ("learn_input_scale", 0, "SAQQuantizationConfig.learn_input_scale=0; expected True or False."),
    ("shared_input_modules", [["a"]], "shared_input_modules=[['a']]; expected lists of at least two names of layers"),
    ("shared_input_modules", ["a", "b"], "shared_input_modules=['a', 'b']; expected lists of at least two names of"),
    ("shared_input_modules", [["a", "b"], ["b", "c"]], "shared_input_modules: ['b'] more than once; expected lists"),
    ("shared_input_modules", [["a", "b"]], "shared_input_modules was given with share_inputs=False; set share_in"),
    ("storage", "int4", "SAQQuantizationConfig.storage='int4'; expected one of ['float', 'packed']."),
    ("quant_method", "awq", "SAQQuantizationConfig.quant_method='awq'; expected one of ['saq']."),
    ("format_version", 0, "SAQQuantizationConfig.format_version=0; expected an integer >= 1."),
    ("format_version", "1", "SAQQuantizationConfig.format_version='1'; expected an integer >= 1."),
    ("format_version", True, "SAQQuantizationConfig.format_version=True; expected an integer >= 1."),
    ("modules_to_not_convert", "classifier", "modules_to_not_convert='classifier'; expected a list of module names"),
    ("modules_to_not_convert", 3, "modules_to_not_convert=3; expected a list of module names, or None."),
    ("modules_to_not_convert", [3], "modules_to_not_convert=[3]; expected a list of module names, or None."),
    ("first_last_modules", "classifier", "first_last_modules='classifier'; expected a list of module names, or None."),
    ("modules_found_idle", [3], "modules_found_idle=[3]; expected a list of module names, or None."),
    ("overrides", [("a", 2)], "SAQQuantizationConfig.overrides=[('a', 2)]; expected a dict of name pattern -> fields"),
    ("overrides", {1: {"weight_bits": 2}}, "overrides={1: {'weight_bits': 2}}; expected a dict of name pattern"),
    ("overrides", {"a": 2}, "SAQQuantizationConfig.overrides['a']=2; expected a dict with some of ['weight_bits',"),
    ("overrides", {"a": {}}, "SAQQuantizationConfig.overrides['a']={}; expected a dict with some of ['weight_bits',"),
    ("overrides", {"a": {"bits": 2}}, "overrides['a'] has unknown fields ['bits']; expected some of ['weight_bits',"),
    ("overrides", {"a": {"storage": "packed"}}, "overrides['a'] has unknown fields ['storage']; expected some of"),
    ("overrides", {"a": {"weight_bits": 1}}, f"SAQQuantizationConfig.overrides['a'].weight_bits=1; {BITS}"),
    (
        "overrides",
        {"a": {"quantizer": "x"}},
        "SAQQuantizationConfig.overrides['a'].quantizer='x' is unknown;",
    ),
    ("overrides", {"a": {"weight_granularity": "x"}}, "overrides['a'].weight_granularity='x'; expected one of"),
    (
        "overrides",
        {"a": {"quantizer": "pact", "activation_mode": "affine"}},
        "overrides['a'].activation_mode='affine' is not possible with quantizer='pact'; expected one of",
    ),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_QUANTIZATION)
def test_bad_quantization_value(name: str, value, message: str):
    with pytest.raises(ValueError) as error:
        SAQQuantizationConfig(**{name: value})
    assert message in str(error.value)


BAD_SAQ = [
    *(
        ("rho", value, f"SAQConfig.rho={value!r}; expected a finite number >= 0, or None for the default.")
        for value in (-0.1, NAN, INF, "0.1", True)
    ),
    *(("case", value, f"SAQConfig.case={value!r}; expected one of [None, 1, 2, 3].") for value in (0, 4, "3", True)),
    *(("eta", value, f"SAQConfig.eta={value!r}; expected a finite number >= 0.") for value in (-1, NAN, INF, None)),
    ("adaptive", "yes", "SAQConfig.adaptive='yes'; expected True or False."),
    *(
        ("perturb", value, f"SAQConfig.perturb={value!r}; expected one or more of ['weight', 'scale', 'norm', 'bias'")
        for value in ([], ["weights"], ["weight", 1], [["weight"]], None, 3)
    ),
    *(
        ("interval", value, f"SAQConfig.interval={value!r}; expected an integer >= 1.")
        for value in (0, -1, 1.5, True, "2")
    ),
    *(
        ("start", value, f"SAQConfig.start={value!r}; expected a fraction of training from 0 to 1.")
        for value in (-0.1, 1.1, NAN, "0", None)
    ),
    *(
        ("ascent_fraction", value, f"SAQConfig.ascent_fraction={value!r}; expected a share of a batch, > 0 and <= 1.")
        for value in (0, 0.0, -0.5, 1.5, NAN, True, "1")
    ),
    *(
        ("ascent_depth", value, f"SAQConfig.ascent_depth={value!r}; expected a share of a model, > 0 and <= 1.")
        for value in (0, 0.0, -0.5, 1.5, NAN, True, "1")
    ),
    *(
        ("reuse", value, f"SAQConfig.reuse={value!r}; expected one of [None, 'stale', 'previous', 'look', 'echo'].")
        for value in ("last", "", True, 1)
    ),
    ("reuse", "stale", "SAQConfig.reuse='stale' with interval=1 would renew at every step what it keeps"),
    *(("trigger", value, f"SAQConfig.trigger={value!r}; expected True or False.") for value in (1, "yes", 0.5)),
    ("reuse", "echo", "SAQConfig.reuse='echo' with interval=1 would never come back to a batch"),
    *(
        ("match_radius", value, f"SAQConfig.match_radius={value!r}; expected True or False.")
        for value in (1, "yes", 0.5)
    ),
    ("log_sharpness", "yes", "SAQConfig.log_sharpness='yes'; expected True, False or None."),
    ("bit_budget", "0.8x ns", "SAQConfig.bit_budget='0.8x ns' is a budget of time, which needs a table"),
    ("bit_budget", "many", "SAQConfig.bit_budget='many'; expected a budget such as '0.8x'"),
    *(
        (
            "norm_batches",
            value,
            f"SAQConfig.norm_batches={value!r}; expected an integer >= 0, or None for the default.",
        )
        for value in (-1, 1.5, True, "8")
    ),
    *(
        ("look_alpha", value, f"SAQConfig.look_alpha={value!r}; expected a finite number >= 0.")
        for value in (-1, NAN, INF, None, "1")
    ),
    (
        "schedule",
        "cheap",
        "SAQConfig.schedule='cheap'; expected one of [None, 'full', 'balanced', 'last_layers', 'free'].",
    ),
    *(
        ("scale_lr_ratio", value, f"SAQConfig.scale_lr_ratio={value!r}; expected a finite number >= 0.")
        for value in (-1, NAN, INF, "1", None)
    ),
    ("sync", "all", "SAQConfig.sync='all'; expected one of ['local', 'global']."),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_SAQ)
def test_bad_saq_value(name: str, value, message: str):
    with pytest.raises(ValueError) as error:
        SAQConfig(**{name: value})
    assert message in str(error.value)


def test_every_field_of_both_is_checked_above_and_has_a_help_text():
    for config, cases in ((SAQQuantizationConfig, BAD_QUANTIZATION), (SAQConfig, BAD_SAQ)):
        tested = {(case.values if hasattr(case, "values") else case)[0] for case in cases}
        assert tested == {f.name for f in fields(config)}
        assert all(f.metadata.get("help") for f in fields(config))


def test_edges_of_the_ranges_are_accepted():
    for bits in (2, 8, None):
        SAQQuantizationConfig(weight_bits=bits, activation_bits=bits, first_last_bits=bits)
    for case in (None, 1, 2, 3):
        SAQConfig(rho=0, case=case, eta=0, interval=1, start=1, scale_lr_ratio=0)
    assert SAQConfig(perturb="weight").perturb == ["weight"]
    assert SAQConfig(perturb=("weight", "scale")).perturb == ["weight", "scale"]


def far_from_the_defaults() -> SAQQuantizationConfig:
    return SAQQuantizationConfig(
        weight_bits=3,
        activation_bits=6,
        quantizer="lsq_plus",
        weight_granularity="channel",
        activation_mode="affine",
        scale_init="mean",
        first_last_bits=None,
        quantize_attention=True,
        share_inputs=True,
        learn_input_scale=False,
        shared_input_modules=[["a.q_proj", "a.k_proj"]],
        modules_to_not_convert=["classifier"],
        first_last_modules=["vit.embeddings"],
        modules_found_idle=["classifier"],
        overrides={"*.q_proj": {"weight_bits": 2}, "*.fc1": {"activation_bits": 5, "quantizer": "lsq_plus"}},
        storage="packed",
    )


def test_config_json_keeps_every_field(tmp_path):
    config = far_from_the_defaults()
    for f in fields(config):
        if f.name not in ("format_version", "quant_method"):
            assert getattr(config, f.name) != getattr(SAQQuantizationConfig(), f.name), f.name
    model_config = vit().config
    model_config.quantization_config = config
    model_config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "saq" and stored["format_version"] == FORMAT_VERSION
    read = AutoConfig.from_pretrained(tmp_path).quantization_config
    for again in (read, json.loads(config.to_json_string()), config.to_dict()):
        assert SAQQuantizationConfig.from_dict(again) == config
        # Equal dicts may differ in their order, and the order decides which override wins.
        assert list(SAQQuantizationConfig.from_dict(again).overrides) == ["*.q_proj", "*.fc1"]


def test_overrides_may_be_written_as_pairs_or_as_a_dict():
    for overrides in ([["*.fc1", {"weight_bits": 2}]], {"*.fc1": {"weight_bits": 2}}):
        assert SAQQuantizationConfig.from_dict({"overrides": overrides}).overrides == {"*.fc1": {"weight_bits": 2}}
    for overrides in ([1], [["*.fc1"]], ["ab"]):
        with pytest.raises(ValueError, match="expected a dict of name pattern -> fields"):
            SAQQuantizationConfig.from_dict({"overrides": overrides})


def test_from_dict_returns_or_applies_keywords_and_checks_them():
    config, unused = SAQQuantizationConfig.from_dict({"weight_bits": 3}, True, activation_bits=2, device="cpu")
    assert (config.weight_bits, config.activation_bits, unused) == (3, 2, {"device": "cpu"})
    with pytest.raises(ValueError, match=r"SAQQuantizationConfig.weight_bits=99; expected an integer from 2 to 8"):
        SAQQuantizationConfig.from_dict({}, weight_bits=99)


def test_unknown_keys_raise():
    with pytest.raises(ValueError, match=r"quantization_config has unknown keys \['group_size'\]; expected some of"):
        SAQQuantizationConfig.from_dict({"weight_bits": 3, "group_size": 8})


def test_a_newer_format_warns_for_float_storage_and_forgets_what_it_cannot_read():
    newer = {**SAQQuantizationConfig(weight_bits=3).to_dict(), "format_version": FORMAT_VERSION + 1, "group_size": 8}
    with pytest.warns(UserWarning, match=r"format_version is 3, .* up to 2; .* Ignored keys: \['group_size'\]"):
        config = SAQQuantizationConfig.from_dict(newer)
    # What would be saved from here on has no more than this version knows.
    assert config == SAQQuantizationConfig(weight_bits=3)
    assert newer["format_version"] == FORMAT_VERSION + 1


def test_a_newer_format_raises_for_packed_storage():
    newer = {**SAQQuantizationConfig(storage="packed").to_dict(), "format_version": FORMAT_VERSION + 1}
    message = r"format_version is 3, but this hf_saq reads up to 2; install a newer one: pip install"
    with pytest.raises(ValueError, match=message):
        SAQQuantizationConfig.from_dict(newer)


def test_replace_is_checked_and_independent():
    config = far_from_the_defaults()
    changed = config.replace(weight_bits=8)
    assert (changed.weight_bits, config.weight_bits) == (8, 3)
    changed.overrides["*.q_proj"]["weight_bits"] = 7
    assert config.overrides["*.q_proj"] == {"weight_bits": 2}
    with pytest.raises(ValueError, match="storage='disk'"):
        config.replace(storage="disk")


def test_the_argument_parser_builds_it_next_to_training_arguments(tmp_path):
    parser = HfArgumentParser((TrainingArguments, SAQConfig))  # type: ignore[arg-type]
    words = (
        f"--output_dir {tmp_path} --rho 0.05 --case 1 --adaptive --perturb weight scale --interval 2 --sync global "
    )
    words += "--reuse stale --ascent_fraction 0.5"
    args, saq = parser.parse_args_into_dataclasses(words.split())
    assert saq == SAQConfig(
        rho=0.05,
        case=1,
        adaptive=True,
        perturb=["weight", "scale"],
        interval=2,
        sync="global",
        reuse="stale",
        ascent_fraction=0.5,
    ) and isinstance(args, TrainingArguments)
    defaults = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])[1]
    assert defaults == SAQConfig()
    from_json = parser.parse_dict({"output_dir": str(tmp_path), **json.loads(json.dumps(saq.to_dict()))})[1]
    assert from_json == saq
    assert parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--trigger"])[1].trigger is True
    free = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--schedule", "free"])[1]
    assert free.perturbation_schedule() == PerturbationSchedule(reuse="echo", interval=2)
    assert parser.parse_dict({"output_dir": str(tmp_path), **free.to_dict()})[1] == free


def test_a_preset_and_a_knob_that_contradict_each_other():
    with pytest.raises(ValueError, match="SAQConfig.schedule='free' means trigger=False, but trigger=True is given"):
        SAQConfig(schedule="free", trigger=True)
    agreeing = SAQConfig(schedule="balanced", ascent_fraction=0.125)
    assert agreeing.perturbation_schedule() == PerturbationSchedule(ascent_fraction=0.125)


def test_what_a_preset_means_is_looked_up_where_it_is_used():
    """Fields stay as they were given, so that setting one later, or replacing it, does what it says."""
    defaults = SAQConfig()
    assert (defaults.schedule, defaults.interval, defaults.ascent_fraction, defaults.reuse) == (None,) * 4
    assert defaults.perturbation_schedule() == PerturbationSchedule(ascent_fraction=0.125)
    assert SAQConfig(interval=2).perturbation_schedule() == PerturbationSchedule(interval=2)
    assert SAQConfig(start=0.5).perturbation_schedule() == PerturbationSchedule(start=0.5, ascent_fraction=0.125)
    defaults.schedule = "full"
    assert defaults.perturbation_schedule() == PerturbationSchedule()
    assert dataclasses.replace(defaults, schedule="free").perturbation_schedule().reuse == "echo"
    defaults.interval = 3
    with pytest.raises(ValueError, match="SAQConfig.schedule='full' means interval=1, but interval=3 is given"):
        defaults.perturbation_schedule()


def test_the_argument_parser_shows_bad_values(tmp_path):
    parser = HfArgumentParser(SAQConfig)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"SAQConfig.rho=-1.0; expected a finite number >= 0"):
        parser.parse_args_into_dataclasses(["--rho", "-1"])

"""Read the arguments of the example script: from the command line, and from a file of arguments before it."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from image_export import CHOICES, NOT_ASKED, check_engine_choice
from image_model import ModelArguments
from transformers import HfArgumentParser, TrainingArguments

from hf_saq import SAQConfig, SAQQuantizationConfig
from hf_saq.data import DataTrainingArguments
from hf_saq.sharpness.schedules import KNOBS
from hf_saq.training import check_distillation, what_is_missing

METHODS = ("qat", "saq")
FLOAT_BITS = 32


@dataclass
class QuantizationArguments:
    """What is compared. Every pair of bits and method starts from the same float model."""

    _argument_group_name = "quantization: what is compared"

    weight_bits: list[int] = field(default_factory=lambda: [4], metadata={"help": "One quantized model for each."})
    activation_bits: list[int] | None = field(
        default=None, metadata={"help": "As many as weight_bits; 32 for float. Default: the same as weight_bits."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["qat", "saq"],
        metadata={"help": "qat: plain quantization-aware training; saq: with the sharpness-aware step."},
    )
    quantizer: str = field(default="lsq", metadata={"help": "Name of the quantizer."})
    weight_granularity: str = field(default="tensor", metadata={"help": "tensor or channel."})
    activation_mode: str = field(default="auto", metadata={"help": "auto, signed, unsigned or affine."})
    scale_init: str = field(default="mse", metadata={"help": "mse or mean."})
    first_last_bits: int = field(default=8, metadata={"help": "Of the first layer and the heads; 0: like the rest."})
    quantize_attention: bool = field(default=False, metadata={"help": "Also the operands of attention products."})
    share_inputs: bool = field(default=False, metadata={"help": "Quantize once what several layers read."})
    learn_input_scale: bool = field(
        default=True, metadata={"help": "Learn the scale of the images, instead of keeping it as calibrated."}
    )
    modules_to_not_convert: list[str] | None = field(default=None, metadata={"help": "Modules to leave in float."})
    quantization_overrides: str | None = field(
        default=None, metadata={"help": 'JSON: pattern -> fields, such as {"*.layers.0.*": {"weight_bits": 8}}.'}
    )
    float_epochs: float = field(
        default=0.0, metadata={"help": "Epochs of float fine-tuning before quantization; --max_steps cut it short."}
    )
    float_learning_rate: float | None = field(default=None, metadata={"help": "Default: learning_rate."})
    distill_alpha: float = field(
        default=0.0,
        metadata={
            "help": "Distillation: weight of the float model's answers in the loss, 0 to 1; the rest is for the "
            "labels. 0: off. One more forward pass for each batch."
        },
    )
    distill_temperature: float = field(
        default=1.0, metadata={"help": "Softens the answers of both models in distillation; 1: as they are."}
    )

    mixup_alpha: float = field(
        default=0.0, metadata={"help": "Mixup (arXiv:1710.09412) of training images, for example 0.2; 0: off."}
    )
    cutmix_alpha: float = field(
        default=0.0, metadata={"help": "CutMix (arXiv:1905.04899), for example 1; with mixup each batch takes one."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "End each training with an exponential moving average of its weights, say 0.999; 0: off."},
    )

    engine: str = field(
        default=NOT_ASKED,
        metadata={
            "help": f"One of {', '.join(CHOICES)}: also export every quantized model, check that the export predicts "
            "the same, and evaluate it there."
        },
    )

    def __post_init__(self) -> None:
        check_engine_choice(self.engine)
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name} {getattr(self, name)}; expected a number from 0 (off) up.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay {self.ema_decay}; expected a number from 0 (off) to below 1.")
        unknown = sorted(set(self.methods) - set(METHODS))
        if unknown or not self.methods:
            raise ValueError(f"--methods {self.methods}; expected some of {list(METHODS)}.")
        if self.activation_bits is not None and len(self.activation_bits) != len(self.weight_bits):
            raise ValueError(
                f"--activation_bits {self.activation_bits}: expected as many as --weight_bits {self.weight_bits}."
            )
        pairs = [*zip(self.weight_bits, self.activation_bits or self.weight_bits, strict=True)]
        for name, given in (("methods", self.methods), ("weight_bits (and --activation_bits)", pairs)):
            if len(set(given)) < len(given):
                raise ValueError(f"--{name} {given}: one of them is there twice, and would take the other's place.")
        check_distillation(self.distill_alpha, self.distill_temperature)
        self.configs()  # a mistake shows before anything is trained

    def configs(self) -> list[SAQQuantizationConfig]:
        """One checked configuration for each pair of bits."""
        return [
            SAQQuantizationConfig(
                weight_bits=None if w == FLOAT_BITS else w,
                activation_bits=None if a == FLOAT_BITS else a,
                quantizer=self.quantizer,
                weight_granularity=self.weight_granularity,  # type: ignore[arg-type]
                activation_mode=self.activation_mode,  # type: ignore[arg-type]
                scale_init=self.scale_init,  # type: ignore[arg-type]
                first_last_bits=self.first_last_bits or None,
                quantize_attention=self.quantize_attention,
                share_inputs=self.share_inputs,
                learn_input_scale=self.learn_input_scale,
                modules_to_not_convert=self.modules_to_not_convert,
                overrides=self._overrides(),
            )
            for w, a in zip(self.weight_bits, self.activation_bits or self.weight_bits, strict=True)
        ]

    def _overrides(self) -> dict[str, Any]:
        try:
            return json.loads(self.quantization_overrides or "{}")
        except ValueError as error:
            raise ValueError(
                f"--quantization_overrides {self.quantization_overrides!r} is not JSON: {error}."
            ) from None


DIGITS_DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/digits",
    "do_train": True,
    "do_eval": True,
    "weight_bits": [4, 2],
    "float_epochs": 25.0,
    "float_learning_rate": 4e-3,
    "num_train_epochs": 15.0,
    "learning_rate": 4e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 256,
    "augmentation": "none",
    "logging_steps": 100,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
    "rho": 0.2,
    "interval": 1,  # two passes in every step; a schedule on the command line takes its place
}
"""Used for what the user does not set when no data set is named."""


Arguments = tuple[ModelArguments, DataTrainingArguments, TrainingArguments, SAQConfig, QuantizationArguments]
KINDS: list[Any] = [ModelArguments, DataTrainingArguments, QuantizationArguments, SAQConfig, TrainingArguments]
RESUME = "--resume_from_checkpoint"
EPILOG = """\
{file}: a .yaml or .json file may come first, with one argument and its value a line; arguments after it win.

{resume}: the path of a checkpoint-N (its stage goes on from it, the others start anew), true (each stage goes on from
its newest complete checkpoint, where it has one) or false (the default: all start anew).

Without a data set the handwritten digits of scikit-learn are used, with these defaults in place of the ones above:
{digits}
"""


class OneLineParser(HfArgumentParser):
    """Answers a mistake in one line, not with the hundreds of lines that the usage has."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def make_parser(description: str) -> OneLineParser:
    """The parser; each kind of arguments is a group of its help, and defaults in it are those of the code."""
    # Name the groups of classes that belong to others here: HfArgumentParser finds a name nowhere else.
    SAQConfig._argument_group_name = "perturbation: hf_saq.SAQConfig"  # type: ignore[attr-defined]
    TrainingArguments._argument_group_name = "training: transformers.TrainingArguments"  # type: ignore[attr-defined]
    parser = OneLineParser(KINDS, description=description, allow_abbrev=False, formatter_class=_Formatter)
    digits = "  " + "\n  ".join(f"--{name} {_shown(value)}" for name, value in DIGITS_DEFAULTS.items())
    parser.epilog = EPILOG.format(file="arguments file", resume=RESUME, digits=digits)
    return parser


def parse_with(parser: OneLineParser, argv: Sequence[str]) -> tuple[Any, ...]:
    """What `parser` makes of a command line; a mistake in it ends the program with one line."""
    try:
        _, unknown = parser.parse_known_args(list(argv))
        if unknown:
            raise ValueError(_no_argument(unknown, parser))
        return parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the lines of the epilog."""


def parse_arguments(argv: Sequence[str], description: str = "") -> Arguments:
    """From the command line, or from a `.json` or `.yaml` file and what the command line has after it, which wins."""
    parser = make_parser(description)
    try:
        given, rest, digits = {}, list(argv), dict(DIGITS_DEFAULTS)
        if rest and rest[0].endswith((".json", ".yaml", ".yml")):
            given = read_arguments(Path(rest.pop(0)), parser)
        if any(text.split("=")[0] == "--schedule" for text in rest):  # a preset says all of the schedule
            given, digits = _without_knobs(given), _without_knobs(digits)
        parser.set_defaults(**given)
        asked, unknown = parser.parse_known_args(rest)
        if unknown:
            raise ValueError(_no_argument(unknown, parser))
        if not (asked.dataset_name or asked.train_dir or asked.validation_dir):
            parser.set_defaults(**{**digits, **given})
        parsed = parser.parse_args_into_dataclasses(rest, look_for_args_file=False)
        model, data, quantization, saq, training = parsed
        if training.do_predict:
            raise ValueError("--do_predict: this script writes no predictions; leave it out, and open what it saves.")
        training.resume_from_checkpoint = resume_choice(training.resume_from_checkpoint)
        return model, data, training, saq, quantization  # type: ignore[return-value]
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))


def _without_knobs(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in KNOBS}


def read_arguments(path: Path, parser: OneLineParser) -> dict[str, Any]:
    """Argument -> value, from a `.json` or `.yaml` file.

    Raises:
        ValueError: If the file does not hold names and values, or a name is no argument.
    """
    try:
        given = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}; expected one argument and value a line.")
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    for name, value in given.items():
        if name not in actions:
            raise ValueError(f"{path}: {name!r} is no argument; {_hint(str(name), actions, repr)}")
        if actions[name].nargs == "+" and value is not None and not isinstance(value, list):
            given[name] = [value]  # as on the command line, where one value is a list of one
    return given


def _no_argument(unknown: Sequence[str], parser: OneLineParser) -> str:
    """Say of the first thing on the command line that was not understood what may have been meant."""
    flag = next((text.split("=")[0] for text in unknown if text.startswith("-")), None)
    if flag is None:
        return f"{unknown[0]!r} belongs to no argument; a file of arguments (.yaml or .json) comes first."
    flags = {name.replace("-", "_"): name for action in parser._actions for name in action.option_strings}
    return f"{flag} is no argument; {_hint(flag.replace('-', '_'), flags, lambda found: '--' + found.lstrip('_'))}"


def _hint(name: str, known: Any, shown: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {shown(close[0])}?" if close else "--help lists what there is."


def resume_choice(value: str | bool | None) -> str | bool | None:
    """A checkpoint that can be gone on from, `True` for the newest of each stage, or `None`.

    Raises:
        ValueError: If the checkpoint is not there or not complete.
    """
    if value is None or str(value).lower() in ("false", "no", "0", ""):
        return None
    if str(value).lower() in ("true", "yes", "1"):
        return True
    missing = what_is_missing(str(value))
    if missing is not None:
        raise ValueError(
            f"{RESUME} {str(value)!r}: {missing}. Expected the path of a checkpoint-N, true (the newest complete one "
            "of each stage) or false."
        )
    return str(value)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

"""Describe how to train, that is how and when to perturb: `SAQConfig`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..sharpness.perturbed_tensors import KINDS
from ..sharpness.schedules import KNOBS, PerturbationSchedule, resolve_preset
from .bit_budget import read_bit_budget
from .checks import check_choice, is_number
from .described import described


@described
@dataclass
class SAQConfig:
    """Describes how to train: the sharpness-aware step of arXiv:2111.12273 and when it is taken.

    Works with `HfArgumentParser`, next to `TrainingArguments`. On its command line an integer cannot be `None`: give
    plain QAT (`case=None`) an option of your own, as the example script has `--method qat`.
    Fields stay as they were given: [`perturbation_schedule`] looks up what the preset `schedule` means for `interval`,
    `ascent_fraction`, `ascent_depth`, `reuse`, `trigger` and `match_radius`; `"balanced"` if none of them is given.
    `hf_saq/sharpness/schedules/schedule.py` says what each of them costs and which go together.

    Raises:
        ValueError: If a field is out of range or two fields contradict each other. All are checked when it is built.
    """

    rho: float | None = field(
        default=None,
        metadata={"help": "Radius of the perturbation (one global L2 norm); None: the default of the model family."},
    )
    case: int | None = field(
        default=3,
        metadata={
            "help": "1: L(Q(w)+eps) with the latent gradient; 2: L(Q(w+eps)), which is SAM on a quantized model; "
            "3: L(Q(w)+eps) with the gradient at Q(w), which is SAQ; None: plain quantization-aware training."
        },
    )
    adaptive: bool = field(
        default=False, metadata={"help": "Scale the perturbation by the size of each weight (ASAM, arXiv:2102.11600)."}
    )
    eta: float = field(default=0.01, metadata={"help": "Added to the size of each weight when adaptive."})
    perturb: list[str] = field(
        default_factory=lambda: ["weight", "bias", "norm"],
        metadata={"help": f"What to perturb: some of {', '.join(KINDS)}."},
    )
    schedule: Literal["full", "balanced", "last_layers", "free"] | None = field(
        default=None,
        metadata={
            "help": "Preset for the knobs below: full perturbs with whole batches, in two passes a step; "
            "balanced (the default if no knob is given) takes 1.125 passes; last_layers at most as many, for models "
            "of many layers; free one, for long training alone: it sees half as many batches. Knobs given one by one "
            "are completed by those of full."
        },
    )
    interval: int | None = field(
        default=None,
        metadata={"help": "Perturb every k-th optimizer step (default 1), plain steps between unless reuse is set."},
    )
    start: float = field(default=0.0, metadata={"help": "Perturb only after this fraction of training, 0 to 1."})
    ascent_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of each micro-batch that the perturbation is made from, in (0, 1]; at least 2 images."
        },
    )
    ascent_depth: float | None = field(
        default=None,
        metadata={
            "help": "Perturb the last layers alone, those with this share of the operations of a forward pass, in "
            "(0, 1]; the layers before them run once for both passes."
        },
    )
    reuse: str | None = field(
        default=None,
        metadata={
            "help": "stale: between every k-th step one pass with the last perturbation; previous: one pass in every "
            "step, perturbed by the gradient of the step before; echo: use each batch in k steps in a row, each but "
            "the first perturbed by the gradient of the one before; look: LookSAM between every k-th step."
        },
    )
    trigger: bool = field(
        default=False, metadata={"help": "Perturb when the gradient is long against its running mean (AE-SAM)."}
    )
    match_radius: bool | None = field(
        default=None,
        metadata={
            "help": "With ascent_fraction or ascent_depth: adapt the radius so that the loss rises as much as in "
            "the full step, measured now and then, in every 128th step later on."
        },
    )
    look_alpha: float = field(default=0.7, metadata={"help": "What reuse=look adds, relative to the gradient."})
    scale_lr_ratio: float = field(
        default=0.1,
        metadata={"help": "Learning rate of scales, clips and offsets, relative to that of the weights."},
    )
    sync: Literal["local", "global"] = field(
        default="local",
        metadata={
            "help": "local: each process and micro-batch perturbs with its own gradient (m-sharpness); "
            "global: one perturbation per optimizer step, from the gradient of all of them."
        },
    )

    norm_batches: int | None = field(
        default=None,
        metadata={
            "help": "Training batches to re-estimate batch-norm statistics from before the model is evaluated or "
            "saved; 0: keep the running ones. Not set: 16 where these would come from perturbed passes, else 0."
        },
    )

    log_sharpness: bool | None = field(
        default=None,
        metadata={
            "help": "Log measured_sharpness, the rise of the loss at distance rho from the quantized weights, every "
            "50 steps or more: at most 2.7 percent of plain training. Not set: where training perturbs."
        },
    )
    bit_budget: str | None = field(
        default=None,
        metadata={
            "help": "Give each layer its own bits before training, within 0.8x the bit operations of the uniform "
            "ones, 0.8x bytes of packed weights, what 3 bits everywhere cost (3 bits), or a number with a unit: "
            "1.5e9 bops, 250000 bytes."
        },
    )

    def __post_init__(self) -> None:
        if self.log_sharpness is not None and not isinstance(self.log_sharpness, bool):
            raise ValueError(f"SAQConfig.log_sharpness={self.log_sharpness!r}; expected True, False or None.")
        if self.bit_budget is not None:
            read_bit_budget("SAQConfig.bit_budget", self.bit_budget)
        if self.rho is not None and not is_number(self.rho):
            raise ValueError(f"SAQConfig.rho={self.rho!r}; expected a finite number >= 0, or None for the default.")
        check_choice("SAQConfig.case", self.case, (None, 1, 2, 3))
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"SAQConfig.adaptive={self.adaptive!r}; expected True or False.")
        if not is_number(self.eta):
            raise ValueError(f"SAQConfig.eta={self.eta!r}; expected a finite number >= 0.")
        if isinstance(self.perturb, (str, tuple)):
            self.perturb = [self.perturb] if isinstance(self.perturb, str) else list(self.perturb)
        if not isinstance(self.perturb, list) or not self.perturb or any(k not in KINDS for k in self.perturb):
            raise ValueError(f"SAQConfig.perturb={self.perturb!r}; expected one or more of {list(KINDS)}.")
        self.perturbation_schedule()
        if not is_number(self.scale_lr_ratio):
            raise ValueError(f"SAQConfig.scale_lr_ratio={self.scale_lr_ratio!r}; expected a finite number >= 0.")
        if self.norm_batches is not None and (type(self.norm_batches) is not int or self.norm_batches < 0):
            raise ValueError(
                f"SAQConfig.norm_batches={self.norm_batches!r}; expected an integer >= 0, or None for the default."
            )
        check_choice("SAQConfig.sync", self.sync, ("local", "global"))

    def perturbation_schedule(self) -> PerturbationSchedule:
        """Build the schedule that `schedule` and the knobs mean, as they are now.

        Raises:
            ValueError: If one of them is out of range or two contradict each other.
        """
        given = {name: getattr(self, name) for name in KNOBS}
        given["trigger"] = None if self.trigger is False else self.trigger  # False means "not given"
        try:
            knobs = resolve_preset(self.schedule, given)
            return PerturbationSchedule(start=self.start, look_alpha=self.look_alpha, **knobs)
        except ValueError as error:
            raise ValueError(f"SAQConfig.{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as they were given, JSON-plain, in order."""
        return asdict(self)

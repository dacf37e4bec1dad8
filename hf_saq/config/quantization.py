"""Describe how to quantize a model: `SAQQuantizationConfig`."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from ..installing import how_to_install
from ..quantizers import check_activation_mode, check_bits, quantizer_class
from ..tables import bits_name
from .checks import check_choice
from .described import described

QUANT_METHOD = "saq"
EXPORT_RECORD = "hf_saq_export"
"""Key in `config.json` of what an exported graph beside it says about itself."""
FORMAT_VERSION = 2
OVERRIDABLE = ("weight_bits", "activation_bits", "quantizer", "weight_granularity", "activation_mode", "scale_init")


def _check_groups(where: str, groups: Any) -> None:
    """Check lists of names of layers that share an input."""
    if groups is None:
        return
    expected = "expected lists of at least two names of layers each, no name twice; or None"
    if not isinstance(groups, (list, tuple)) or not all(
        isinstance(group, (list, tuple)) and len(group) > 1 and all(isinstance(name, str) for name in group)
        for group in groups
    ):
        raise ValueError(f"{where}={groups!r}; {expected}.")
    names = [name for group in groups for name in group]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where}: {twice} more than once; {expected}.")


def _check_layer_fields(where: str, values: dict[str, Any]) -> None:
    """Check the fields that hold for one layer, in the configuration itself or in an override."""
    for name, value in values.items():
        if name in ("weight_bits", "activation_bits"):
            check_bits(f"{where}{name}", value, none_is_float=True)
        elif name == "quantizer":
            if not isinstance(value, str):
                raise ValueError(f"{where}{name}={value!r}; expected the name of a quantizer.")
            try:
                quantizer_class(value)
            except ValueError as error:
                raise ValueError(f"{where}{error}") from None
        elif name == "weight_granularity":
            check_choice(f"{where}{name}", value, ("tensor", "channel"))
        elif name == "activation_mode":
            check_choice(f"{where}{name}", value, ("auto", "signed", "unsigned", "affine"))
        elif name == "scale_init":
            check_choice(f"{where}{name}", value, ("mse", "mean"))
    if "quantizer" in values and "activation_mode" in values:  # `build` checks what overrides make of the rest
        check_activation_mode(where, values["quantizer"], values["activation_mode"])


@described
@dataclass(repr=False, kw_only=True)
class SAQQuantizationConfig(QuantizationConfigMixin):
    """Describes how to quantize a vision model; `quant_method` is `"saq"`.

    Pass it to `from_pretrained(..., quantization_config=...)`, to `hf_saq.quantize` or to `SAQTrainer`. It is stored
    in the `config.json` of a saved model.

    Raises:
        ValueError: If a field is out of range or two fields contradict each other. All are checked when it is built.
    """

    weight_bits: int | None = field(default=4, metadata={"help": "Bits of a weight, 2 to 8, or None for float."})
    activation_bits: int | None = field(
        default=4, metadata={"help": "Bits of a layer's input, 2 to 8; None keeps activations float."}
    )
    quantizer: str = field(
        default="lsq", metadata={"help": "Name of the quantizer: a key of hf_saq.quantizers.QUANTIZERS."}
    )
    weight_granularity: Literal["tensor", "channel"] = field(
        default="tensor", metadata={"help": "One weight scale per tensor (the paper) or per output channel."}
    )
    activation_mode: Literal["auto", "signed", "unsigned", "affine"] = field(
        default="auto",
        metadata={
            "help": "Sign of activation codes; auto decides from the smallest value calibrated; affine learns an "
            "offset (lsq_plus only, which does so for auto as well)."
        },
    )
    scale_init: Literal["mse", "mean"] = field(
        default="mse", metadata={"help": "First scales by least squared error (mse) or the mean rule of LSQ."}
    )
    first_last_bits: int | None = field(
        default=8, metadata={"help": "Bits of the first layer and of the heads; None treats them like the rest."}
    )
    quantize_attention: bool = field(
        default=False,
        metadata={
            "help": "Also quantize the operands of attention products (query, key, probabilities, value) to "
            "activation_bits. For models whose attention goes through transformers' attention interface."
        },
    )
    share_inputs: bool = field(
        default=False,
        metadata={
            "help": "Quantize once what several layers read (query, key and value of an attention): one scale instead "
            "of one for each, one node in exported graphs.",
            "added_later": True,  # packed files exist that lack it
        },
    )
    learn_input_scale: bool = field(
        default=True,
        metadata={
            "help": "Learn the scale of the model's own input, which its first layer quantizes; False keeps it as "
            "calibrated, which spares the gradient of the images.",
            "added_later": True,
        },
    )
    modules_to_not_convert: list[str] | None = field(
        default=None, metadata={"help": "Modules to leave in float: dotted names, their prefixes, or globs."}
    )
    first_last_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "The first layer and the heads, as modules_to_not_convert names them; None finds them by "
            "structure when a model is converted, and what was found is stored with that model."
        },
    )
    shared_input_modules: list[list[str]] | None = field(
        default=None,
        metadata={
            "help": "With share_inputs, groups of layers that read the same tensor; None finds them when a model is "
            "converted, by the shapes of tensors alone, and what was found is stored with that model."
        },
    )
    modules_found_idle: list[str] | None = field(
        default=None,
        metadata={
            "help": "Those of modules_to_not_convert that hf_saq added, for example because the model never calls "
            "them; not to be set by hand."
        },
    )
    overrides: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "Glob of module names -> fields that differ there; last match wins."}
    )
    storage: Literal["float", "packed"] = field(
        default="float", metadata={"help": "Whether checkpoints hold latent float weights or packed integers."}
    )
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the stored format."})
    quant_method: str = field(default=QUANT_METHOD, metadata={"help": "Always saq."})  # type: ignore[assignment]

    def __post_init__(self) -> None:
        layer_fields = {name: getattr(self, name) for name in OVERRIDABLE}
        _check_layer_fields("SAQQuantizationConfig.", layer_fields)
        check_bits("SAQQuantizationConfig.first_last_bits", self.first_last_bits, none_is_float=True)
        for name in ("quantize_attention", "share_inputs", "learn_input_scale"):
            if not isinstance(given := getattr(self, name), bool):
                raise ValueError(f"SAQQuantizationConfig.{name}={given!r}; expected True or False.")
        if self.quantize_attention and self.activation_bits is None:
            raise ValueError(
                "SAQQuantizationConfig.quantize_attention=True with activation_bits=None: both operands of an "
                "attention product are activations. Set activation_bits, or quantize_attention=False."
            )
        check_choice("SAQQuantizationConfig.storage", self.storage, ("float", "packed"))
        check_choice("SAQQuantizationConfig.quant_method", self.quant_method, (QUANT_METHOD,))
        if type(self.format_version) is not int or self.format_version < 1:
            raise ValueError(
                f"SAQQuantizationConfig.format_version={self.format_version!r}; expected an integer >= 1."
            )
        for name in ("modules_to_not_convert", "first_last_modules", "modules_found_idle"):
            listed = getattr(self, name)
            if listed is not None and (
                not isinstance(listed, (list, tuple)) or not all(isinstance(entry, str) for entry in listed)
            ):
                raise ValueError(f"SAQQuantizationConfig.{name}={listed!r}; expected a list of module names, or None.")
        _check_groups("SAQQuantizationConfig.shared_input_modules", self.shared_input_modules)
        if self.shared_input_modules and not self.share_inputs:
            raise ValueError(
                "SAQQuantizationConfig.shared_input_modules was given with share_inputs=False; set share_inputs=True, "
                "or shared_input_modules=None."
            )
        if not isinstance(self.overrides, dict) or not all(isinstance(pattern, str) for pattern in self.overrides):
            raise ValueError(
                f"SAQQuantizationConfig.overrides={self.overrides!r}; expected a dict of name pattern -> fields."
            )
        for pattern, values in self.overrides.items():
            where = f"SAQQuantizationConfig.overrides[{pattern!r}]"
            if not isinstance(values, dict) or not values:
                raise ValueError(f"{where}={values!r}; expected a dict with some of {list(OVERRIDABLE)}.")
            unknown = sorted(set(values) - set(OVERRIDABLE))
            if unknown:
                raise ValueError(f"{where} has unknown fields {unknown}; expected some of {list(OVERRIDABLE)}.")
            _check_layer_fields(f"{where}.", values)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """Build a configuration from `config_dict`, the fields in `config.json`; fields in `kwargs` take their place.

        A newer format in float storage warns, and its unknown keys are ignored.

        Args:
            return_unused_kwargs: Whether to return a pair: the configuration, and the `kwargs` that are no fields.

        Raises:
            ValueError: If a key is unknown, if a value is wrong, or if a packed checkpoint has a newer format.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(config_dict) - known)
        version = config_dict.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            message = (
                f"quantization_config.format_version is {version}, but this hf_saq reads up to {FORMAT_VERSION}; "
                f"install a newer one: {how_to_install()}."
            )
            if config_dict.get("storage") == "packed":
                raise ValueError(message)
            warnings.warn(f"{message} Ignored keys: {unknown}.", stacklevel=2)
            config_dict = {**config_dict, "format_version": FORMAT_VERSION}  # a save from here on writes it
        elif unknown:
            raise ValueError(f"quantization_config has unknown keys {unknown}; expected some of {sorted(known)}.")
        values = {name: value for name, value in {**config_dict, **kwargs}.items() if name in known}
        stored = values.get("overrides")
        if isinstance(stored, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in stored):
            values["overrides"] = {str(pattern): changes for pattern, changes in stored}
        unused = {name: value for name, value in kwargs.items() if name not in known}
        return (cls(**values), unused) if return_unused_kwargs else cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-plain. `overrides` become pairs, because `config.json` sorts its keys.

        Their order must be kept: the last pattern that matches wins.
        """
        values = super().to_dict()
        return {**values, "overrides": [[pattern, changes] for pattern, changes in values["overrides"].items()]}

    @property
    def tags(self) -> list[str]:
        """Return the tags that a model quantized like this has on the Hub, such as `w4a4`; 32 stands for float."""
        bits = bits_name(self.weight_bits, self.activation_bits)
        return ["quantized", QUANT_METHOD, bits.lower(), self.quantizer]

    def attach_to(self, model: Any) -> None:
        """Tell a transformers model how it is quantized now: `save_pretrained` asks the quantizer it finds there."""
        # Import it here and not above: importing it makes hf_saq register this class.
        from transformers.quantizers.auto import AutoHfQuantizer

        model.config.quantization_config = self
        model.hf_quantizer = AutoHfQuantizer.from_config(self, pre_quantized=True)
        self.attach_to_parts(model)

    def attach_to_parts(self, model: Any) -> None:
        """Let the models of transformers inside of `model` be saved alone: its base model, or those of which it is
        made, with configurations of their own."""
        from transformers.quantizers.auto import AutoHfQuantizer

        whole = getattr(model, "config", None)
        for part in model.modules():
            config = getattr(part, "config", None)
            if part is model or not hasattr(part, "save_pretrained") or not hasattr(config, "model_type"):
                continue
            if config is whole:
                part.hf_quantizer = model.hf_quantizer
            else:
                part.hf_quantizer = AutoHfQuantizer.from_config(self, pre_quantized=True)
                part.hf_quantizer.is_of_a_part = True

    def replace(self, **changes: Any) -> SAQQuantizationConfig:
        """Return a checked copy with some fields changed."""
        return type(self)(**{**copy.deepcopy(self.__dict__), **changes})

"""Let `from_pretrained` build quantized models: the `HfQuantizer` of `quant_method="saq"`, registered at the end.

This module is imported as soon as `transformers.quantizers` is, perhaps before transformers has any model. So nothing
that is imported here may need models of transformers; `conversion` imports its modules when they are used.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from .. import conversion
from ..config import FORMAT_VERSION, QUANT_METHOD, SAQQuantizationConfig
from ..layers import PackedLayer
from ..quantizers import Quantizer
from .absent_layers import absent_packed_layers, prepare_absent_layers
from .earlier_versions import first_last_modules_of
from .seal import IF_IN_FLOAT, check_seal, make_seal
from .weight_files import HINT, ONE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


WRAPPED = ("_orig_mod.", "module.")
"""What wrappers of models put before the names of tensors."""


class SAQHfQuantizer(HfQuantizer):
    """Builds the quantized layers before weights are loaded, and checks or initializes their quantizers after.

    There are three kinds of checkpoint: a float one with a `quantization_config` passed by the user, one in float
    storage (latent weights and quantizers) and one in packed storage (integers and scales).
    """

    requires_calibration = False
    quantization_config: SAQQuantizationConfig
    is_of_a_part = False
    """Whether it belongs to a model inside of a quantized one that has a configuration of its own."""

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Choose the implementation that quantized attention products need, which `config.json` does not name."""
        if self.quantization_config.quantize_attention:
            conversion.attention_interface.choose(config)
        return config

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> nn.Module:
        if self.quantization_config.storage == "packed" and not self.pre_quantized:
            raise ValueError(
                "SAQQuantizationConfig.storage='packed' describes a stored checkpoint, but the one to be loaded is in "
                "float. Load it with storage='float', calibrate or train, then call `hf_saq.pack(model)`."
            )
        self._weights = str(checkpoint_files[0]) if checkpoint_files else "what was loaded"
        if checkpoint_files:
            check_seal(checkpoint_files, self.quantization_config.to_dict() if self.pre_quantized else None)
        config, stored = self.quantization_config, self.pre_quantized
        if stored and config.format_version < FORMAT_VERSION:
            config = config.replace(first_last_modules=first_last_modules_of(model, config))
        if config.storage == "packed":
            report = conversion.convert_to_packed(model, config)
        else:
            report = conversion.convert(model, config, stored)
        unexpected = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
        model._keys_to_ignore_on_load_unexpected = unexpected | {HINT}  # type: ignore[assignment]
        # Keep a copy: the user may pass the same configuration for several models.
        self.quantization_config = conversion.as_decided(config, report)
        if not self.pre_quantized:
            # A float checkpoint has no quantizers; they get their values below, so the report should not list them.
            ignored = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
            model._keys_to_ignore_on_load_missing = ignored | {r"\.\w+_quantizer\."}  # type: ignore[assignment]
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:  # noqa: ARG002
        for module in model.modules():
            if isinstance(module, Quantizer) and not module.learned:
                module.keep_as_calibrated()  # loading has put new parameters in the place of those that it had
        if not self.pre_quantized:
            for module in model.modules():
                if isinstance(module, Quantizer):
                    module.reset()
            conversion.initialize_weight_quantizers(model)
            self.quantization_config.attach_to_parts(model)
            return model
        own = model.state_dict(keep_vars=True) if conversion.is_packed(model) else _own_tensors(model)
        offloaded = [name for name, tensor in own.items() if tensor.is_meta]
        if offloaded:
            raise ValueError(
                f"device_map leaves {len(offloaded)} tensor(s) of this {type(model).__name__} out of the memory they "
                f"are used from, for example {offloaded[0]}. Quantized models cannot be offloaded: give every module "
                "a device it runs on; packed weights take little of it."
            )
        prepare_absent_layers(model)
        self.quantization_config = model.config.quantization_config  # type: ignore[union-attr, assignment]
        self.quantization_config.attach_to(model)
        own = model.state_dict(keep_vars=True) if conversion.is_packed(model) else _own_tensors(model)
        missing = [name for name, tensor in own.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            new = absent_packed_layers(model)
            advice = "Nothing was substituted: use the checkpoint it was saved with."
            if len(missing) == len(own):
                advice += f" {IF_IN_FLOAT}"
            if new:
                advice += (
                    f" If {new[0]} is to be new, for other classes for example: packed layers cannot be trained. Load "
                    "the checkpoint in float storage that was packed, or `hf_saq.unpack` this model as it is, save "
                    "that and load it again."
                )
            raise ValueError(
                f"The checkpoint of this {type(model).__name__} lacks {len(missing)} tensor(s) of the quantized "
                f"model, for example {missing[:3]}. Its config.json says quant_method={QUANT_METHOD!r}, "
                f"storage={self.quantization_config.storage!r}; {self._weights} is incomplete or belongs to another "
                f"model. {advice}"
            )
        conversion.initialize_weight_quantizers(model)
        for module in model.modules():
            if isinstance(module, Quantizer):
                module.check_state()
        conversion.note_signs(model)
        for module in model.modules():
            if isinstance(module, PackedLayer):
                module.check_size()
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Return what `save_pretrained` writes: all tensors, the hint, and the seal of a packed model (`seal.py`)."""
        from transformers.core_model_loading import revert_weight_conversion

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters alone are saved
        if self.is_of_a_part and not _describe(model):
            return None, {}  # nothing of it is quantized
        conversion.note_replaced_layers(model)
        conversion.forget_export(model)
        _describe_parts(model)
        own = model.state_dict()
        save = _arguments_of_save()
        given = _by_names_of(own, save.get("state_dict") or {})
        # Keep what it lacks, such as buffers in an average of parameters.
        state: dict[str, Any] = {**own, **given, HINT: torch.zeros(0, dtype=torch.uint8)}
        if not conversion.is_packed(model):
            _make_way_for_shards(state, save)
            return state, {}
        for name, tensor in given.items():
            if name not in own or (own[name].shape, own[name].dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(
                    f"save_pretrained: state_dict has {name}, {tensor.dtype} of shape {tuple(tensor.shape)}, which is "
                    f"not in this packed {type(model).__name__} or is another there. Save the model with float "
                    "weights with that state_dict, or load it there and `hf_saq.pack` that model."
                )
        sealed = dict(state)
        for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
            sealed.pop(name, None)
        config: Any = copy.deepcopy(model.config)  # make it as `save_pretrained` will write it
        config.dtype = str(model.dtype).removeprefix("torch.")
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        _make_way_for_shards(state, save)
        return state, make_seal(
            revert_weight_conversion(model, sealed),  # type: ignore[arg-type]
            config.quantization_config.to_dict(),
            json.loads(config.to_json_string()),
        )

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        conversion.dequantize_in_place(model)
        return model if dtype is None else model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def is_serializable(self) -> bool:
        return True

    # Answer yes, because `Trainer` asks before it even evaluates a model, and a packed model may be evaluated. It
    # cannot be trained: its layers raise in a training forward.
    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _describe(part: nn.Module) -> bool:
    """Write into the configuration of `part` how it is quantized now, by its own names; tell whether it is."""
    found = conversion.configuration_of(part)
    config: Any = part.config
    vars(config).pop("quantization_config", None)
    if found is not None:
        config.quantization_config = found
    return found is not None


def _describe_parts(model: nn.Module) -> None:
    """Do so for the models inside of `model` that have configurations of their own: from its checkpoint in float
    storage they can be loaded alone, as `CLIPVisionModel` from that of a classifier. The seal of a packed one says how
    all of it is quantized."""
    described: set[int] = {id(model.config)}
    for part in model.modules():
        if getattr(getattr(part, "hf_quantizer", None), "is_of_a_part", False) and id(part.config) not in described:
            described.add(id(part.config))  # the outermost comes first
            if conversion.is_packed(model):
                vars(part.config).pop("quantization_config", None)
            else:
                _describe(part)


def _arguments_of_save() -> Mapping[str, Any]:
    """Find what the caller gave to `save_pretrained`: a `state_dict`, an average of weights for example, and where to.

    transformers puts what [`SAQHfQuantizer.get_state_dict_and_metadata`] returns in the place of `state_dict` without
    handing it on, so read it where it still is.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "save_pretrained":
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _make_way_for_shards(state: Mapping[str, Tensor], save: Mapping[str, Any]) -> None:
    """Remove the single file of an earlier save where shards will take its place: transformers leaves it there, and
    would go on loading the earlier weights."""
    if "save_directory" not in save or not save.get("is_main_process", True) or save.get("distributed_checkpoint"):
        return
    sizes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}
    if split_torch_state_dict_into_shards(sizes, max_shard_size=save["max_shard_size"]).is_sharded:
        file, variant = Path(save["save_directory"]) / ONE_FILE, save.get("variant")
        (file if variant is None else file.with_suffix(f".{variant}{file.suffix}")).unlink(missing_ok=True)


def _by_names_of(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes that `torch.compile` and DDP put before names, where names in `own` remain."""
    found = {}
    for name, tensor in given.items():
        bare = name
        while bare not in own and (prefix := next((p for p in WRAPPED if bare.startswith(p)), "")):
            bare = bare.removeprefix(prefix)
        found[bare if bare in own else name] = tensor
    return found


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Find the tensors that only a quantized checkpoint has, by name: those of quantizers and packed layers."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, (Quantizer, PackedLayer))
        for key, tensor in module.state_dict(keep_vars=True).items()
    }


def register() -> None:
    """Make transformers know `quant_method="saq"`. May be called again, for example when the module is reloaded."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SAQQuantizationConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SAQHfQuantizer


register()

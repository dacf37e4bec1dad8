"""`from_pretrained` for quantized models: the `HfQuantizer` of `quant_method="saq"` and its registration."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from . import attention_interface
from .config import QUANT_METHOD, SAQQuantizationConfig
from .conversion import convert, initialize_weight_quantizers, note_signs
from .layers import PackedLayer
from .packed_model import convert_to_packed
from .quantizers import Quantizer


class SAQHfQuantizer(HfQuantizer):
    """Builds the quantized layers before weights are loaded, and checks or initializes their quantizers after.

    Three kinds of checkpoint come in: a float one with a `quantization_config` passed by the user, one in float
    storage (latent weights and quantizers) and one in packed storage (integers and scales).
    """

    requires_calibration = False
    quantization_config: SAQQuantizationConfig

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Quantized attention products come with an implementation of their own, which `config.json` does not name."""
        if self.quantization_config.quantize_attention:
            attention_interface.choose(config)
        return config

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:  # noqa: ARG002
        if self.quantization_config.storage == "packed" and not self.pre_quantized:
            raise ValueError(
                "SAQQuantizationConfig.storage='packed' describes a stored checkpoint, but the one to be loaded is in "
                "float. Load it with storage='float', calibrate or train, then call `hf_saq.pack(model)`."
            )
        if self.quantization_config.storage == "packed":
            convert_to_packed(model, self.quantization_config)
        else:
            convert(model, self.quantization_config)
        if not self.pre_quantized:
            # A float checkpoint has no quantizers; they get their values below, so the report should not list them.
            ignored = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
            model._keys_to_ignore_on_load_missing = ignored | {r"\.\w+_quantizer\."}  # type: ignore[assignment]
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:  # noqa: ARG002
        quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
        if not self.pre_quantized:
            for quantizer in quantizers:
                quantizer.reset()
            initialize_weight_quantizers(model)
            return model
        own = _own_tensors(model)
        missing = [name for name, tensor in own.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if missing:
            raise ValueError(
                f"The checkpoint of this {type(model).__name__} lacks {len(missing)} tensor(s) of quantized layers, "
                f"for example {missing[:3]}. Its config.json says quant_method={QUANT_METHOD!r}, "
                f"storage={self.quantization_config.storage!r}; the weights file is incomplete or belongs to another "
                "model. Nothing was substituted: use the checkpoint it was saved with."
            )
        for quantizer in quantizers:
            quantizer.refresh()
        note_signs(model)
        for module in model.modules():
            if isinstance(module, PackedLayer):
                module.codes()  # raises where codes, bits and shape do not belong together
        return model

    def is_serializable(self) -> bool:
        return True

    # `Trainer` asks these before it will so much as evaluate a model. A packed one may be evaluated; that it cannot be
    # trained is said by its layers, in a training forward.
    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that only a quantized checkpoint has, by name: those of quantizers and packed layers."""
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, (Quantizer, PackedLayer))
        for key, tensor in module.state_dict(keep_vars=True).items()
    }


def register() -> None:
    """Make transformers know `quant_method="saq"` and the attention of that name. Safe to call again, for example when
    the module is reloaded."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = SAQQuantizationConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = SAQHfQuantizer
    attention_interface.register()

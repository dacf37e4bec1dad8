"""Every image classifier of transformers and a spread of timm, made tiny, and one check that all of them must pass.

An architecture is a name: `transformers/vit`, or `timm/resnet18`, which goes through transformers' wrapper. The small
configurations come from the library's own configuration classes: a rule for each common field, and a table for what
the rules do not fit. Nothing is downloaded.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from quantized_models import codes
from tiny_models import NUM_LABELS, seeded
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, TimmWrapperConfig
from transformers import TimmWrapperForImageClassification as TimmModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING as MAPPING

from hf_saq import SAQQuantizationConfig, SharpnessAwareMinimizer, calibrate, pack, quantize
from hf_saq.conversion.attention_interface import uses_interface
from hf_saq.layers import QuantizedLayer

BATCH = 4

# Fields of configurations ------------------------------------------------------------------------------------------

WIDTHS = (8, 16, 16, 32, 32, 32, 32)
FIELDS: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "embed_dim": 8,
    "embedding_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "projection_dim": 16,
    "max_position_embeddings": 8,
    "num_groups": 4,
    "window_size": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""What a field is set to in whatever configuration has it, as a number."""

LISTS: dict[str, Callable[[int], list[int]]] = {
    "hidden_sizes": lambda n: list(WIDTHS[:n]),
    "depths": lambda n: [1] * n,
    "num_attention_heads": lambda n: [2] * n,
    "num_heads": lambda n: [2] * n,
    "embed_dim": lambda n: list(WIDTHS[:n]),
    "embed_dims": lambda n: list(WIDTHS[:n]),
    "image_size": lambda n: [32] * n,
}
"""The same for fields that hold a list, given its length."""

SPECIAL: dict[str, dict[str, Any]] = {
    "convnext": {"patch_size": 2},
    "convnextv2": {"patch_size": 2},
    "cvt": {"depth": [1, 2, 3], "embed_dim": [8, 8, 16], "num_heads": [1, 1, 2]},
    "dinat": {"patch_size": 4, "dilations": [[1], [1], [1], [1]], "kernel_size": 3},
    "donut-swin": {"patch_size": 2, "depths": [2, 1], "num_heads": [2, 2]},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320, "dropout_rate": 0.0},
    "focalnet": {"patch_size": 4, "focal_levels": [1] * 4},
    "hgnet_v2": {
        "hidden_sizes": [8, 16, 16, 16],
        "stem_channels": [3, 4, 8],
        "stage_in_channels": [8, 8, 16, 16],
        "stage_mid_channels": [4, 4, 8, 8],
        "stage_out_channels": [8, 16, 16, 16],
        "stage_num_blocks": [1] * 4,
        "stage_numb_of_layers": [2] * 4,
    },
    "hiera": {"image_size": [64, 64], "num_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]},
    "imagegpt": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 17},
    "levit": {
        "image_size": 64,
        "patch_size": 16,
        "hidden_sizes": [16, 16, 16],
        "key_dim": [8] * 3,
        "down_ops": [["Subsample", 8, 2, 2, 2, 2]] * 2,
    },
    "mobilenet_v1": {"depth_multiplier": 0.125, "min_depth": 4},
    "mobilenet_v2": {"depth_multiplier": 0.1, "min_depth": 4, "depth_divisible_by": 4, "classifier_dropout_prob": 0.0},
    "mobilevit": {"patch_size": 2, "hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 8, 8, 8, 8, 8, 16]},
    "mobilevitv2": {
        "image_size": 64,
        "patch_size": 2,
        "width_multiplier": 0.125,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [64, 64, 64],
    },
    "perceiver": {
        "num_latents": 4,
        "d_latents": 16,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
    },
    "poolformer": {"patch_size": 16},
    "pp_lcnet": {
        "block_configs": [[[3, 8, 8, 2, False]]] + [[[3, 8, 8, 1, False]]] * 3 + [[[5, 8, 16, 2, True]]],
        "stem_channels": 8,
        "class_expand": 16,
    },
    "pvt": {"patch_sizes": [4, 2, 2, 2], "image_size": 64},
    "pvt_v2": {"image_size": [64, 64]},
    "regnet": {"groups_width": 8},
    "shieldgemma2": {
        "mm_tokens_per_image": 4,
        "image_token_index": 31,
        "boi_token_index": 29,
        "eoi_token_index": 30,
        "yes_token_index": 3,
        "no_token_index": 4,
    },
    "siglip2": {"num_patches": 16},
    "swin": {"patch_size": 2, "depths": [2, 1], "num_heads": [2, 2]},
    "swinv2": {"patch_size": 2, "depths": [2, 1], "num_heads": [2, 2]},
    "textnet": {"stem_out_channels": 8},
}
"""Fields of one `model_type`, its nested configurations included, that the rules do not fit."""

SPECIAL_NESTED: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "head_dim": 8,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 32,
        "sliding_window": 8,
    },
}


def tiny_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments that make a small configuration of the class of `config`."""
    special = {**SPECIAL.get(config.model_type, {}), **SPECIAL_NESTED.get(config.model_type, {})}
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        nested = getattr(config, name, None)
        if isinstance(nested, PreTrainedConfig):
            fields[name] = {**tiny_fields(nested), "model_type": nested.model_type}
        elif name in special:
            pass
        elif isinstance(value, (list, tuple)) and name in LISTS:
            fields[name] = LISTS[name](len(value))
        elif isinstance(value, int) and name in FIELDS:
            fields[name] = FIELDS[name]
    for name in ("num_layers", "hidden_size"):  # computed by hierarchical models from the others
        if name in fields and ("embed_dim" in fields or "embed_dim" in special):
            del fields[name]
    return {**fields, **special}


# timm ----------------------------------------------------------------------------------------------------------------

_VIT = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6]}
_RESNET = {"layers": [1, 1, 1, 1]}
_IMAGE_32 = {"img_size": 32}
_IMAGE_64 = {"img_size": 64}
TIMM: dict[str, dict[str, Any]] = {
    # plain transformers
    "vit_tiny_patch16_224": _VIT,
    "vit_relpos_small_patch16_224": _VIT,
    "vit_tiny_r_s16_p8_224": {"img_size": 64, "depth": 2},
    "deit_tiny_distilled_patch16_224": _VIT,
    "deit3_small_patch16_224": _VIT,
    "beit_base_patch16_224": _VIT,
    "beitv2_base_patch16_224": _VIT,
    "eva02_tiny_patch14_224": _VIT,
    "cait_xxs24_224": _VIT,
    "convit_tiny": {**_VIT, "local_up_to_layer": 1},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 2},
    "naflexvit_base_patch16_gap": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "samvit_base_patch16": {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "global_attn_indexes": [1]},
    # hierarchical transformers
    "swin_tiny_patch4_window7_224": _SWIN,
    "swinv2_tiny_window8_256": _SWIN,
    "swinv2_cr_tiny_224": _SWIN,
    "pit_ti_224": {"img_size": 64, "base_dims": [16, 16, 16], "depth": [1, 1, 1]},
    "coat_lite_tiny": _IMAGE_64,
    "twins_svt_small": {"img_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [16, 16, 32, 32]},
    "visformer_tiny": {"img_size": 64, "embed_dim": 48, "depth": [1, 1, 1], "num_heads": 2},
    "nest_tiny": _IMAGE_64,
    "hiera_tiny_224": {"img_size": 64, "stages": [1, 1, 2, 1], "embed_dim": 24},
    "mvitv2_tiny": _IMAGE_64,
    "pvt_v2_b0": {"depths": [1, 1, 1, 1]},
    "davit_tiny": {},
    "gcvit_xxtiny": _IMAGE_64,
    "focalnet_tiny_srf": {},
    # hybrids
    "coatnet_pico_rw_224": _IMAGE_64,
    "test_coatnet": _IMAGE_64,
    "maxvit_pico_rw_256": _IMAGE_64,
    "test_maxvit": _IMAGE_64,
    "levit_128s": _IMAGE_64,
    "tiny_vit_5m_224": {},
    "efficientvit_b0": {},
    "efficientvit_m0": _IMAGE_64,
    "efficientformer_l1": {},
    "efficientformerv2_s0": _IMAGE_64,
    "poolformer_s12": {},
    "caformer_s18": {},
    "swiftformer_xs": {},
    "edgenext_xx_small": {},
    "fastvit_t8": {},
    "repvit_m0_9": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "shvit_s1": {},
    # neither convolution nor attention
    "mixer_s32_224": _IMAGE_32,
    "gmlp_ti16_224": _IMAGE_32,
    "resmlp_12_224": _IMAGE_32,
    "sequencer2d_s": {"img_size": 32, "layers": [1, 1, 1, 1]},
    "mambaout_femto": {},
    # convolutions
    "convnext_atto": {},
    "convnextv2_atto": {},
    "convmixer_768_32": {},
    "inception_next_atto": {},
    "resnet18": {},
    "resnet26d": _RESNET,
    "resnext50_32x4d": _RESNET,
    "seresnet18": {},
    "ecaresnet26t": _RESNET,
    "skresnet18": {},
    "resnest14d": {},
    "res2net50_14w_8s": _RESNET,
    "resnetv2_50": _RESNET,
    "resnetv2_50x1_bit": {},
    "test_nfnet": {},
    "regnetx_002": {},
    "regnety_002": {},
    "efficientnet_b0": {},
    "tf_efficientnet_b0": {},
    "tf_efficientnetv2_b0": {},
    "mixnet_s": {},
    "mnasnet_small": {},
    "mobilenetv1_100": {},
    "mobilenetv2_035": {},
    "mobilenetv3_small_050": {},
    "tf_mobilenetv3_small_minimal_100": {},
    "mobilenetv4_conv_small_035": {},
    "mobileone_s0": {},
    "lcnet_035": {},
    "tinynet_e": {},
    "ghostnet_050": {},
    "rexnet_100": {},
    "repvgg_a0": {},
    "repghostnet_050": {},
    "gernet_s": {},
    "hgnetv2_b0": {},
    "hrnet_w18_small": {},
    "densenet121": {"block_config": [2, 2, 2, 2]},
    "dla46_c": {},
    "dpn48b": {},
    "cspresnet50": {},
    "starnet_s050": {},
    "fasternet_t0": {},
}
"""Names of timm and what makes them small; where a family takes no such argument, it comes as it is."""


IMAGE_SIZES = {"efficientformer_l1": 224}
"""Of timm models that take no `img_size` and need another one than 64."""


# Architectures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """One class of models and the small configuration it is built from."""

    name: str
    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]

    def config(self) -> PreTrainedConfig:
        library, name = self.name.split("/")
        if library == "timm":
            return TimmWrapperConfig(architecture=name, num_labels=NUM_LABELS, model_args=TIMM[name])
        config = self.config_class(**tiny_fields(self.config_class()))
        config.num_labels = NUM_LABELS
        return config

    def build(self, seed: int = 0) -> PreTrainedModel:
        with seeded(seed):
            model = self.model_class(self.config())
        for name, parameter in model.named_parameters():
            # Zeros and tiny gains, as initializations like them, would keep gradients from the layers behind.
            if parameter.ndim < 2 or not parameter.any():
                nn.init.uniform_(parameter, 0.2, 1.0, generator=torch.Generator().manual_seed(len(name)))
        return model.eval()


def _architectures() -> dict[str, Architecture]:
    found = {}
    for config_class, classes in MAPPING.items():
        if config_class is not TimmWrapperConfig:
            for model_class in classes if isinstance(classes, tuple) else (classes,):
                name = f"transformers/{config_class.model_type}"
                if name in found:  # a further class on the same configuration
                    name = f"transformers/{model_class.__name__}"
                found[name] = Architecture(name, model_class, config_class)
    timm_models = [Architecture(f"timm/{name}", TimmModel, TimmWrapperConfig) for name in TIMM]
    return {**found, **{architecture.name: architecture for architecture in timm_models}}


ARCHITECTURES = _architectures()


def inputs(architecture: Architecture, model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random images, the way the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    if config.model_type == "imagegpt":  # colours of a palette; the last entry starts the sequence
        return {"input_ids": torch.randint(0, config.vocab_size - 1, (BATCH, config.n_positions), generator=generator)}
    if config.model_type == "siglip2":  # patches, their mask and the shapes they came from
        patches = torch.randn(BATCH, 16, 3 * config.vision_config.patch_size**2, generator=generator)
        mask = torch.ones(BATCH, 16, dtype=torch.long)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": mask,
            "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
        }
    if config.model_type == "timm_wrapper":
        size = config.model_args.get("img_size", IMAGE_SIZES.get(config.architecture, 64))
    else:
        size = getattr(getattr(config, "vision_config", config), "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    images = torch.randn(BATCH, 3, height, width, generator=generator)
    if config.model_type == "shieldgemma2":
        tokens = torch.tensor([[2, *[config.image_token_index] * config.mm_tokens_per_image, 5, 6]] * BATCH)
        return {"input_ids": tokens, "pixel_values": images}
    return {"inputs" if model.main_input_name == "inputs" else "pixel_values": images}


# The check -----------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What became of one architecture. An empty `reason` means that it passed."""

    name: str
    quantized: int = 0
    skipped: tuple[str, ...] = ()  # reasons, one for each layer left in float
    without_effect: int = 0  # quantized layers that run, and that the logits do not depend on
    attentions: int = 0  # attention modules whose products were quantized as well, in a second run of the check
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


def check(architecture: Architecture) -> Result:
    """Quantize, calibrate, take two SAQ steps, store and load, packed and not; says what went wrong, if anything."""
    result = Result(architecture.name)
    try:
        _check(architecture, architecture.build(), result)
        model = architecture.build()
        if any(uses_interface(module) for module in model.modules()):
            with_attention = Result(architecture.name)
            _check(architecture, model, with_attention, quantize_attention=True)
            result.attentions = with_attention.quantized - result.quantized
    except Exception as error:  # the sweep is to go on, and to tell
        result.reason = _what_the_float_model_lacks(architecture) or _text(error)
    return result


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _what_the_float_model_lacks(architecture: Architecture) -> str:
    """Why the float model cannot be built, run or saved, if that is so; a quantized one then cannot be either."""
    try:
        model = architecture.build()
        logits_of(model(**inputs(architecture, model)))
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
    except Exception as error:
        return f"the float model does not work: {_text(error)}"
    return ""


def _check(architecture: Architecture, model: PreTrainedModel, result: Result, **fields: Any) -> None:
    batch = inputs(architecture, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="calibrate: .* stay in float")  # the table says which
        calibrate(quantize(model, SAQQuantizationConfig(**fields)), [batch])
    report = model.quantization_report
    result.quantized = len(report.converted)
    result.skipped = tuple(layer.reason for layer in report.skipped)
    result.without_effect = _two_steps(model, batch)
    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        expected, expected_codes = logits_of(model.eval()(**batch)), codes(model)
        assert expected.isfinite().all(), "logits are not finite"
        for kind, saved in (("float", model), ("packed", pack(model))):
            saved.save_pretrained(f"{directory}/{kind}")
            loaded = type(model).from_pretrained(f"{directory}/{kind}").eval()
            found = codes(loaded)
            assert found.keys() == expected_codes.keys(), f"{kind}: other layers are quantized after loading"
            assert all(torch.equal(found[name], expected_codes[name]) for name in found), f"{kind}: codes differ"
            difference = (logits_of(loaded(**batch)) - expected).abs().max().item()
            assert difference == 0, f"{kind}: logits differ by {difference:.1e}"


def _two_steps(model: PreTrainedModel, batch: dict[str, Tensor]) -> int:
    """Two steps of SAQ, in which every quantized layer whose weight the loss depends on must receive a perturbation.

    Returns how many layers there are that it does not depend on.
    """
    model.train()
    _backward(model, batch)
    without_effect = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer) and layer.weight.grad is None
    }
    minimizer = SharpnessAwareMinimizer(model, rho=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    quantizers = {
        name: layer.weight_quantizer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLayer) and name not in without_effect
    }
    for _ in range(2):
        optimizer.zero_grad()
        with minimizer.ascent():
            _backward(model, batch)
        with minimizer.perturbed() as added:
            left_out = [name for name, q in quantizers.items() if q is not None and q not in added.outputs]
            assert not left_out, f"no eps for {len(left_out)} layers, for example {left_out[:3]}"
            assert all(eps.isfinite().all() for eps in added.outputs.values()), "an eps is not finite"
            _backward(model, batch)
        optimizer.step()
    assert minimizer.skipped == 0, "the gradient of the first pass is zero or not finite"
    minimizer.detach()
    return len(without_effect)


def _backward(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    logits = logits_of(model(**batch))
    loss = nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1])
    assert loss.isfinite(), f"the loss is {loss.item()}"
    loss.backward()


def logits_of(output: Any) -> Tensor:
    # PP-LCNet calls them its last hidden state.
    return output.logits if "logits" in output else output.last_hidden_state

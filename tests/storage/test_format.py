"""pack -> save -> load over many shapes: codes come back equal, and the file is as small as its bits."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matrices import matrix
from quantized_models import assert_same_codes, codes
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_saq import SAQQuantizationConfig, calibrate, pack, quantize
from hf_saq.layers import PackedLayer


class NetConfig(PreTrainedConfig):
    model_type = "two_layers"
    groups: int = 1
    in_per_group: int = 1
    out_per_group: int = 1
    kernel: int = 1
    classes: int = 2
    bias: bool = True


class Net(PreTrainedModel):
    """`(batch, channels, 4, 4) -> (batch, classes)`: a grouped convolution and a linear layer of any size."""

    config_class = NetConfig

    def __init__(self, config: NetConfig):
        super().__init__(config)
        out = config.groups * config.out_per_group
        self.conv = nn.Conv2d(
            config.groups * config.in_per_group, out, config.kernel, groups=config.groups, bias=config.bias
        )
        self.linear = nn.Linear(out, config.classes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean((-2, -1)))


SHAPES = st.fixed_dictionaries(
    {
        "groups": st.integers(1, 3),
        "in_per_group": st.integers(1, 5),
        "out_per_group": st.integers(1, 5),
        "kernel": st.integers(1, 4),
        "classes": st.integers(1, 9),
        "bias": st.booleans(),
    }
)


def packed_model(shape: dict, seed: int, **fields) -> tuple[nn.Module, nn.Module, Tensor]:
    """A quantized model of this shape, the packed one, and an input."""
    torch.manual_seed(seed)
    model = Net(NetConfig(**shape))
    x = torch.rand(4, shape["groups"] * shape["in_per_group"], 4, 4)
    if fields["activation_mode"] != "unsigned":
        x -= 0.5
    calibrate(quantize(model, SAQQuantizationConfig(first_last_bits=None, **fields)), [x])
    return model.eval(), pack(model), x


@pytest.mark.filterwarnings("ignore:.*one weight scale for a whole tensor")  # layers of any size, on any scale
@pytest.mark.filterwarnings("ignore:.*quantizers are unsigned, as activation_mode")  # and outputs of any sign
@matrix(
    3,
    bits={f"{n}bit": n for n in range(2, 9)},
    granularity=["tensor", "channel"],
    mode=["signed", "unsigned", "affine"],
)
@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_codes_come_back_and_take_their_bits(bits: int, granularity: str, mode: str, shape: dict, seed: int):
    model, packed, x = packed_model(
        shape,
        seed,
        weight_bits=bits,
        activation_bits=bits,
        weight_granularity=granularity,
        activation_mode=mode,
        quantizer="lsq_plus" if mode == "affine" else "lsq",
    )
    with tempfile.TemporaryDirectory() as directory:
        packed.save_pretrained(directory)
        loaded = Net.from_pretrained(directory)
        content = (Path(directory) / "model.safetensors").read_bytes()
    assert_same_codes(codes(loaded), codes(model))
    for name, value in packed.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight_quantizer")}
    weights = sum(-(-layer.weight.numel() * bits // 8) for layer in layers.values())
    scales = sum(layer.weight.shape[0] if granularity == "channel" else 1 for layer in layers.values())
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".bias"))
    activations = len(layers) * (4 + 4 * (mode == "affine") + 4)  # scale, offset, and what says signed or not
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) == header + weights + 4 * (scales + biases) + activations


@pytest.mark.parametrize("bits", range(2, 9), ids=lambda bits: f"{bits}bit")
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_file_is_within_two_percent_of_its_bits(bits: int, granularity: str, tmp_path: Path):
    """Against nothing but the bits of the weights, of a layer of the size that layers have."""
    shape = {"groups": 1, "in_per_group": 64, "out_per_group": 256, "kernel": 3, "classes": 10, "bias": False}
    fields = {"weight_granularity": granularity, "activation_mode": "signed"}
    _, packed, _ = packed_model(shape, 0, weight_bits=bits, **fields)
    packed.save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    theory = sum(torch.Size(m.weight_shape).numel() for m in packed.modules() if isinstance(m, PackedLayer)) * bits / 8
    header = 8 + int.from_bytes(content[:8], "little")
    assert theory < len(content) - header < 1.02 * theory + (4 * 256 if granularity == "channel" else 0)
    assert header < 4096

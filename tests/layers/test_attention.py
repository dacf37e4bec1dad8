"""`QuantAttentionProducts` against torch's own attention and a plain transcription of its formula."""

from __future__ import annotations

import math

import pytest
import torch
from reference import lsq
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.testing import assert_close

from hf_saq.layers import QuantAttentionProducts
from hf_saq.quantizers import LSQQuantizer, QuantizerSettings

SCALES = {"query": 0.31, "key": 0.27, "value": 0.4, "probability": 0.06}
BITS = 4
Q, K, V, MASK = (3, 4, 5, 6), (3, 2, 7, 6), (3, 2, 7, 8), (3, 1, 5, 7)
"""Four query heads on two heads of keys and values, of different widths."""


def operands(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (Q, K, V, MASK))


def quantizer(operand: str) -> LSQQuantizer:
    made = LSQQuantizer(QuantizerSettings(BITS, "activation", signed=operand != "probability"))
    made.initialize(torch.ones(1))
    made.double().scale.data.fill_(SCALES[operand])
    return made


def products(*left_out: str) -> QuantAttentionProducts:
    return QuantAttentionProducts(
        **{f"{operand}_quantizer": None if operand in left_out else quantizer(operand) for operand in SCALES}
    ).eval()


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scales: dict[str, Tensor], scaling, softcap):
    """One head after the other, each operand by the formula of LSQ."""

    def q(operand: str, x: Tensor, elements: int) -> Tensor:
        low, high = (0, 2**BITS - 1) if operand == "probability" else (-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
        return lsq(x, scales[operand], low, high, 1 / math.sqrt(elements * high)) if operand in scales else x

    per_sample = {name: math.prod(shape[1:]) for name, shape in (("query", Q), ("key", K), ("value", V))}
    outputs, probabilities = [], []
    for head in range(Q[1]):
        shared = head * K[1] // Q[1]
        scores = q("query", query[:, head], per_sample["query"]) @ q("key", key[:, shared], per_sample["key"]).mT
        scores = scores * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        exponentials = torch.exp(scores + mask[:, 0])
        p = exponentials / exponentials.sum(-1, keepdim=True)
        p = q("probability", p, Q[1] * Q[2] * K[2])
        probabilities.append(p)
        outputs.append(p @ q("value", value[:, shared], per_sample["value"]))
    return torch.stack(outputs, 2), torch.stack(probabilities, 1)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_without_quantizers_it_is_torchs_attention(masked: bool, scaling: float | None):
    query, key, value, mask = operands()
    mask = mask if masked else None
    found, probabilities = products(*SCALES)(query, key, value, mask, scaling=scaling)
    expected = scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    assert_close(found, expected.transpose(1, 2), rtol=0, atol=1e-12)
    assert found.is_contiguous()
    assert_close(probabilities.sum(-1), torch.ones(Q[:3], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("left_out", [(), ("query", "key"), ("probability", "value")], ids=["all", "pv", "qk"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_output_and_gradients_are_those_of_the_formula(left_out: tuple[str, ...], softcap: float | None):
    query, key, value, mask = (x.requires_grad_() for x in operands())
    scales = {n: torch.tensor([s], dtype=torch.float64, requires_grad=True) for n, s in SCALES.items()}
    scales = {name: scale for name, scale in scales.items() if name not in left_out}
    expected = plain(query, key, value, mask, scales, 0.5, softcap)
    layer = products(*left_out)
    found = layer(query, key, value, mask, scaling=0.5, softcap=softcap)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=0, atol=1e-12)

    ours = [getattr(layer, f"{name}_quantizer").scale for name in scales]
    weights = torch.randn(found[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    of_ours = torch.autograd.grad((found[0] * weights).sum(), [query, key, value, mask, *ours])
    of_plain = torch.autograd.grad((expected[0] * weights).sum(), [query, key, value, mask, *scales.values()])
    for a, b in zip(of_ours, of_plain, strict=True):
        assert b.abs().sum() > 0
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_dropout_comes_after_the_quantizer_and_only_in_training():
    query, key, value, mask = operands()
    layer = products()
    without = layer(query, key, value, mask, dropout=0.5)[1]
    torch.manual_seed(3)
    found, probabilities = layer.train()(query, key, value, mask, dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(probabilities, dropout(without, 0.5))
    assert probabilities.max() > without.max() and (probabilities == 0).sum() > (without == 0).sum()
    assert_close(found, (probabilities @ layer.value_quantizer(value).repeat_interleave(2, 1)).transpose(1, 2))


def test_bfloat16_stays_bfloat16():
    query, key, value, mask = (x.bfloat16() for x in operands())
    layer = products().float()
    output, probabilities = layer(query, key, value, mask)
    assert output.dtype == probabilities.dtype == torch.bfloat16
    expected = layer(query.float(), key.float(), value.float(), mask.float())[0]
    assert (output.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_left_in_float_for_good():
    layer = products()
    assert len(layer.own_quantizers()) == 4 and len(layer.state_dict()) == 8
    layer.leave_in_float()
    assert not layer.own_quantizers() and not layer.state_dict()
    query, key, value, mask = operands()
    expected = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)
    assert_close(layer(query, key, value, mask)[0], expected, rtol=0, atol=1e-12)

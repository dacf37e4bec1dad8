"""Codes and bytes against a bit stream written with Python integers."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_saq.layers.packing import pack_codes, packed_size, unpack_codes

every_bits = pytest.mark.parametrize("bits", range(2, 9), ids=lambda bits: f"{bits}bit")
every_sign = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
SHAPES = [(0,), (1,), (7,), (8,), (9,), (3, 5), (4, 3, 3, 3), (2, 0, 3), ()]


def bounds(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def reference_bytes(codes: list[int], bits: int, signed: bool) -> list[int]:
    """The layout of the docstring, one bit at a time."""
    stream = 0
    for i, code in enumerate(codes):
        stored = code + 2 ** (bits - 1) if signed else code
        for j in range(bits):
            stream |= (stored >> j & 1) << (i * bits + j)
    return [stream >> 8 * i & 255 for i in range(math.ceil(len(codes) * bits / 8))]


def random_codes(shape: tuple[int, ...], bits: int, signed: bool, seed: int = 0) -> Tensor:
    low, high = bounds(bits, signed)
    generator = random.Random(seed)
    count = math.prod(shape)
    # The bounds themselves come first: they are where masks and signs go wrong.
    values = ([low, high] + [generator.randint(low, high) for _ in range(count)])[:count]
    return torch.tensor(values, dtype=torch.int16).reshape(shape)


@every_bits
@every_sign
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_and_comes_back(bits: int, signed: bool, shape: tuple[int, ...]):
    codes = random_codes(shape, bits, signed)
    packed = pack_codes(codes, bits, signed)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == reference_bytes(codes.flatten().tolist(), bits, signed)
    assert packed.shape == (packed_size(codes.numel(), bits),)
    unpacked = unpack_codes(packed, bits, shape, signed)
    assert unpacked.dtype == torch.int16 and torch.equal(unpacked, codes)


@every_bits
@every_sign
def test_every_code_in_every_position(bits: int, signed: bool):
    low, high = bounds(bits, signed)
    codes = torch.arange(low, high + 1, dtype=torch.int16)
    codes = torch.cat([codes.roll(i) for i in range(8)])  # each code meets each of the eight places of a group
    packed = pack_codes(codes, bits, signed)
    assert packed.tolist() == reference_bytes(codes.tolist(), bits, signed)
    assert torch.equal(unpack_codes(packed, bits, tuple(codes.shape), signed), codes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    shape=st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.int16, torch.int32, torch.int64]),
)
def test_any_shape_comes_back(bits: int, signed: bool, shape: tuple[int, ...], seed: int, dtype: torch.dtype):
    codes = random_codes(shape, bits, signed, seed)
    packed = pack_codes(codes.to(dtype), bits, signed)
    assert packed.tolist() == reference_bytes(codes.flatten().tolist(), bits, signed)
    assert torch.equal(unpack_codes(packed, bits, shape, signed), codes)


def test_the_drawing_of_the_docstring():
    """Three bits; all ones in one code at a time show where its bits lie, highest bit of each byte first."""
    owners = ["2 2 1 1 1 0 0 0", "5 4 4 4 3 3 3 2", "7 7 7 6 6 6 5 5"]
    for i in range(8):
        codes = torch.zeros(8, dtype=torch.int16)
        codes[i] = 7
        drawn = [sum((owner == str(i)) << (7 - j) for j, owner in enumerate(byte.split())) for byte in owners]
        assert pack_codes(codes, 3, signed=False).tolist() == drawn


def test_known_bytes():
    assert pack_codes(torch.tensor([1, 2, 3, 15]), 4, signed=False).tolist() == [0x21, 0xF3]
    assert pack_codes(torch.tensor([-8, 7, 0]), 4, signed=True).tolist() == [0xF0, 0x08]  # padded with zero bits
    assert pack_codes(torch.tensor([-2, -1, 0, 1]), 2, signed=True).tolist() == [0b11100100]
    assert pack_codes(torch.tensor([-128, 127]), 8, signed=True).tolist() == [0, 255]


def test_strided_codes_are_packed_in_row_major_order():
    codes = random_codes((6, 5), 5, True)
    assert torch.equal(pack_codes(codes.t(), 5, True), pack_codes(codes.t().contiguous(), 5, True))


def test_sizes_on_disk():
    assert [packed_size(1000, bits) for bits in range(2, 9)] == [250, 375, 500, 625, 750, 875, 1000]
    assert [packed_size(count, 3) for count in (0, 1, 2, 3, 8, 9)] == [0, 1, 1, 2, 3, 4]


@every_bits
@every_sign
def test_codes_that_do_not_fit_raise(bits: int, signed: bool):
    low, high = bounds(bits, signed)
    name = "signed" if signed else "unsigned"
    for found in (low - 1, high + 1):
        codes = torch.tensor([low, found, high])
        with pytest.raises(ValueError, match=rf"codes span .*{found}.*, which does not fit {name} {bits}-bit codes\."):
            pack_codes(codes, bits, signed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64], ids=str)
def test_codes_that_are_not_integers_raise(dtype: torch.dtype):
    with pytest.raises(ValueError, match=rf"codes are {dtype}; expected an integer type\."):
        pack_codes(torch.ones(8).to(dtype), 4, True)


@pytest.mark.parametrize("bits", [0, 1, 9, 16, 4.0, True], ids=str)
def test_bits_outside_of_2_to_8_raise(bits):
    with pytest.raises(ValueError, match=rf"bits={bits!r}; expected an integer from 2 to 8\."):
        pack_codes(torch.zeros(8, dtype=torch.int16), bits, True)
    with pytest.raises(ValueError, match=rf"bits={bits!r}; expected an integer from 2 to 8\."):
        unpack_codes(torch.zeros(8, dtype=torch.uint8), bits, (8,), True)


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(5, dtype=torch.uint8),
        torch.zeros(7, dtype=torch.uint8),
        torch.zeros(6, dtype=torch.int8),
        torch.zeros(6),
        torch.zeros(2, 3, dtype=torch.uint8),
    ],
    ids=["short", "long", "int8", "float", "two dimensions"],
)
def test_packed_tensors_that_do_not_fit_raise(packed: Tensor):
    with pytest.raises(ValueError) as error:
        unpack_codes(packed, 3, (4, 4), True)
    assert str(error.value) == (
        f"packed codes are {packed.dtype} of shape {tuple(packed.shape)}; expected torch.uint8 of shape (6,) for 16 "
        "codes of 3 bits."
    )

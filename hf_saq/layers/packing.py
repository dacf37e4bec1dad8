"""Pack integer codes of 2 to 8 bits into bytes, and unpack them, bit-exact.

Layout: the codes of a tensor, in row-major order, form one stream of bits; code `i` takes bits `i*b .. i*b + b - 1`,
lowest bit first, and bit `j` of the stream is bit `j % 8` of byte `j // 8`. Eight codes fill `b` whole bytes:

    b = 3      byte 0            byte 1            byte 2
    bit      7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
    code     2 2 1 1 1 0 0 0   5 4 4 4 3 3 3 2   7 7 7 6 6 6 5 5

The last byte is padded with zero bits. Signed codes are stored with `2^(b-1)` added, so that `qmin` is 0.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..quantizers import check_bits

CODES_PER_GROUP = 8


def packed_size(count: int, bits: int) -> int:
    """Count the bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_codes(codes: Tensor, bits: int, signed: bool) -> Tensor:
    """Pack integer `codes` of any shape into uint8 `(ceil(numel * bits / 8),)`.

    Raises:
        ValueError: If `bits` is not 2 to 8, `codes` are not integers or one of them does not fit into `bits` bits.
    """
    check_bits("bits", bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"codes are {codes.dtype}; expected an integer type.")
    stored = codes.reshape(-1).to(torch.int64) + (2 ** (bits - 1) if signed else 0)
    if stored.numel() and not (0 <= int(stored.min()) and int(stored.max()) < 2**bits):
        raise ValueError(
            f"codes span {int(codes.min())}..{int(codes.max())}, which does not fit "
            f"{'signed' if signed else 'unsigned'} {bits}-bit codes."
        )
    groups = torch.nn.functional.pad(stored, (0, -stored.numel() % CODES_PER_GROUP)).view(-1, CODES_PER_GROUP)
    # Eight codes of at most 8 bits fit one 64-bit word; at 8 bits the highest lands in the sign bit, harmlessly.
    word = torch.zeros(groups.shape[0], dtype=torch.int64, device=codes.device)
    for i in range(CODES_PER_GROUP):
        word |= groups[:, i] << (bits * i)
    taken = torch.stack([(word >> (8 * i)) & 0xFF for i in range(bits)], dim=1)
    return taken.to(torch.uint8).reshape(-1)[: packed_size(codes.numel(), bits)]


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...], signed: bool) -> Tensor:
    """Unpack the int16 codes of `shape` that [`pack_codes`] packed.

    Raises:
        ValueError: If `bits` is not 2 to 8, or `packed` not uint8 of the size that `shape` and `bits` ask for.
    """
    check_bits("bits", bits)
    count = torch.Size(shape).numel()
    size = packed_size(count, bits)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        raise ValueError(
            f"packed codes are {packed.dtype} of shape {tuple(packed.shape)}; expected torch.uint8 of shape ({size},) "
            f"for {count} codes of {bits} bits."
        )
    codes = _one_byte_each(packed, bits)[:count].reshape(shape).to(torch.int16)
    return codes - 2 ** (bits - 1) if signed else codes


def unpack_as_float(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Unpack what [`unpack_codes`] does of signed codes, as float32: layers that run from codes do so at each call.

    It takes `packed` for checked.
    """
    stored = _one_byte_each(packed, bits)[: torch.Size(shape).numel()].reshape(shape)
    if torch.jit.is_tracing():
        return stored.to(torch.float32) - 2 ** (bits - 1)
    stored = stored.view(torch.int8)
    # Subtracted in bytes, which is a quarter of the work; at 8 bits that wraps around to the right code.
    return (stored - (2 ** (bits - 1) if bits < 8 else -128)).to(torch.float32)


def _one_byte_each(packed: Tensor, bits: int) -> Tensor:
    """Give each stored code a byte of its own: uint8 `(count,)`, with up to seven more of them at the end.

    Words of several codes are pulled apart, half by half: a few operations over whole words.
    """
    if bits == 8:
        return packed
    if torch.jit.is_tracing():
        return _one_byte_each_traced(packed, bits)
    if bits in _WORDS:
        words = packed.to(_WORDS[bits])
    else:
        stream = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits)
        groups = torch.zeros(stream.shape[0], CODES_PER_GROUP, dtype=torch.uint8, device=packed.device)
        for i in range(bits):  # column by column: torch copies short rows slowly
            groups[:, i] = stream[:, i]
        words = _lowest_byte_first(groups).view(torch.int64).reshape(-1)
    half = words.element_size() // 2  # codes in half a word
    while half:
        low = sum((2 ** (half * bits) - 1) << place for place in range(0, 8 * words.element_size(), 16 * half))
        moved = (words << half * (8 - bits)).bitwise_and_(low << 8 * half)
        words = (words & low).bitwise_or_(moved)
        half //= 2
    return _lowest_byte_first(words.view(torch.uint8).view(-1, words.element_size())).reshape(-1)


def _one_byte_each_traced(packed: Tensor, bits: int) -> Tensor:
    """Do what [`_one_byte_each`] does without reading memory as another type, which graphs of `torch.jit` cannot."""
    stream = torch.nn.functional.pad(packed, (0, -packed.numel() % bits)).view(-1, bits).to(torch.int64)
    word = stream[:, 0]
    for i in range(1, bits):
        word = word | stream[:, i] << 8 * i
    codes = [(word >> bits * i) & 2**bits - 1 for i in range(CODES_PER_GROUP)]
    return torch.stack(codes, dim=1).to(torch.uint8).reshape(-1)


_WORDS = {2: torch.int32, 4: torch.int16}
"""Words that hold the codes of one byte when each has a byte of its own."""


def _lowest_byte_first(words: Tensor) -> Tensor:
    """Bring the bytes `(words, bytes of a word)` from the order of this machine to lowest byte first, or back."""
    return words if sys.byteorder == "little" else words.flip(1)

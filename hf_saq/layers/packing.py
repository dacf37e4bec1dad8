"""Pack integer codes of 2 to 8 bits into bytes, and unpack them, bit-exact.

Layout: the codes of a tensor, in row-major order, form one stream of bits; code `i` takes bits `i*b .. i*b + b - 1`,
lowest bit first, and bit `j` of the stream is bit `j % 8` of byte `j // 8`. Eight codes fill `b` whole bytes:

    b = 3      byte 0            byte 1            byte 2
    bit      7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0   7 6 5 4 3 2 1 0
    code     2 2 1 1 1 0 0 0   5 4 4 4 3 3 3 2   7 7 7 6 6 6 5 5

The last byte is padded with zero bits. Signed codes are stored with `2^(b-1)` added, so that `qmin` is 0.
"""

from __future__ import annotations

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
    stream = torch.nn.functional.pad(packed, (0, -size % bits)).view(-1, bits)
    word = torch.zeros(stream.shape[0], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        word |= stream[:, i].to(torch.int64) << (8 * i)
    mask = 2**bits - 1
    codes = torch.empty(stream.shape[0], CODES_PER_GROUP, dtype=torch.int16, device=packed.device)
    for i in range(CODES_PER_GROUP):
        codes[:, i] = (word >> (bits * i)) & mask
    codes = codes.reshape(-1)[:count].reshape(shape)
    return codes - 2 ** (bits - 1) if signed else codes

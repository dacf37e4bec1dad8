"""Mutations of a packed checkpoint, each a function of a random generator and the checkpoint's directory."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def _header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _flip(content: bytes, rng: random.Random, start: int, end: int) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        damaged[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


# Bytes -----------------------------------------------------------------------------------------------------------


def cut_off(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((rng.randrange(len(content)), rng.randrange(20), len(content) - rng.randrange(1, 9)))]


def flip_anywhere(content: bytes, rng: random.Random) -> bytes:
    return _flip(content, rng, 0, len(content))


def flip_in_header(content: bytes, rng: random.Random) -> bytes:
    return _flip(content, rng, 0, _header_size(content))


def flip_in_data(content: bytes, rng: random.Random) -> bytes:
    return _flip(content, rng, _header_size(content), len(content))


def other_header_size(content: bytes, rng: random.Random) -> bytes:
    size = _header_size(content) - 8
    sizes = (0, 1, size - 1, size + 1, len(content), 10**8, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 1)
    return rng.choice(sizes).to_bytes(8, "little") + content[8:]


def longer(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.choice((1, 8, 4096)))


def overwritten(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 16, 512))
    start = rng.randrange(len(content) - size)
    return content[:start] + rng.choice((bytes(size), rng.randbytes(size))) + content[start + size :]


def blocks_swapped(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 4, 32))
    first, second = sorted(rng.sample(range(0, len(content) - size, size), 2))
    parts = (content[:first], content[second : second + size], content[first + size : second])
    return b"".join(parts) + content[first : first + size] + content[second + size :]


def huge_header(content: bytes, rng: random.Random) -> bytes:
    """A header that says of itself what it likes: megabytes of names, or deep nesting."""
    header = json.loads(content[8 : _header_size(content)])
    kind = rng.randrange(3)
    if kind == 0:
        header["__metadata__"]["filler"] = "x" * 10**6
    elif kind == 1:
        header["__metadata__"]["hf_saq"] = "[" * 10**5
    else:
        header |= {f"filler{i}": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]} for i in range(1000)}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[_header_size(content) :]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    cut_off,
    flip_anywhere,
    flip_in_header,
    flip_in_data,
    other_header_size,
    longer,
    overwritten,
    blocks_swapped,
    huge_header,
)


# Tensors, in a file that is valid -----------------------------------------------------------------------------------


def other_shape(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    tensor = tensors[name].reshape(-1)
    shapes = [tensor[:-1], tensor.reshape(1, 1, -1), tensor.reshape(-1, 1), torch.cat([tensor, tensor]), tensor]
    other = [shape for shape in shapes if shape.shape != tensors[name].shape]
    tensors[name] = rng.choice(other).clone()


def other_type(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    types = {torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.bool} - {tensors[name].dtype}
    tensors[name] = tensors[name].to(rng.choice(sorted(types, key=str)))


def other_bits(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    same_size = {torch.uint8: torch.int8, torch.int8: torch.uint8, torch.float32: torch.int32}
    tensors[name] = tensors[name].view(same_size.get(tensors[name].dtype, torch.uint8))


def other_value(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    tensor = tensors[name]
    if not tensor.numel():
        return
    value = rng.choice((0, 1, -1)) if not tensor.is_floating_point() else rng.choice((0.0, -1.0, float("nan"), 1e38))
    tensor.reshape(-1)[rng.randrange(tensor.numel()) :][:1] = value if tensor.dtype != torch.uint8 else abs(value)


def gone(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    del tensors[name]


def renamed(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    tensors[rng.choice((f"{name}_", name[1:], f"vit.{name}"))] = tensors.pop(name)


def exchanged(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    alike = [
        n for n, t in tensors.items() if n != name and (t.shape, t.dtype) == (tensors[name].shape, tensors[name].dtype)
    ]
    other = rng.choice(alike or list(tensors))
    tensors[name], tensors[other] = tensors[other], tensors[name]


def one_more(tensors: dict[str, Tensor], name: str, rng: random.Random) -> None:
    tensors[rng.choice((f"{name}.more", "classifier.weight_offset", "more"))] = torch.ones(3)


TENSORS = (other_shape, other_type, other_bits, other_value, gone, renamed, exchanged, one_more)


# config.json -------------------------------------------------------------------------------------------------------


def other_field(config: dict, rng: random.Random) -> None:
    values = (None, 0, 1, 3, 4.5, -1, True, "", "gelu", "relu", "lsq", "float", "channel", [], {}, [1, "x"], "saq")
    config[rng.choice(sorted(config))] = rng.choice(values)


def field_gone(config: dict, rng: random.Random) -> None:
    del config[rng.choice(sorted(config))]


def field_renamed(config: dict, rng: random.Random) -> None:
    name = rng.choice(sorted(config))
    config[f"{name}_"] = config.pop(name)


CONFIGS = (other_field, field_gone, field_renamed)


def damage(directory: Path, rng: random.Random) -> tuple[str, str]:
    """Change one file of a packed checkpoint. Returns the file and what was done to it."""
    kind = rng.random()
    if kind < 0.45:
        change = rng.choice(BYTES)
        path = directory / WEIGHTS
        path.write_bytes(change(path.read_bytes(), rng))
    elif kind < 0.7:
        change, path = rng.choice(TENSORS), directory / WEIGHTS
        with safe_open(path, "pt") as file:
            metadata = file.metadata() if rng.random() < 0.9 else {"format": "pt"}
        tensors = load_file(path)
        change(tensors, rng.choice(sorted(tensors)), rng)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    elif kind < 0.85:
        change, path = rng.choice((cut_off, flip_anywhere, overwritten, blocks_swapped)), directory / CONFIG
        path.write_bytes(change(path.read_bytes(), rng))
    else:
        change, path = rng.choice(CONFIGS), directory / CONFIG
        config = json.loads(path.read_text())
        change(config["quantization_config"] if rng.random() < 0.5 else config, rng)
        path.write_text(json.dumps(config))
    return path.name, change.__name__

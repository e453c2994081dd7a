"""The dropout masks of `ops.random` inside kernels: the same hash, so the same masks, without a byte of memory.

One hash serves a column of the left half of the features and the same one of the right half, so a program works on a
tile of each half.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.random import dropped_levels, stream_number

GOLDEN = tl.constexpr(0x9E3779B9)


class Dropout(NamedTuple):
    """Which entries of a matrix are dropped.

    Attributes:
        keys: [n] int32 token keys.
        salt: number of the stream.
        dropped: of 2^16 levels.
    """

    keys: Tensor
    salt: int
    dropped: int


def dropout_of(keys: Tensor | None, p: float, stream: str) -> Dropout | None:
    """Return the dropout of `ops.random.dropout` with these arguments; None where nothing is dropped."""
    dropped = dropped_levels(p)
    return None if keys is None or dropped == 0 else Dropout(keys, stream_number(stream), dropped)


def mask_settings(dropout: Dropout | None) -> dict[str, Any]:
    """Return what a kernel takes of a dropout, besides its keys."""
    if dropout is None:
        return {"salt": 0, "dropped": 0, "DROP": False}
    return {"salt": dropout.salt, "dropped": dropout.dropped, "DROP": True}


@triton.jit
def mix(z):
    """Mix uint32 values (`ops.random._hash`)."""
    z = z ^ (z >> 16)
    z = z * 0x7FEB352D
    z = z ^ (z >> 15)
    z = z * 0x846CA68B
    return z ^ (z >> 16)


@triton.jit
def token_keys(keys, rows, live, expert, salt, FOLD: tl.constexpr):
    """Return the keys of tokens `rows` for one stream's number, the salt, of an expert's own where FOLD."""
    key = tl.load(keys + rows, mask=live, other=0).to(tl.uint32, bitcast=True)
    if FOLD:
        key = mix(key + (expert + 1).to(tl.uint32) * GOLDEN)  # an expert's own stream, `ops.random.fold`
    return mix(key ^ salt.to(tl.uint32))


@triton.jit
def mask_bits(key, column):
    """Return random bits [n, F], 16 for a column of each half, from keys [n] and columns [F] of a half."""
    bits = mix(key[:, None] + column.to(tl.uint32)[None, :] * GOLDEN)
    return bits ^ 0x80008000  # `ops.random` reads signed numbers: both moved to 0


@triton.jit
def dropped_out(x, bits, dropped, SIDE: tl.constexpr):
    """Drop entries of x [n, F], columns of the left (0) or right (1) half, and scale the others."""
    level = (bits >> 16) if SIDE else (bits & 0xFFFF)
    scale = 65536.0 / (65536 - dropped)
    return tl.where(level >= dropped.to(tl.uint32), x.to(tl.float32) * scale, 0.0).to(x.dtype)


@contextmanager
def unlaunched() -> Iterator[None]:
    """Launch no kernel inside the `with` block: tensors there have shapes and no data."""
    kind: Any = type(mix)  # Triton's compiled functions, or its interpreter's
    run = kind.run
    kind.run = lambda *_, **__: None
    try:
        yield
    finally:
        kind.run = run

"""The dropout masks of `ops.random` inside kernels: the same hash, so the same masks, without a byte of memory."""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B9)


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
def dropped_out(x, key, feature, dropped):
    """Drop entries of x [n, F], of the given feature numbers [F], and scale the others.

    One hash serves two features, its low half the even one. It is computed for each of them again: so the mask exists
    in whatever layout x has, and no entry changes its thread.
    """
    bits = mix(key[:, None] + (feature // 2).to(tl.uint32)[None, :] * GOLDEN)
    level = ((bits >> ((feature % 2) * 16).to(tl.uint32)[None, :]) & 0xFFFF) ^ 0x8000  # signed 16 bits, moved to 0
    scale = 65536.0 / (65536 - dropped)
    return tl.where(level >= dropped.to(tl.uint32), x.to(tl.float32) * scale, 0.0).to(x.dtype)

"""Counter-based random streams: a value depends on its token, feature and stream, never on its neighbours.

Each token of an adapter has a 32-bit key made of (run seed, adapter, optimizer step, row within the step, position).
A stream (one module's dropout, say) mixes its own number into that key, and column j hashes key + j * golden ratio.
So neither the company in the batch, nor its order, nor the micro-batch size changes a single value, and a kernel can
make the same mask again in backward instead of keeping it.

The hash is a 32-bit xor-shift-multiply finaliser with published low-bias constants
(https://nullprogram.com/blog/2018/07/31/). One hash serves two features, 16 bits each, so probabilities are multiples
of 2^-16: feature j of the first half and feature j of the second, so that a kernel reads both side by side in memory
and hashes once.
"""

from __future__ import annotations

import hashlib
import zlib

import torch
from torch import Tensor

LEVELS = 1 << 16
GOLDEN = -0x61C88647  # 0x9E3779B9 as int32


def _hash(z: Tensor) -> Tensor:
    """Mix int32 values in place. torch shifts signed integers arithmetically, hence the masks."""
    z ^= (z >> 16) & 0xFFFF
    z *= 0x7FEB352D
    z ^= (z >> 15) & 0x1FFFF
    z *= -0x7B935975  # 0x846CA68B as int32
    z ^= (z >> 16) & 0xFFFF
    return z


def _int32(value: int) -> int:
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def stable_hash(*parts: object) -> int:
    """Return a 32-bit signed number from any printable parts, the same in every process and version."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)


def stream_keys(seed: int, adapter: str, step: int, rows: Tensor, positions: Tensor) -> Tensor:
    """Return the key of each token.

    Args:
        seed: of the run.
        adapter: name.
        step: optimizer step.
        rows: [n] row of each token within its optimizer step.
        positions: [n] position of each token within its row.

    Returns:
        [n] int32.
    """
    return token_keys(stable_hash(seed, adapter, step), rows, positions)


def token_keys(begun: int | Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Return the key [n] of each token, from `stable_hash` of its run's seed, adapter and optimizer step."""
    keys = rows.to(torch.int32) * GOLDEN + begun
    return _hash(_hash(keys) + positions.to(torch.int32) * GOLDEN)


def fold(keys: Tensor, index: Tensor) -> Tensor:
    """Return keys [n] of an independent stream for each value of index [n], an expert number for example."""
    return _hash(keys + (index.to(torch.int32) + 1) * GOLDEN)


def stream_number(stream: str) -> int:
    """Return the 32-bit signed number of a stream's name."""
    return _int32(zlib.crc32(stream.encode()))


def dropped_levels(p: float) -> int:
    """Return how many of the 2^16 levels a dropout of probability p drops."""
    return min(round(p * LEVELS), LEVELS - 1)


def random_bits(keys: Tensor, features: int, stream: str) -> Tensor:
    """Return [n, features] int16, uniform over all 2^16 values."""
    key = _hash(keys ^ stream_number(stream))
    counters = torch.arange((features + 1) // 2, dtype=torch.int32, device=keys.device) * GOLDEN
    halves = _hash(key[:, None] + counters).view(torch.int16).unflatten(1, (-1, 2))
    return halves.transpose(1, 2).flatten(1)[:, :features]


def dropout(x: Tensor, keys: Tensor, p: float, stream: str) -> Tensor:
    """Zero entries of x with probability p and scale the others by 1 / (1 - p).

    Args:
        x: [n, D].
        keys: [n] int32 token keys.
        p: probability in [0, 1); rounded to a multiple of 2^-16.
        stream: name of the stream; equal names give equal masks.
    """
    dropped = dropped_levels(p)
    if dropped == 0:
        return x
    keep = random_bits(keys, x.shape[-1], stream) >= dropped - LEVELS // 2
    return torch.where(keep, x * (LEVELS / (LEVELS - dropped)), 0)


def jitter(x: Tensor, keys: Tensor, noise: float, stream: str) -> Tensor:
    """Multiply x [n, D] by uniform(1 - noise, 1 + noise), out of place (backward needs x as it was)."""
    uniform = (random_bits(keys, x.shape[-1], stream).to(torch.float32) + 0.5) / (LEVELS // 2)
    return x * (1 + noise * uniform).to(x.dtype)

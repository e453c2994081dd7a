"""Rotary embeddings of queries and keys in one kernel each way.

    y_1 = x_1 cos_1 - x_2 sin_1        y_2 = x_2 cos_2 + x_1 sin_2      of the halves of each head

Results and gradients lie in memory by tokens, as projections leave queries and keys and read their gradients. Plain
torch lays the gradients out by heads, and copies turn them back.

Shapes: B rows, H heads of queries, K of keys, T tokens, d features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.fused.products import unit_stride


@triton.jit
def _turn(
    x, out, x_head, out_head, heads, half, f, cos_1, sin_1, cos_2, sin_2, BACKWARD: tl.constexpr, BH: tl.constexpr
):
    for first in range(0, heads, BH):
        h = first + tl.arange(0, BH)
        both = (h < heads)[:, None] & (f < half)[None, :]
        place = x + h[:, None] * x_head + f[None, :]
        x_1 = tl.load(place, mask=both, other=0.0).to(tl.float32)
        x_2 = tl.load(place + half, mask=both, other=0.0).to(tl.float32)
        if BACKWARD:
            y_1 = x_1 * cos_1 + x_2 * sin_2
            y_2 = x_2 * cos_2 - x_1 * sin_1
        else:
            y_1 = x_1 * cos_1 - x_2 * sin_1
            y_2 = x_2 * cos_2 + x_1 * sin_2
        place = out + h[:, None] * out_head + f[None, :]
        tl.store(place, y_1.to(out.dtype.element_ty), mask=both)
        tl.store(place + half, y_2.to(out.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=["tokens"])
def _rotary(
    q, k, q_out, k_out, cos, sin, tokens, half, q_heads, k_heads,
    q_row, q_head, q_token, k_row, k_head, k_token,
    qo_row, qo_head, qo_token, ko_row, ko_head, ko_token, cos_row, cos_token,
    BACKWARD: tl.constexpr, BH: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    b, t = (tl.program_id(0) // tokens).to(tl.int64), (tl.program_id(0) % tokens).to(tl.int64)
    f = tl.arange(0, BF)
    own = b * cos_row + t * cos_token + f
    inside = f < half
    cos_1 = tl.load(cos + own, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + own + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + own, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + own + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    _turn(
        q + b * q_row + t * q_token, q_out + b * qo_row + t * qo_token, q_head, qo_head, q_heads, half, f, cos_1, sin_1,
        cos_2, sin_2, BACKWARD, BH,
    )  # fmt: skip
    _turn(
        k + b * k_row + t * k_token, k_out + b * ko_row + t * ko_token, k_head, ko_head, k_heads, half, f, cos_1, sin_1,
        cos_2, sin_2, BACKWARD, BH,
    )  # fmt: skip


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, ...]:
    rows, heads, tokens, width = q.shape
    out = tuple(x.new_empty((rows, tokens, x.shape[1], width)).transpose(1, 2) for x in (q, k))
    if q.numel():
        strides = [stride for tensor in (q, k, *out) for stride in tensor.stride()[:3]]
        row = cos.stride(0) if len(cos) > 1 else 0
        _rotary[(rows * tokens,)](
            q, k, *out, cos, sin, tokens, width // 2, heads, k.shape[1], *strides, row, cos.stride(1),
            BACKWARD=backward, BH=min(16, triton.next_power_of_2(heads)), BF=triton.next_power_of_2(width // 2),
        )  # fmt: skip
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_rotate(unit_stride(q_grad), unit_stride(k_grad), cos, sin, True), None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys [B, H or K, T, d] with their positions.

    Args:
        q: [B, H, T, d], features side by side in memory.
        k: [B, K, T, d], likewise.
        cos, sin: [B or 1, T, d], likewise, alike in their strides; they get no gradient.
    """
    return _Rotary.apply(q, k, cos, sin)

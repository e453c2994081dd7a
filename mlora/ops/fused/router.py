"""A router's logits in float32 from activations of any dtype, which are read as they are and never converted in memory.

Products run in three terms, whose sum is float32's to a few units in the last place: float32 activations in TF32's
"tf32x3"; bfloat16 ones with the other side in three parts of bfloat16, as nothing is lost of themselves.

Shapes: n tokens, D hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.fused.products import VARYING, shares, unit_stride


@triton.jit
def _in_parts(activations, other, left: tl.constexpr):
    """Return the product of bfloat16 activations and float32 values, either of which is on the left."""
    total = _ordered(activations, other.to(tl.bfloat16), left)
    rest = other - other.to(tl.bfloat16).to(tl.float32)
    total += _ordered(activations, rest.to(tl.bfloat16), left)
    rest -= rest.to(tl.bfloat16).to(tl.float32)
    return total + _ordered(activations, rest.to(tl.bfloat16), left)


@triton.jit
def _ordered(activations, other, left: tl.constexpr):
    if left:
        return tl.dot(activations, other)
    else:
        return tl.dot(other, activations)


@triton.jit(do_not_specialize=VARYING)
def _router(
    x, router, logits, tokens, features, experts, x_token, share, BT: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    e = tl.arange(0, BE)
    live, wanted = t < tokens, e < experts
    total = tl.zeros((BT, BE), tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, features), BF):
        f = start + tl.arange(0, BF)
        inside = f < features
        part = tl.load(x + t[:, None] * x_token + f[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        own = tl.load(router + e[:, None] * features + f[None, :], mask=wanted[:, None] & inside[None, :], other=0.0)
        if part.dtype == tl.bfloat16:
            total += _in_parts(part, tl.trans(own), True)
        else:
            total += tl.dot(part.to(tl.float32), tl.trans(own), input_precision="tf32x3")
    place = logits + (tl.program_id(1) * tokens.to(tl.int64) + t)[:, None] * experts + e[None, :]
    tl.store(place, total, mask=live[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=VARYING)
def _router_grad(
    grad, x, router, x_grad, router_grad, tokens, features, experts, x_token, share, BT: tl.constexpr,
    BF: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    e = tl.arange(0, BE)
    inside, wanted = f < features, e < experts
    columns = wanted[:, None] & inside[None, :]
    own = tl.load(router + e[:, None] * features + f[None, :], mask=columns, other=0.0)
    total = tl.zeros((BE, BF), tl.float32)
    first = tl.program_id(1) * share
    for base in range(first, tl.minimum(first + share, tokens), BT):
        t = (base + tl.arange(0, BT)).to(tl.int64)
        live = t < tokens
        both = live[:, None] & inside[None, :]
        g = tl.load(grad + t[:, None] * experts + e[None, :], mask=live[:, None] & wanted[None, :], other=0.0)
        part = tl.load(x + t[:, None] * x_token + f[None, :], mask=both, other=0.0)
        if part.dtype == tl.bfloat16:  # which TF32 is finer than
            total += _in_parts(part, tl.trans(g), False)
            spread = tl.dot(g, own, input_precision="tf32")
        else:
            total += tl.dot(tl.trans(g), part.to(tl.float32), input_precision="tf32x3")
            spread = tl.dot(g, own, input_precision="tf32x3")
        tl.store(x_grad + t[:, None] * features + f[None, :], spread.to(x_grad.dtype.element_ty), mask=both)
    place = router_grad + tl.program_id(1).to(tl.int64) * experts * features
    tl.store(place + e[:, None] * features + f[None, :], total, mask=columns)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(x, router)
        tiles = triton.cdiv(len(x), 32)
        parts, share = shares(x.shape[1], 128, tiles)
        logits = x.new_empty((parts, len(x), len(router)), dtype=torch.float32)
        if len(x):
            _router[(tiles, parts)](
                x, router, logits, len(x), x.shape[1], len(router), x.stride(0), share, BT=32, BF=128,
                BE=_block(router), num_warps=2,
            )  # fmt: skip
        return logits.sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, router = ctx.saved_tensors
        tiles = triton.cdiv(x.shape[1], 128)
        parts, share = shares(max(len(x), 1), 32, tiles)
        x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        router_grad = router.new_empty((parts, *router.shape))
        _router_grad[(tiles, parts)](
            grad.contiguous(), x, router, x_grad, router_grad, len(x), x.shape[1], len(router), x.stride(0), share,
            BT=32, BF=128, BE=_block(router),
        )  # fmt: skip
        return x_grad, router_grad.sum(0)


def _block(router: Tensor) -> int:
    return max(16, triton.next_power_of_2(len(router)))


def fused_router_logits(x: Tensor, router: Tensor) -> Tensor:
    """Return R x [n, E] float32, from x [n, D] of any dtype and router [E, D] float32."""
    return _RouterLogits.apply(unit_stride(x), router.float().contiguous())

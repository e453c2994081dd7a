"""A router's logits in float32 from activations of any dtype, which are read as they are and never converted in memory.

Products run in three terms, whose sum is float32's to a few units in the last place: float32 activations in TF32's
"tf32x3"; bfloat16 ones with the other side in three parts of bfloat16, as nothing is lost of themselves.

Shapes: n tokens, D hidden, E experts, k choices; N = G n tokens of a group of G routers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.fused.products import VARYING, shares, unit_stride

WRITTEN, ADDED = (tl.constexpr(i) for i in (1, 2))
"""What becomes of the gradient of x; 0 for nothing."""


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
    x, routers, logits, tokens, features, experts, x_token, share, BT: tl.constexpr, BF: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    group = tl.program_id(2).to(tl.int64)
    own = tl.program_id(0) * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    live, wanted = own < tokens, e < experts
    t = group * tokens + own
    router = routers + group * experts * features
    total = tl.zeros((BT, BE), tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, features), BF):
        f = start + tl.arange(0, BF)
        inside = f < features
        part = tl.load(x + t[:, None] * x_token + f[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        row = tl.load(router + e[:, None] * features + f[None, :], mask=wanted[:, None] & inside[None, :], other=0.0)
        if part.dtype == tl.bfloat16:
            total += _in_parts(part, tl.trans(row), True)
        else:
            total += tl.dot(part.to(tl.float32), tl.trans(row), input_precision="tf32x3")
    place = logits + (tl.program_id(1) * tl.num_programs(2) * tokens.to(tl.int64) + t)[:, None] * experts + e[None, :]
    tl.store(place, total, mask=live[:, None] & wanted[None, :])


@triton.jit(do_not_specialize=["tokens", "parts"])
def _choose(
    partial, logits, weights, chosen, tokens, experts, parts, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    e = tl.arange(0, BE)
    live = t < tokens
    both = live[:, None] & (e < experts)[None, :]
    place = t[:, None] * experts + e[None, :]
    total = tl.zeros((BT, BE), tl.float32)
    for part in range(parts):
        total += tl.load(partial + part * tokens.to(tl.int64) * experts + place, mask=both, other=0.0)
    tl.store(logits + place, total, mask=both)
    ranked = tl.where((e < experts)[None, :], total, float("-inf"))
    first, one = tl.max(ranked, 1), tl.minimum(tl.argmax(ranked, 1), experts - 1)
    nan = tl.sum(tl.where(both & (total != total), total, 0.0), 1)  # 0 but where a logit is not a number
    tl.store(chosen + t * K, one.to(tl.int64), mask=live)
    if K == 2:
        ranked = tl.where(e[None, :] == one[:, None], float("-inf"), ranked)
        second, two = tl.max(ranked, 1), tl.minimum(tl.argmax(ranked, 1), experts - 1)
        ratio = tl.exp(second - first) + nan
        tl.store(weights + t * K, 1 / (1 + ratio), mask=live)
        tl.store(weights + t * K + 1, ratio / (1 + ratio), mask=live)
        tl.store(chosen + t * K + 1, two.to(tl.int64), mask=live)
    else:
        tl.store(weights + t * K, 1 + nan, mask=live)


@triton.jit(do_not_specialize=VARYING)
def _router_grad(
    grad, weights_grad, weights, chosen, x, routers, x_grad, routers_grad, tokens, features, experts, x_token, share,
    LOGITS: tl.constexpr, CHOSEN: tl.constexpr, INPUT: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
    BE: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2).to(tl.int64)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    e = tl.arange(0, BE)
    inside, wanted = f < features, e < experts
    columns = wanted[:, None] & inside[None, :]
    router = tl.load(routers + group * experts * features + e[:, None] * features + f[None, :], mask=columns, other=0.0)
    total = tl.zeros((BE, BF), tl.float32)
    first = tl.program_id(1) * share
    for base in range(first, tl.minimum(first + share, tokens), BT):
        own = base + tl.arange(0, BT)
        live = own < tokens
        t = group * tokens + own
        both = live[:, None] & inside[None, :]
        g = tl.zeros((BT, BE), tl.float32)
        if LOGITS:
            g += tl.load(grad + t[:, None] * experts + e[None, :], mask=live[:, None] & wanted[None, :], other=0.0)
        if CHOSEN:  # softmax of two: what one gains the other loses, and nothing where their experts are alike
            more = tl.load(weights_grad + 2 * t + 1, mask=live, other=0.0)
            more -= tl.load(weights_grad + 2 * t, mask=live, other=0.0)
            more *= tl.load(weights + 2 * t, mask=live, other=0.0) * tl.load(weights + 2 * t + 1, mask=live, other=0.0)
            one = tl.load(chosen + 2 * t, mask=live, other=0)[:, None] == e[None, :]
            two = tl.load(chosen + 2 * t + 1, mask=live, other=0)[:, None] == e[None, :]
            g += tl.where(two, more[:, None], 0.0) - tl.where(one, more[:, None], 0.0)
        part = tl.load(x + t[:, None] * x_token + f[None, :], mask=both, other=0.0)
        if part.dtype == tl.bfloat16:
            total += _in_parts(part, tl.trans(g), False)
        else:
            total += tl.dot(tl.trans(g), part.to(tl.float32), input_precision="tf32x3")
        if INPUT > 0:
            if part.dtype == tl.bfloat16:  # which TF32 is finer than
                spread = tl.dot(g, router, input_precision="tf32")
            else:
                spread = tl.dot(g, router, input_precision="tf32x3")
            place = x_grad + t[:, None] * features + f[None, :]
            if INPUT == ADDED:
                spread += tl.load(place, mask=both, other=0.0).to(tl.float32)
            tl.store(place, spread.to(x_grad.dtype.element_ty), mask=both)
    place = routers_grad + (tl.program_id(1) * tl.num_programs(2) + group) * experts * features
    tl.store(place + e[:, None] * features + f[None, :], total, mask=columns)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, router: Tensor) -> Tensor:
        ctx.save_for_backward(x, router)
        return _logits(x, router[None]).sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, router = ctx.saved_tensors
        x_grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return x_grad, router_gradients(x, router[None], x_grad, WRITTEN, grad.contiguous())[0]


class Routes(NamedTuple):
    """What a group's routers say of its tokens.

    Attributes:
        logits: [N, E] float32.
        weights, experts: [N, k], the more probable first.
    """

    logits: Tensor
    weights: Tensor
    experts: Tensor


def _logits(x: Tensor, routers: Tensor) -> Tensor:
    """Return the parts of logits [parts, N, E], whose sum they are, of G routers [G, E, D]."""
    groups, experts, features = routers.shape
    tokens = len(x) // groups
    tiles = triton.cdiv(tokens, 32)
    parts, share = shares(features, 128, tiles * groups // 2)  # of two warps each: twice as many at once
    logits = x.new_empty((parts, len(x), experts), dtype=torch.float32)
    if tokens:
        _router[(tiles, parts, groups)](
            x, routers, logits, tokens, features, experts, x.stride(0), share, BT=32, BF=128, BE=_block(experts),
            num_warps=2,
        )  # fmt: skip
    return logits


def routes_of(x: Tensor, routers: Tensor, choices: int) -> Routes:
    """Return what G routers [G, E, D] say of x [N, D]."""
    partial, experts = _logits(x, routers), routers.shape[1]
    logits = partial.new_empty((len(x), experts))
    weights, chosen = logits.new_empty((len(x), choices)), x.new_empty((len(x), choices), dtype=torch.int64)
    if len(x):
        _choose[(triton.cdiv(len(x), 64),)](
            partial, logits, weights, chosen, len(x), experts, len(partial), K=choices, BT=64, BE=_block(experts),
        )  # fmt: skip
    return Routes(logits, weights, chosen)


def router_gradients(
    x: Tensor, routers: Tensor, x_grad: Tensor | None, how: tl.constexpr, grad: Tensor | None,
    weights_grad: Tensor | None = None, weights: Tensor | None = None, chosen: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient of G routers [G, E, D], and leave that of x [N, D].

    Args:
        x: [N, D].
        routers: [G, E, D].
        x_grad: [N, D], of x; None for nowhere.
        how: WRITTEN or ADDED to that.
        grad: of logits [N, E]; None for 0.
        weights_grad: of weights [N, k]; None for 0, as is that of a single choice.
        weights, chosen: [N, k] of the choices.
    """
    groups, experts, features = routers.shape
    tokens = len(x) // groups
    chooses = weights_grad is not None and weights_grad.shape[1] == 2
    tiles = triton.cdiv(features, 256)
    parts, share = shares(max(tokens, 1), 32, tiles * groups)
    routers_grad = routers.new_empty((parts, *routers.shape))
    given = [routers if tensor is None else tensor for tensor in (grad, weights_grad, weights, chosen)]
    _router_grad[(tiles, parts, groups)](
        *given, x, routers, x if x_grad is None else x_grad, routers_grad, tokens, features, experts, x.stride(0),
        share, LOGITS=grad is not None, CHOSEN=chooses, INPUT=0 if x_grad is None else how, BT=32, BF=256,
        BE=_block(experts),
    )  # fmt: skip
    return routers_grad[0] if parts == 1 else routers_grad.sum(0)


def _block(experts: int) -> int:
    return max(16, triton.next_power_of_2(experts))


def fused_router_logits(x: Tensor, router: Tensor) -> Tensor:
    """Return R x [n, E] float32, from x [n, D] of any dtype and router [E, D] float32."""
    return _RouterLogits.apply(unit_stride(x), router.float().contiguous())

"""A frozen linear layer and the low-rank updates of all adapters at it, as one differentiable operation.

    y[s] = W x[s] + b + scaling_s B_s (w_s * (A_s d(x[s])))    for the tokens s of each adapter

with weights w for the experts where the update has any. What cuBLAS does well it does; kernels do what needs a mask,
which they make again from counters rather than keep:

    dropout  d(x)
    up       y += s d(c M)         in place, onto what the frozen product has left
    outer    M' = s c^T d(x)       in two passes, so that sums have one order; float32

Shapes: n tokens, F features, R = E * r columns of E stacked matrices of rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from mlora.ops.dora import frozen_weight
from mlora.ops.fused.masks import dropped_out, token_keys
from mlora.ops.random import dropped_levels, stream_number

PROGRAMS = 264
"""Programs wanted in flight: two for each multiprocessor of an H100."""


class Dropout(NamedTuple):
    """Which entries of a product's wide operand are dropped.

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


_VARYING = ["tokens", "share", "salt", "dropped"]
"""Arguments that change from batch to batch or layer to layer: kernels are not compiled anew for their values."""


@triton.jit(do_not_specialize=_VARYING)
def _dropout(x, out, keys, tokens, features, x_token, salt, dropped, BT: tl.constexpr, BF: tl.constexpr):
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    live = t < tokens
    both = live[:, None] & (f < features)[None, :]
    part = tl.load(x + t[:, None] * x_token + f[None, :], mask=both, other=0.0)
    part = dropped_out(part, token_keys(keys, t, live, 0, salt, False), f, dropped)
    tl.store(out + t[:, None] * features + f[None, :], part, mask=both)


@triton.jit(do_not_specialize=_VARYING)
def _up(
    codes, matrix, base, out, keys, tokens, features, columns, b_token, o_token, scale, salt, dropped,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    live, inside = t < tokens, f < features
    total = tl.zeros((BT, BF), tl.float32)
    for start in range(0, columns, BC):
        c = start + tl.arange(0, BC)
        wanted = c < columns
        code = tl.load(codes + t[:, None] * columns + c[None, :], mask=live[:, None] & wanted[None, :], other=0.0)
        m = tl.load(matrix + c[:, None] * features + f[None, :], mask=wanted[:, None] & inside[None, :], other=0.0)
        total += tl.dot(code, m, input_precision=PRECISION)
    total *= scale
    if DROP:
        total = dropped_out(total, token_keys(keys, t, live, 0, salt, False), f, dropped)
    both = live[:, None] & inside[None, :]
    total += tl.load(base + t[:, None] * b_token + f[None, :], mask=both, other=0.0).to(tl.float32)
    tl.store(out + t[:, None] * o_token + f[None, :], total.to(out.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=_VARYING)
def _outer(
    codes, x, out, keys, tokens, features, columns, rank, x_token, m_split, m_expert, m_rank, m_feature, share, scale,
    salt, dropped, DROP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    inside, wanted = f < features, c < columns
    total = tl.zeros((BC, BF), tl.float32)
    first = tl.program_id(1) * share
    for base in range(first, tl.minimum(first + share, tokens), BT):
        t = (base + tl.arange(0, BT)).to(tl.int64)
        live = t < tokens
        part = tl.load(x + t[:, None] * x_token + f[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if DROP:
            part = dropped_out(part, token_keys(keys, t, live, 0, salt, False), f, dropped)
        code = tl.load(codes + t[:, None] * columns + c[None, :], mask=live[:, None] & wanted[None, :], other=0.0)
        total += tl.dot(tl.trans(code), part, input_precision=PRECISION)
    column = tl.program_id(1) * m_split + (c // rank) * m_expert + (c % rank) * m_rank
    place = out + column[:, None] + f[None, :] * m_feature
    tl.store(place, total * scale, mask=wanted[:, None] & inside[None, :])


def mask_settings(dropout: Dropout | None) -> dict[str, Any]:
    """Return what a kernel takes of a dropout, besides its keys."""
    if dropout is None:
        return {"salt": 0, "dropped": 0, "DROP": False}
    return {"salt": dropout.salt, "dropped": dropout.dropped, "DROP": True}


def _settings(x: Tensor, dropout: Dropout | None) -> dict[str, Any]:
    return mask_settings(dropout) | {"PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"}


def _columns_block(columns: int) -> int:
    return min(128, max(16, triton.next_power_of_2(columns)))


def _shares(work: int, block: int, programs: int) -> tuple[int, int]:
    """Return (parts, length of each) of `work`, a multiple of `block`, for about PROGRAMS programs in all."""
    blocks = triton.cdiv(work, block)
    parts = max(1, min(PROGRAMS // max(programs, 1), blocks // 4))
    share = triton.cdiv(blocks, parts) * block
    return triton.cdiv(work, share), share


def narrow(a: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A [r, F] or [E, r, F] as a matrix [R, F] of the dtype that products run in."""
    return a.detach().flatten(0, -2).to(dtype)


def wide(b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return B [F, r] or [E, F, r] as a matrix [R, F] of the dtype that products run in."""
    return b.detach().transpose(-1, -2).flatten(0, -2).to(dtype, memory_format=torch.contiguous_format)


def unit_stride(x: Tensor) -> Tensor:
    """Return x with features side by side in memory, as kernels read them; some families transpose before a layer."""
    return x if x.stride(-1) == 1 else x.contiguous()


def drop(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Return d(x) [n, F], x with rows of unit stride."""
    if dropout is None or not len(x):
        return x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _dropout[(triton.cdiv(len(x), 16), triton.cdiv(x.shape[1], 256))](
        x, out, dropout.keys, len(x), x.shape[1], x.stride(0), dropout.salt, dropout.dropped, BT=16, BF=256
    )
    return out


def add_up(
    base: Tensor, codes: Tensor, matrix: Tensor, scale: float, dropout: Dropout | None = None, out: Tensor | None = None
) -> None:
    """Write base + scale d(c M) [n, F] to `out`, or onto `base`, from codes c [n, R] and M [R, F]."""
    if out is None and dropout is None:
        base.addmm_(codes, matrix, alpha=scale)
        return
    out = base if out is None else out
    if len(out):
        columns, features = matrix.shape
        _up[(triton.cdiv(len(out), 64), triton.cdiv(features, 128))](
            codes.contiguous(), matrix, base, out, codes if dropout is None else dropout.keys, len(out), features,
            columns, base.stride(0), out.stride(0), scale, **_settings(codes, dropout), BT=64, BF=128,
            BC=_columns_block(columns),
        )  # fmt: skip


def gradient_of_a(codes: Tensor, x: Tensor, a: Tensor, dropout: Dropout | None = None) -> Tensor:
    """Return c^T d(x) in the shape of A ([E,] r, F), float32, from codes [n, R] and x [n, F]."""
    return _outer_of(codes, x, a, a.reshape(-1, *a.shape[-2:]), 1.0, dropout)


def gradient_of_b(codes: Tensor, grad: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale g^T c in the shape of B ([E,] F, r), float32, from codes [n, R] and gradients g [n, F]."""
    return _outer_of(codes, grad, b, b.reshape(-1, *b.shape[-2:]).transpose(1, 2), scale, None)


def _outer_of(codes: Tensor, x: Tensor, like: Tensor, stack: Tensor, scale: float, dropout: Dropout | None) -> Tensor:
    """Return scale c^T d(x), laid out as `like`, of which `stack` is the view [E, r, F]."""
    experts, rank, features = stack.shape
    columns, block = experts * rank, _columns_block(experts * rank)
    grid = triton.cdiv(features, 128), 1, triton.cdiv(columns, block)
    parts, share = _shares(max(len(x), 1), 64, grid[0] * grid[2])
    partial = x.new_empty((parts, *like.shape), dtype=torch.float32)
    _outer[(grid[0], parts, grid[2])](
        codes.contiguous(), x, partial, x if dropout is None else dropout.keys, len(x), features, columns, rank,
        x.stride(0), like.numel(), *stack.stride(), share, scale, **_settings(x, dropout), BT=64, BF=128, BC=block,
        num_warps=8,
    )  # fmt: skip
    return partial[0] if parts == 1 else partial.sum(0)


class Part(NamedTuple):
    """The update of the tokens [start, stop) at one linear layer.

    Attributes:
        start, stop: tokens.
        scaling: s.
        dropout: of its input.
    """

    start: int
    stop: int
    scaling: float
    dropout: Dropout | None


class _AdaptedLinear(torch.autograd.Function):
    """y = W x + b + updates; W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, parts: Sequence[Part], *tensors: Tensor | None) -> Tensor:
        out = layer(x)
        codes = []
        for part, (a, b, weights) in zip(parts, _threes(tensors), strict=True):
            inside = slice(part.start, part.stop)
            own = drop(x[inside], part.dropout) @ narrow(a, x.dtype).T
            codes.append(own)
            add_up(out[inside], _weighted(own, weights), wide(b, x.dtype), part.scaling)
        ctx.layer, ctx.parts = layer, parts
        ctx.save_for_backward(x, *codes, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        grad = grad.contiguous()
        codes, tensors = saved[: len(ctx.parts)], saved[len(ctx.parts) :]
        dx = grad @ frozen_weight(ctx.layer).to(grad.dtype) if ctx.needs_input_grad[0] else None
        gradients: list[Tensor | None] = []
        for part, code, (a, b, weights) in zip(ctx.parts, codes, _threes(tensors), strict=True):
            inside = slice(part.start, part.stop)
            own = grad[inside] @ wide(b, grad.dtype).T * part.scaling
            dweights = None
            if weights is not None:
                dweights = (own * code).unflatten(1, (weights.shape[1], -1)).sum(-1, dtype=torch.float32)
            dcode = _weighted(own, weights)
            db = gradient_of_b(_weighted(code, weights), grad[inside], b, part.scaling)
            da = gradient_of_a(dcode, x[inside], a, part.dropout)
            if dx is not None:
                add_up(dx[inside], dcode, narrow(a, grad.dtype), 1.0, part.dropout)
            gradients += [da, db, dweights]
        return dx, None, None, *gradients


def _threes(tensors: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True))


def _weighted(codes: Tensor, weights: Tensor | None) -> Tensor:
    """Return codes [n, E r] times the experts' weights [n, E]."""
    if weights is None:
        return codes
    return (codes.unflatten(1, (weights.shape[1], -1)) * weights[..., None].to(codes.dtype)).flatten(1)


def adapted_linear(x: Tensor, layer: nn.Module, parts: Sequence[Part], tensors: Sequence[Tensor | None]) -> Tensor:
    """Return a frozen layer's output with updates [n, O].

    Args:
        x: [n, D].
        layer: frozen, torch's own or quantised.
        parts: tokens that have an update, in order.
        tensors: for each part A, B and the experts' weights [n, E] (None for a single update).
    """
    return _AdaptedLinear.apply(unit_stride(x), layer, parts, *tensors)

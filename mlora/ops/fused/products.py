"""Low-rank products of G adapters at once. What cuBLAS does well it does; kernels do what needs a mask.

    dropout    d(x)
    add        y += d(p)           in place, for one or two products p
    outer      M' = c^T d(x)       in two passes, so that sums have one order; float32

The tokens of a group of G adapters follow one another, n for each, so that one launch serves all of them.

Shapes: N = G n tokens, F features, R = E * r columns of E stacked matrices of rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from mlora.ops.backend import device_type, has_data
from mlora.ops.copies import Casts
from mlora.ops.fused.masks import Dropout, dropped_out, mask_bits, token_keys

PROGRAMS = 264
"""Programs wanted in flight: two for each multiprocessor of an H100."""

VARYING = ["tokens", "share", "salt", "dropped"]
"""Arguments that change from batch to batch or layer to layer: kernels are not compiled anew for their values."""


@triton.jit
def _bits(keys, t, live, f, salt, second_salt, third_salt, COUNT: tl.constexpr):
    """Return the random bits of up to three streams; those of the first in place of what there is not."""
    first = mask_bits(token_keys(keys, t, live, 0, salt, False), f)
    second, third = first, first
    if COUNT > 1:
        second = mask_bits(token_keys(keys, t, live, 0, second_salt, False), f)
    if COUNT > 2:
        third = mask_bits(token_keys(keys, t, live, 0, third_salt, False), f)
    return first, second, third


@triton.jit(do_not_specialize=[*VARYING, "second_salt", "third_salt"])
def _dropout(
    x, out, second, third, keys, tokens, features, half, x_token, salt, second_salt, third_salt, dropped,
    COUNT: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    live = t < tokens
    bits, second_bits, third_bits = _bits(keys, t, live, f, salt, second_salt, third_salt, COUNT)
    for side in tl.static_range(2):
        both = live[:, None] & (f < (features - half if side else half))[None, :]
        column = side * half + f
        part = tl.load(x + t[:, None] * x_token + column[None, :], mask=both, other=0.0)
        place = t[:, None] * features + column[None, :]
        tl.store(out + place, dropped_out(part, bits, dropped, side), mask=both)
        if COUNT > 1:
            tl.store(second + place, dropped_out(part, second_bits, dropped, side), mask=both)
        if COUNT > 2:
            tl.store(third + place, dropped_out(part, third_bits, dropped, side), mask=both)


@triton.jit(do_not_specialize=[*VARYING, "second_salt", "third_salt"])
def _add_dropped(
    out, product, second, third, keys, tokens, features, half, o_token, salt, second_salt, third_salt, dropped,
    COUNT: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    live = t < tokens
    bits, second_bits, third_bits = _bits(keys, t, live, f, salt, second_salt, third_salt, COUNT)
    for side in tl.static_range(2):
        both = live[:, None] & (f < (features - half if side else half))[None, :]
        column = side * half + f
        source = t[:, None] * features + column[None, :]
        part = tl.load(product + source, mask=both, other=0.0).to(tl.float32)
        total = dropped_out(part, bits, dropped, side)
        if COUNT > 1:
            part = tl.load(second + source, mask=both, other=0.0).to(tl.float32)
            total += dropped_out(part, second_bits, dropped, side)
        if COUNT > 2:
            part = tl.load(third + source, mask=both, other=0.0).to(tl.float32)
            total += dropped_out(part, third_bits, dropped, side)
        place = out + t[:, None] * o_token + column[None, :]
        total += tl.load(place, mask=both, other=0.0).to(tl.float32)
        tl.store(place, total.to(out.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=VARYING)
def _outer(
    codes, x, out, keys, tokens, features, half, columns, blocks, x_token, share, salt, dropped,
    PRECISION: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(2) // blocks).to(tl.int64)
    c = (tl.program_id(2) % blocks) * BC + tl.arange(0, BC)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    wanted = c < columns
    left, right = f < half, f < features - half
    total = tl.zeros((BC, BF), tl.float32)
    right_total = tl.zeros((BC, BF), tl.float32)
    first = tl.program_id(1) * share
    for base in range(first, tl.minimum(first + share, tokens), BT):
        own = base + tl.arange(0, BT)
        live = own < tokens
        t = group * tokens + own
        code = tl.load(codes + t[:, None] * columns + c[None, :], mask=live[:, None] & wanted[None, :], other=0.0)
        code = tl.trans(code)
        source = x + t[:, None] * x_token + f[None, :]
        bits = mask_bits(token_keys(keys, t, live, 0, salt, False), f)
        part = tl.load(source, mask=live[:, None] & left[None, :], other=0.0)
        total += tl.dot(code, dropped_out(part, bits, dropped, 0), input_precision=PRECISION)
        part = tl.load(source + half, mask=live[:, None] & right[None, :], other=0.0)
        right_total += tl.dot(code, dropped_out(part, bits, dropped, 1), input_precision=PRECISION)
    out += (tl.program_id(1) * (tl.num_programs(2) // blocks) + group) * columns * features
    place = out + c[:, None] * features + f[None, :]
    tl.store(place, total, mask=wanted[:, None] & left[None, :])
    tl.store(place + half, right_total, mask=wanted[:, None] & right[None, :])


@triton.jit(do_not_specialize=VARYING)
def _rescale(out, factor, scaled, tokens, features, BT: tl.constexpr, BF: tl.constexpr):
    group = tl.program_id(2).to(tl.int64)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    own = tl.program_id(1) * BT + tl.arange(0, BT)
    both = (own < tokens)[:, None] & (f < features)[None, :]
    by = tl.load(factor + group * features + f, mask=f < features, other=0.0)
    place = (group * tokens + own)[:, None] * features + f[None, :]
    y = tl.load(out + place, mask=both, other=0.0).to(tl.float32)
    tl.store(scaled + place, (y * by[None, :]).to(scaled.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=VARYING)
def _rescale_grad(
    grad, out, factor, scaled, sums, tokens, features, share, BT: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    group = tl.program_id(2).to(tl.int64)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    inside = f < features
    by = tl.load(factor + group * features + f, mask=inside, other=0.0)
    total = tl.zeros((BF,), tl.float32)
    first = tl.program_id(1) * share
    for base in range(first, tl.minimum(first + share, tokens), BT):
        own = base + tl.arange(0, BT)
        both = (own < tokens)[:, None] & inside[None, :]
        place = (group * tokens + own)[:, None] * features + f[None, :]
        g = tl.load(grad + place, mask=both, other=0.0).to(tl.float32)
        total += tl.sum(g * tl.load(out + place, mask=both, other=0.0).to(tl.float32), 0)
        tl.store(scaled + place, (g * by[None, :]).to(scaled.dtype.element_ty), mask=both)
    tl.store(sums + (tl.program_id(1) * tl.num_programs(2) + group) * features + f, total, mask=inside)


def precision(x: Tensor) -> str:
    """Return how kernels multiply: float32 in full."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def columns_block(columns: int) -> int:
    """Return how many columns a kernel takes at a time."""
    return min(128, max(16, triton.next_power_of_2(columns)))


def half_of(features: int) -> int:
    """Return how many features the left half has."""
    return (features + 1) // 2


def shares(work: int, block: int, programs: int) -> tuple[int, int]:
    """Return (parts, length of each) of `work`, a multiple of `block`, for about PROGRAMS programs in all."""
    blocks = triton.cdiv(work, block)
    parts = max(1, min(PROGRAMS // max(programs, 1), blocks // 4))
    share = triton.cdiv(blocks, parts) * block
    return triton.cdiv(work, share), share


def narrow(stack: Sequence[Tensor], dtype: torch.dtype, casts: Casts | None = None) -> Tensor:
    """Return A of every adapter, [r, F] or [E, r, F], as [G, R, F] of the dtype that products run in."""
    return _together(stack, [a.detach().flatten(0, -2) for a in stack], dtype, casts)


def wide(stack: Sequence[Tensor], dtype: torch.dtype, casts: Casts | None = None) -> Tensor:
    """Return B of every adapter, [F, r] or [E, F, r], as [G, R, F] of the dtype that products run in."""
    return _together(stack, [b.detach().mT for b in stack], dtype, casts).flatten(1, -2)


def _together(given: Sequence[Tensor], stack: Sequence[Tensor], dtype: torch.dtype, casts: Casts | None) -> Tensor:
    """Return matrices one after the other, each read once and written once; from a step's casts where these are kept.

    Kept is what is made of parameters alone: what methods compute of them is another tensor in every step.
    """
    parameters = all(t.is_leaf and t.requires_grad and t.dtype != dtype for t in given)
    if casts is None or not parameters:
        return _cast(stack, dtype)
    made = casts.get(given, dtype)
    if made is None:
        casts.add(given, stack, made := _cast(stack, dtype))
    return made


def _cast(stack: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if len(stack) == 1:
        return stack[0].to(dtype, memory_format=torch.contiguous_format).contiguous()[None]
    out = torch.empty((len(stack), *stack[0].shape), dtype=dtype, device=stack[0].device)
    torch._foreach_copy_(list(out.unbind()), list(stack))
    return out


def product(x: Tensor, matrices: Tensor, scale: float = 1.0) -> Tensor:
    """Return s x M [N, R] of each adapter's tokens, from x [N, F] and M [G, F, R]."""
    out = x.new_empty((len(x), matrices.shape[2]))
    add_up(out, x, matrices, scale, beta=0.0)
    return out


def drop(x: Tensor, dropouts: Sequence[Dropout | None]) -> list[Tensor]:
    """Return d(x) [N, F] for each of one to three dropouts, of the same keys; x has rows of unit stride."""
    known = [dropout for dropout in dropouts if dropout is not None]
    if not known or not len(x):
        return [x for _ in dropouts]
    tokens, features = x.shape
    made = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in known]
    _dropout[(triton.cdiv(tokens, 16), triton.cdiv(half_of(features), 128))](
        x, *_three(made), known[0].keys, tokens, features, half_of(features), x.stride(0), *_salts(known),
        known[0].dropped, COUNT=len(known), BT=16, BF=128,
    )  # fmt: skip
    each = iter(made)
    return [x if dropout is None else next(each) for dropout in dropouts]


def _three(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return three arguments of a kernel, which reads as many as there are."""
    return tensors[0], tensors[min(1, len(tensors) - 1)], tensors[-1]


def _salts(dropouts: Sequence[Dropout]) -> tuple[int, ...]:
    return dropouts[0].salt, dropouts[min(1, len(dropouts) - 1)].salt, dropouts[-1].salt


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Dropout | None) -> Tensor:
        ctx.mask = mask
        return drop(unit_stride(x), [mask])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return drop(unit_stride(grad), [ctx.mask])[0], None


def dropout(x: Tensor, mask: Dropout | None) -> Tensor:
    """Return d(x) [N, F], differentiable; x itself where nothing is dropped."""
    return x if mask is None else _Dropped.apply(x, mask)


def add_up(out: Tensor, codes: Tensor, matrices: Tensor, scale: float = 1.0, beta: float = 1.0) -> None:
    """Write beta out + s c M to `out` [N, F], from codes c [N, R] and M [G, R, F]."""
    if len(matrices) == 1:
        torch.addmm(out, codes, matrices[0], beta=beta, alpha=scale, out=out)
    else:
        apart = (len(matrices), -1)
        here = out.unflatten(0, apart)
        torch.baddbmm(here, codes.unflatten(0, apart), matrices, beta=beta, alpha=scale, out=here)


def add_updates(out: Tensor, updates: Sequence[tuple[Tensor, Tensor, Dropout | None]]) -> None:
    """Add d(c M) of one to three updates to `out` [N, F], from codes c [N, R] and M [G, R, F].

    What is masked is added in one pass; the tokens' keys are the same.
    """
    masked = [(product(codes, matrices), dropout) for codes, matrices, dropout in updates if dropout is not None]
    for codes, matrices, dropout in updates:
        if dropout is None:
            add_up(out, codes, matrices)
    if masked and len(out):
        products, known = zip(*masked, strict=True)
        features, half = out.shape[1], half_of(out.shape[1])
        _add_dropped[(triton.cdiv(len(out), 8), triton.cdiv(half, 128))](
            out, *_three(products), known[0].keys, len(out), features, half, out.stride(0), *_salts(known),
            known[0].dropped, COUNT=len(known), BT=8, BF=128,
        )  # fmt: skip


class Addend(NamedTuple):
    """c M of the tokens of a group, to add to a frozen layer's output.

    Attributes:
        tokens: of the stream.
        codes: c [N, R].
        matrices: M [G, R, O].
    """

    tokens: slice
    codes: Tensor
    matrices: Tensor


def frozen_product(layer: nn.Module, x: Tensor, addends: Sequence[Addend]) -> Tensor:
    """Return a frozen layer's output [n, O] with addends.

    Where nothing forbids it the addends are written first and the wide product is summed onto them, which spares a
    pass over the output.
    """
    weight = layer.weight
    if type(layer) is not nn.Linear or layer.bias is not None or weight.dtype != x.dtype or not addends:
        out = layer(x)
        for own in addends:
            add_up(out[own.tokens], own.codes, own.matrices)
        return out
    covered = sum(own.tokens.stop - own.tokens.start for own in addends) == len(x)
    out = (torch.empty if covered else torch.zeros)((len(x), len(weight)), dtype=x.dtype, device=x.device)
    for own in addends:
        add_up(out[own.tokens], own.codes, own.matrices, beta=0.0)
    return torch.addmm(out, x, weight.mT, out=out)


def gradients_of_a(codes: Tensor, x: Tensor, stack: Sequence[Tensor], dropout: Dropout | None = None) -> list[Tensor]:
    """Return c^T d(x) in the shape of each A ([E,] r, F), float32, from codes [N, R] and x [N, F]."""
    summed = (
        summed_products(codes, x, len(stack)) if dropout is None else _masked_products(codes, x, len(stack), dropout)
    )
    return [own.view(a.shape) for own, a in zip(summed, stack, strict=True)]


def gradients_of_b(pairs: Sequence[tuple[Tensor, Tensor]], stack: Sequence[Tensor]) -> list[Tensor]:
    """Return g^T c in the shape of each B ([E,] F, r), float32, summed over pairs of g [N, F] and codes [N, R]."""
    (grad, codes), *more = pairs
    summed = summed_products(grad, codes, len(stack))
    for grad, codes in more:
        summed = summed_products(grad, codes, len(stack), summed)
    if stack[0].ndim == 3:
        summed = summed.unflatten(2, (len(stack[0]), -1)).transpose(1, 2)
    return list(summed.unbind(0))


def summed_products(left: Tensor, right: Tensor, groups: int, onto: Tensor | None = None) -> Tensor:
    """Return l^T r of each adapter's tokens [G, A, B], float32, from l [N, A] and r [N, B]; added to what is given."""
    if left.dtype == torch.float32 or device_type(left) != "cuda":
        left, right = left.float(), right.float()
    if onto is not None and not has_data(left):  # torch 2.11 knows no form of a product of this dtype added to another
        return torch.empty_like(onto)
    dtype = () if left.dtype == torch.float32 else (torch.float32,)
    if groups == 1:
        left = left.mT
        return (torch.mm(left, right, *dtype) if onto is None else torch.addmm(onto[0], left, right, *dtype))[None]
    left, right = left.unflatten(0, (groups, -1)).mT, right.unflatten(0, (groups, -1))
    return torch.bmm(left, right, *dtype) if onto is None else torch.baddbmm(onto, left, right, *dtype)


def _masked_products(codes: Tensor, x: Tensor, groups: int, dropout: Dropout) -> Tensor:
    """Return c^T d(x) of each adapter [G, R, F], float32."""
    columns, features = codes.shape[1], x.shape[1]
    tokens, half, block = len(x) // groups, half_of(features), columns_block(columns)
    blocks, tiles = triton.cdiv(columns, block), triton.cdiv(half, 64)
    parts, share = shares(max(tokens, 1), 64, tiles * blocks * groups)
    partial = x.new_empty((parts, groups, columns, features), dtype=torch.float32)
    _outer[(tiles, parts, blocks * groups)](
        codes.contiguous(), x, partial, dropout.keys, tokens, features, half, columns, blocks, x.stride(0), share,
        dropout.salt, dropout.dropped, PRECISION=precision(x), BT=64, BF=64, BC=block, num_warps=8,
    )  # fmt: skip
    return partial[0] if parts == 1 else partial.sum(0)


def rescale(out: Tensor, factors: Tensor, scaled: Tensor) -> None:
    """Write f y to `scaled` [N, F], from y [N, F] and factors f [G, F] float32."""
    groups, features = factors.shape
    tokens = len(out) // groups
    if tokens:
        tiles = triton.cdiv(features, 256), triton.cdiv(tokens, 8), groups
        _rescale[tiles](out, factors, scaled, tokens, features, BT=8, BF=256)


def rescale_grad(grad: Tensor, out: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return f g [N, F] and the gradient of factors f [G, F], float32, from gradients g and what f scaled, both [N, F].

    One pass over both, whose sums have one order.
    """
    groups, features = factors.shape
    tokens = len(grad) // groups
    tiles = triton.cdiv(features, 128)
    parts, share = shares(max(tokens, 1), 32, tiles * groups // 4)  # that wait for memory alone: as many at once
    scaled = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    sums = factors.new_empty((parts, groups, features), dtype=torch.float32)
    _rescale_grad[(tiles, parts, groups)](grad, out, factors, scaled, sums, tokens, features, share, BT=32, BF=128)
    return scaled, sums.sum(0)


def unit_stride(x: Tensor) -> Tensor:
    """Return x with features side by side in memory, as kernels read them; some families transpose before a layer."""
    return x if x.stride(-1) == 1 else x.contiguous()

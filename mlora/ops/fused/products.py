"""Low-rank products of G adapters at once, by cuBLAS, and factors of outputs.

The tokens of a group of G adapters follow one another, n for each, so that one launch serves all of them.

Shapes: N = G n tokens, F features, R = E * r columns of E stacked matrices of rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from mlora.ops.backend import device_type, has_data
from mlora.ops.copies import Casts

PROGRAMS = 264
"""Programs wanted in flight: two for each multiprocessor of an H100."""

VARYING = ["tokens", "share", "salt", "dropped"]
"""Arguments that change from batch to batch or layer to layer: kernels are not compiled anew for their values."""


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


def apart(x: Tensor, groups: int) -> Tensor:
    """Return x [N, F] as [G, n, F]."""
    return x.unflatten(0, (groups, len(x) // groups))


def product(x: Tensor, matrices: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """Return s x M [B, n, R], from x [B, n, F] and M [B, F, R]; in `out` where it is given."""
    out = x.new_empty((*x.shape[:2], matrices.shape[2])) if out is None else out
    add_up(out, x, matrices, scale, beta=0.0)
    return out


def add_up(out: Tensor, codes: Tensor, matrices: Tensor, scale: float = 1.0, beta: float = 1.0) -> None:
    """Write beta out + s c M to `out` [B, n, F], from codes c [B, n, R] and M [B, R, F]."""
    if len(matrices) == 1:
        torch.addmm(out[0], codes[0], matrices[0], beta=beta, alpha=scale, out=out[0])
    else:
        torch.baddbmm(out, codes, matrices, beta=beta, alpha=scale, out=out)


class Addend(NamedTuple):
    """c M of the tokens of a group, to add to a frozen layer's output.

    Attributes:
        tokens: of the stream.
        codes: c [G, n, R].
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
            add_up(apart(out[own.tokens], len(own.matrices)), own.codes, own.matrices)
        return out
    covered = sum(own.tokens.stop - own.tokens.start for own in addends) == len(x)
    out = (torch.empty if covered else torch.zeros)((len(x), len(weight)), dtype=x.dtype, device=x.device)
    for own in addends:
        product(own.codes, own.matrices, out=apart(out[own.tokens], len(own.matrices)))
    return torch.addmm(out, x, weight.mT, out=out)


def of_each_b(summed: Tensor, stack: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of matrices B [G, F, R] in the shape of each, ([E,] F, r)."""
    if stack[0].ndim == 3:
        summed = summed.unflatten(2, (len(stack[0]), -1)).transpose(1, 2)
    return list(summed.unbind(0))


def of_each_a(summed: Tensor, stack: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of matrices A [G, R, F] in the shape of each, ([E,] r, F)."""
    return [own.view(a.shape) for own, a in zip(summed, stack, strict=True)]


def summed_products(left: Tensor, right: Tensor, onto: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return l^T r [B, P, Q], float32, from l [B, n, P] and r [B, n, Q].

    Args:
        left, right: l and r.
        onto: what they are added to, in another tensor.
        out: where they are written.
    """
    if left.dtype == torch.float32 or device_type(left) != "cuda":
        left, right = left.float(), right.float()
    dtype = () if left.dtype == torch.float32 else (torch.float32,)
    if dtype and not has_data(left):  # torch 2.11 does not know the form of each product in another dtype
        form = len(left), left.shape[2], right.shape[2]
        return left.new_empty(form, dtype=torch.float32) if out is None else out
    left = left.mT
    if len(left) > 1:
        return torch.bmm(left, right, *dtype, out=out) if onto is None else torch.baddbmm(onto, left, right, *dtype)
    one = left[0], right[0], *dtype
    if onto is not None:
        return torch.addmm(onto[0], *one)[None]
    return torch.mm(*one, out=None if out is None else out[0])[None]


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

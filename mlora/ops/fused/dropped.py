"""What L layers make of one input that each drops out by itself: a launch serves all of them and all adapters.

    drop                d_l(x)
    reduced             c_l = s A_l d_l(x)
    gradients_of_a      c_l^T d_l(x), float32
    add_expanded        y += sum_l d_l(c_l A_l)      in place

Masks are kernels of our own, made again whenever they are needed; products are cuBLAS's, which none of ours that made
masks inside could beat (benchmarks/RESULTS.md).

Shapes: N = G n tokens of G adapters, F features, R = E * r columns; L layers, three at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.fused.masks import Dropout, dropped_out, mask_bits, token_keys
from mlora.ops.fused.products import VARYING, add_up, apart, half_of, product, summed_products, unit_stride

MOST_LAYERS = 3


@triton.jit
def _tile(
    keys, tokens, salt, second_salt, third_salt, COUNT: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """Return a program's tokens, columns of a half and live tokens, and the random bits of up to three layers.

    Bits of the first are in place of what there is not.
    """
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    live = t < tokens
    first = mask_bits(token_keys(keys, t, live, 0, salt, False), f)
    second, third = first, first
    if COUNT > 1:
        second = mask_bits(token_keys(keys, t, live, 0, second_salt, False), f)
    if COUNT > 2:
        third = mask_bits(token_keys(keys, t, live, 0, third_salt, False), f)
    return t, f, live, first, second, third


@triton.jit
def _of_layer(first, second, third, layer: tl.constexpr):
    return first if layer == 0 else (second if layer == 1 else third)


@triton.jit(do_not_specialize=[*VARYING, "second_salt", "third_salt"])
def _dropout(
    x, out, keys, tokens, features, half, x_token, salt, second_salt, third_salt, dropped,
    COUNT: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    t, f, live, first, second, third = _tile(keys, tokens, salt, second_salt, third_salt, COUNT, BT, BF)
    for side in tl.static_range(2):
        both = live[:, None] & (f < (features - half if side else half))[None, :]
        column = side * half + f
        part = tl.load(x + t[:, None] * x_token + column[None, :], mask=both, other=0.0)
        for layer in tl.static_range(COUNT):
            bits = _of_layer(first, second, third, layer)
            place = (layer * tokens.to(tl.int64) + t)[:, None] * features + column[None, :]
            tl.store(out + place, dropped_out(part, bits, dropped, side), mask=both)


@triton.jit(do_not_specialize=[*VARYING, "second_salt", "third_salt"])
def _add_dropped(
    out, products, keys, tokens, features, half, o_token, salt, second_salt, third_salt, dropped,
    COUNT: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    t, f, live, first, second, third = _tile(keys, tokens, salt, second_salt, third_salt, COUNT, BT, BF)
    for side in tl.static_range(2):
        both = live[:, None] & (f < (features - half if side else half))[None, :]
        column = side * half + f
        total = tl.zeros((BT, BF), tl.float32)
        for layer in tl.static_range(COUNT):
            bits = _of_layer(first, second, third, layer)
            place = (layer * tokens.to(tl.int64) + t)[:, None] * features + column[None, :]
            part = tl.load(products + place, mask=both, other=0.0).to(tl.float32)
            total += dropped_out(part, bits, dropped, side)
        place = out + t[:, None] * o_token + column[None, :]
        total += tl.load(place, mask=both, other=0.0).to(tl.float32)
        tl.store(place, total.to(out.dtype.element_ty), mask=both)


def drop(x: Tensor, dropouts: Sequence[Dropout]) -> Tensor:
    """Return d_l(x) [L, N, F] of dropouts of the same keys and share; x [N, F] has rows of unit stride."""
    tokens, features = x.shape
    out = torch.empty((len(dropouts), tokens, features), dtype=x.dtype, device=x.device)
    if tokens:
        _dropout[(triton.cdiv(tokens, 16), triton.cdiv(half_of(features), 128))](
            x, out, dropouts[0].keys, tokens, features, half_of(features), x.stride(0), *_salts(dropouts),
            dropouts[0].dropped, COUNT=len(dropouts), BT=16, BF=128,
        )  # fmt: skip
    return out


def _salts(dropouts: Sequence[Dropout]) -> tuple[int, ...]:
    """Return three arguments of a kernel, which reads as many as there are."""
    return dropouts[0].salt, dropouts[min(1, len(dropouts) - 1)].salt, dropouts[-1].salt


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Dropout) -> Tensor:
        ctx.mask = mask
        return drop(unit_stride(x), [mask])[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return drop(unit_stride(grad), [ctx.mask])[0], None


def dropout(x: Tensor, mask: Dropout | None) -> Tensor:
    """Return d(x) [N, F], differentiable; x itself where nothing is dropped."""
    return x if mask is None else _Dropped.apply(x, mask)


def reduced(x: Tensor, matrices: Tensor, dropouts: Sequence[Dropout | None], scale: float) -> Tensor:
    """Return s A_l d_l(x) [L, N, R], from x [N, F] and A [L, G, R, F].

    Args:
        x: with rows of unit stride.
        matrices: A.
        dropouts: of each layer, all alike but for their streams, or all None.
        scale: s.
    """
    codes = x.new_empty((len(dropouts), len(x), matrices.shape[2]))
    for layers, read in _read(x, dropouts, matrices.shape[1]):
        product(read, matrices[layers].flatten(0, 1).mT, scale, codes[layers].view(*read.shape[:2], codes.shape[2]))
    return codes


def gradients_of_a(
    codes: Tensor, x: Tensor, dropouts: Sequence[Dropout | None], groups: int, out: Tensor | None = None
) -> Tensor:
    """Return c_l^T d_l(x) [L, G, R, F] float32, from codes [L, N, R] and x [N, F].

    Args:
        codes: c_l.
        x: [N, F].
        dropouts: of each layer.
        groups: G.
        out: of as many numbers, where they are written; None for anywhere.
    """
    form = len(codes), groups, codes.shape[2], x.shape[1]
    out = x.new_empty(form, dtype=torch.float32) if out is None else out.view(form)
    for layers, read in _read(x, dropouts, groups):
        summed_products(codes[layers].view(*read.shape[:2], codes.shape[2]), read, out=out[layers].flatten(0, 1))
    return out


def _read(x: Tensor, dropouts: Sequence[Dropout | None], groups: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield layers, and what they read [layers G, n, F], for products of their own."""
    count = len(dropouts)
    if dropouts[0] is not None:
        dropped = drop(x, cast("Sequence[Dropout]", dropouts))
        yield slice(0, count), apart(dropped.flatten(0, 1), count * groups)
    elif groups == 1:
        yield slice(0, count), x.expand(count, -1, -1)
    else:
        yield from ((slice(layer, layer + 1), apart(x, groups)) for layer in range(count))


def add_expanded(out: Tensor, codes: Tensor, matrices: Tensor, dropouts: Sequence[Dropout | None]) -> None:
    """Add d_l(c_l A_l) of every layer to `out` [N, F], from codes [L, N, R] and A [L, G, R, F]."""
    count, groups, _, features = matrices.shape
    known = [dropout for dropout in dropouts if dropout is not None]
    if not known:
        for own, each in zip(codes, matrices, strict=True):
            add_up(apart(out, groups), apart(own, groups), each)
    elif len(out):
        products = product(apart(codes.flatten(0, 1), count * groups), matrices.flatten(0, 1))
        _add_dropped[(triton.cdiv(len(out), 8), triton.cdiv(half_of(features), 128))](
            out, products, known[0].keys, len(out), features, half_of(features), out.stride(0), *_salts(known),
            known[0].dropped, COUNT=count, BT=8, BF=128,
        )  # fmt: skip

"""The middle of a gated feed-forward block: from the frozen G and U to the hidden units, for k choices of every token.

    g_j = G + s B1 c1, u_j = U + s B3 c3    with the codes c of the choice's expert e_j alone
    h = sum_j w_j h_j, h_j = act(g_j) * u_j

One pass over G and U each way; g_j and u_j are never written. The narrow products run over the columns of all experts,
zero for those not chosen: with E r near 128 they cost what one expert's would. Forward also leaves d(h_j), what the
down projection's updates read; backward computes h_j again. A dense adapter has one choice of weight 1.

Shapes: G adapters of n tokens each, N = G n; k choices, I intermediate, R = E * r columns of codes. What every choice
has of its own lies as [G, k, n, I], so that a product's tokens follow one another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.fused.masks import Dropout, dropped_out, mask_bits, mask_settings, token_keys
from mlora.ops.fused.products import columns_block, half_of, precision

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_VARYING = ["tokens", "salt", "dropped"]


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _activated(g, ACT: tl.constexpr):
    """Return act(g) and its derivative."""
    if ACT == 0:
        s = tl.sigmoid(g)
        return g * s, s * (1 + g * (1 - s))
    elif ACT == 1:
        cdf = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        return g * cdf, cdf + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        inner = 0.7978845608028654 * (g + 0.044715 * g * g * g)
        t = _tanh(inner)
        slope = 0.7978845608028654 * (1 + 0.134145 * g * g)
        return 0.5 * g * (1 + t), 0.5 * (1 + t) + 0.5 * g * (1 - t * t) * slope


@triton.jit
def _expanded(
    codes, matrix, t, column, live, inside, first, second, rank, features, columns, K: tl.constexpr,
    WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Return c M [n, I] of the first and the second choice, from codes [N, R] and M [R, I]."""
    one = tl.zeros((BT, BI), tl.float32)
    two = tl.zeros((BT, BI), tl.float32)
    for start in range(0, columns, BC):
        c = start + tl.arange(0, BC)
        wanted = c < columns
        code = tl.load(codes + t[:, None] * columns + c[None, :], mask=live[:, None] & wanted[None, :], other=0.0)
        place = c[:, None] * features + column[None, :]
        m = tl.load(matrix + place, mask=wanted[:, None] & inside[None, :], other=0.0)
        if WEIGHTED:
            own = tl.where((c // rank)[None, :] == first[:, None], code, 0.0)
            one += tl.dot(own, m, input_precision=PRECISION)
        else:
            one += tl.dot(code, m, input_precision=PRECISION)
        if K == 2:
            own = tl.where((c // rank)[None, :] == second[:, None], code, 0.0)
            two += tl.dot(own, m, input_precision=PRECISION)
    return one, two


@triton.jit
def _updated(
    frozen, codes, matrix, t, column, live, inside, first, second, rank, features, columns, scale, K: tl.constexpr,
    WEIGHTED: tl.constexpr, UPDATED: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Return what a layer returns for each choice."""
    both = live[:, None] & inside[None, :]
    own = tl.load(frozen + t[:, None] * features + column[None, :], mask=both, other=0.0).to(tl.float32)
    if UPDATED:
        one, two = _expanded(
            codes, matrix, t, column, live, inside, first, second, rank, features, columns, K, WEIGHTED, PRECISION,
            BT, BI, BC,
        )  # fmt: skip
        return own + scale * one, own + scale * two
    else:
        return own, own


@triton.jit
def _keep(
    place, h, bits, both, dropped, SIDE: tl.constexpr, DROP: tl.constexpr
):  # fmt: skip
    own = h.to(place.dtype.element_ty)
    if DROP:
        own = dropped_out(own, bits, dropped, SIDE)
    tl.store(place, own, mask=both)


@triton.jit(do_not_specialize=_VARYING)
def _middle(
    gate, up, gate_codes, gate_b, up_codes, up_b, weights, experts, hidden, kept, keys, tokens, features, half,
    columns, rank, scale, salt, dropped, ACT: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr,
    GATE: tl.constexpr, UP: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BI: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * BT + tl.arange(0, BT)
    live = own < tokens
    group = tl.program_id(2).to(tl.int64)
    t = group * tokens + own
    gate_b += group * columns * features
    up_b += group * columns * features
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    first = tl.zeros((BT,), tl.int64)
    second = tl.zeros((BT,), tl.int64)
    if WEIGHTED:
        first = tl.load(experts + t * K, mask=live, other=0)
        weight = tl.load(weights + t * K, mask=live, other=0.0)
        if K == 2:
            second = tl.load(experts + t * K + 1, mask=live, other=0)
            other_weight = tl.load(weights + t * K + 1, mask=live, other=0.0)
    bits = tl.zeros((BT, BI), tl.uint32)
    other_bits = tl.zeros((BT, BI), tl.uint32)
    if DROP:
        bits = mask_bits(token_keys(keys, t, live, first, salt, WEIGHTED), i)
        if K == 2:
            other_bits = mask_bits(token_keys(keys, t, live, second, salt, WEIGHTED), i)
    for side in tl.static_range(2):
        inside = i < (features - half if side else half)
        column = side * half + i
        both = live[:, None] & inside[None, :]
        g, other_g = _updated(
            gate, gate_codes, gate_b, t, column, live, inside, first, second, rank, features, columns, scale, K,
            WEIGHTED, GATE, PRECISION, BT, BI, BC,
        )  # fmt: skip
        u, other_u = _updated(
            up, up_codes, up_b, t, column, live, inside, first, second, rank, features, columns, scale, K, WEIGHTED,
            UP, PRECISION, BT, BI, BC,
        )  # fmt: skip
        act, _ = _activated(g, ACT)
        h = act * u
        place = kept + (group * K * tokens + own)[:, None] * features + column[None, :]
        if KEEP:
            _keep(place, h, bits, both, dropped, side, DROP)
        if WEIGHTED:
            h *= weight[:, None]
        if K == 2:
            act, _ = _activated(other_g, ACT)
            other_h = act * other_u
            if KEEP:
                _keep(place + tokens.to(tl.int64) * features, other_h, other_bits, both, dropped, side, DROP)
            h += other_weight[:, None] * other_h
        tl.store(hidden + t[:, None] * features + column[None, :], h.to(hidden.dtype.element_ty), mask=both)


@triton.jit
def _choice_grad(
    g, u, q, bits, weight, gate_place, up_place, kept_place, both, dropped, SIDE: tl.constexpr, ACT: tl.constexpr,
    WEIGHTED: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Write one choice's gradients of g and u; return them, and row sums that the gradient of its weight adds up."""
    act, slope = _activated(g, ACT)
    h = act * u
    of_weight = tl.sum(q * h, 1)
    if WEIGHTED:
        q *= weight[:, None]
    dg, du = q * u * slope, q * act
    tl.store(gate_place, dg.to(gate_place.dtype.element_ty), mask=both)
    tl.store(up_place, du.to(up_place.dtype.element_ty), mask=both)
    if KEEP:
        _keep(kept_place, h, bits, both, dropped, SIDE, DROP)
    return dg, du, of_weight


@triton.jit(do_not_specialize=_VARYING)
def _middle_grad(
    gate, up, gate_codes, gate_b, up_codes, up_b, hidden_grad, down_codes, down_a, weights, experts, gate_grad,
    up_grad, gate_sum, up_sum, kept, weight_grad, keys, tokens, features, half, columns, rank, scale, salt, dropped,
    ACT: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
    KEEP: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * BT + tl.arange(0, BT)
    live = own < tokens
    group = tl.program_id(2).to(tl.int64)
    t = group * tokens + own
    gate_b += group * columns * features
    up_b += group * columns * features
    down_a += group * columns * features
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    first = tl.zeros((BT,), tl.int64)
    second = tl.zeros((BT,), tl.int64)
    weight = tl.zeros((BT,), tl.float32)
    other_weight = tl.zeros((BT,), tl.float32)
    if WEIGHTED:
        first = tl.load(experts + t * K, mask=live, other=0)
        weight = tl.load(weights + t * K, mask=live, other=0.0)
        if K == 2:
            second = tl.load(experts + t * K + 1, mask=live, other=0)
            other_weight = tl.load(weights + t * K + 1, mask=live, other=0.0)
    bits = tl.zeros((BT, BI), tl.uint32)
    other_bits = tl.zeros((BT, BI), tl.uint32)
    if DROP:
        bits = mask_bits(token_keys(keys, t, live, first, salt, WEIGHTED), i)
        if K == 2:
            other_bits = mask_bits(token_keys(keys, t, live, second, salt, WEIGHTED), i)
    of_weight = tl.zeros((BT,), tl.float32)
    of_other = tl.zeros((BT,), tl.float32)
    for side in tl.static_range(2):
        inside = i < (features - half if side else half)
        column = side * half + i
        both = live[:, None] & inside[None, :]
        g, other_g = _updated(
            gate, gate_codes, gate_b, t, column, live, inside, first, second, rank, features, columns, scale, K,
            WEIGHTED, GATE, PRECISION, BT, BI, BC,
        )  # fmt: skip
        u, other_u = _updated(
            up, up_codes, up_b, t, column, live, inside, first, second, rank, features, columns, scale, K, WEIGHTED,
            UP, PRECISION, BT, BI, BC,
        )  # fmt: skip
        place = t[:, None] * features + column[None, :]
        q = tl.load(hidden_grad + place, mask=both, other=0.0).to(tl.float32)
        other_q = q
        if KEEP:
            one, two = _expanded(
                down_codes, down_a, t, column, live, inside, first, second, rank, features, columns, K, WEIGHTED,
                PRECISION, BT, BI, BC,
            )  # fmt: skip
            if DROP:
                one = dropped_out(one, bits, dropped, side)
                two = dropped_out(two, other_bits, dropped, side)
            q += one
            other_q += two
        choice = (group * K * tokens + own)[:, None] * features + column[None, :]
        dg, du, row = _choice_grad(
            g, u, q, bits, weight, gate_grad + choice, up_grad + choice, kept + choice, both, dropped, side, ACT,
            WEIGHTED, KEEP, DROP,
        )  # fmt: skip
        of_weight += row
        if K == 2:
            choice += tokens.to(tl.int64) * features
            other_dg, other_du, row = _choice_grad(
                other_g, other_u, other_q, other_bits, other_weight, gate_grad + choice, up_grad + choice,
                kept + choice, both, dropped, side, ACT, WEIGHTED, KEEP, DROP,
            )  # fmt: skip
            of_other += row
            tl.store(gate_sum + place, (dg + other_dg).to(gate_sum.dtype.element_ty), mask=both)
            tl.store(up_sum + place, (du + other_du).to(up_sum.dtype.element_ty), mask=both)
    if WEIGHTED:
        place = weight_grad + (tl.program_id(1) * tl.num_programs(2).to(tl.int64) * tokens + t) * K
        tl.store(place, of_weight, mask=live)
        if K == 2:
            tl.store(place + 1, of_other, mask=live)


class Narrow(NamedTuple):
    """A layer's narrow operands for the columns of all experts: codes [N, R], and a matrix [G, R, I]."""

    codes: Tensor
    matrix: Tensor


class Choices(NamedTuple):
    """The chosen experts of every token.

    Attributes:
        weights: [N, k] float32.
        experts: [N, k].
        rank: columns of an expert's codes.
    """

    weights: Tensor
    experts: Tensor
    rank: int


FORWARD = {"BT": 64, "BI": 64, "num_warps": 8}
BACKWARD = {"BT": 64, "BI": 32, "num_warps": 8}
"""Sizes of tiles, of each half of the features, and warps."""


def _arguments(
    updates: tuple[Narrow | None, ...], choices: Choices | None, like: Tensor, dropout: Dropout | None, activation: str
) -> dict[str, Any]:
    """Return what both kernels take besides tensors of the stream."""
    columns = next((own.matrix.shape[1] for own in updates if own is not None), 1)
    return mask_settings(dropout) | {
        "half": half_of(like.shape[-1]),
        "columns": columns,
        "rank": columns if choices is None else choices.rank,
        "ACT": ACTIVATIONS[activation],
        "K": 1 if choices is None else choices.experts.shape[1],
        "WEIGHTED": choices is not None,
        "GATE": updates[0] is not None,
        "UP": updates[1] is not None,
        "PRECISION": precision(like),
        "BC": columns_block(columns),
    }


def _tensors(own: Narrow | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's tensors for arguments of a kernel, which does not read them where there are none."""
    return (other, other) if own is None else (own.codes.contiguous(), own.matrix)


def middle(
    gate: Tensor, up: Tensor, hidden: Tensor, updates: tuple[Narrow | None, Narrow | None], choices: Choices | None,
    groups: int, scale: float, activation: str, dropout: Dropout | None, keep: bool,
) -> Tensor | None:  # fmt: skip
    """Write sum_j w_j h_j, and return d(h_j) [G, k, n, I] where `keep`.

    Args:
        gate, up: frozen G and U [N, I], contiguous.
        hidden: [N, I], to write.
        updates: of the gate and up projections.
        choices: None for one choice of weight 1.
        groups: G.
        scale: s.
        activation: one of ACTIVATIONS.
        dropout: of h_j.
        keep: whether somebody reads d(h_j).
    """
    tokens, features = len(gate) // groups, gate.shape[1]
    settings = _arguments(updates, choices, gate, dropout, activation)
    same = keep and dropout is None and choices is None  # then d(h) is h
    kept = gate.new_empty((groups, settings["K"], tokens, features)) if keep and not same else hidden
    weights, experts = (gate, gate) if choices is None else (choices.weights, choices.experts)
    if tokens:
        tiles = triton.cdiv(tokens, FORWARD["BT"]), triton.cdiv(settings["half"], FORWARD["BI"]), groups
        _middle[tiles](
            gate, up, *_tensors(updates[0], gate), *_tensors(updates[1], gate), weights, experts, hidden, kept,
            gate if dropout is None else dropout.keys, tokens, features, scale=scale, KEEP=keep and not same,
            **settings, **FORWARD,
        )  # fmt: skip
    return kept.view(groups, -1, tokens, features) if keep else None


def middle_grad(
    gate: Tensor, up: Tensor, hidden_grad: Tensor, gate_sum: Tensor, up_sum: Tensor,
    updates: tuple[Narrow | None, Narrow | None, Narrow | None], choices: Choices | None, groups: int, scale: float,
    activation: str, dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of g_j and u_j [G, k, n, I], d(h_j) again, and the weights' gradient [N, k].

    Args:
        gate, up, choices, groups, scale, activation, dropout: as `middle` takes them.
        hidden_grad: of h [N, I], from the frozen down projection alone.
        gate_sum, up_sum: [N, I], to write the sums over choices to.
        updates: of the gate and up projections; of the down projection the gradients of its codes, times s, and A2.
    """
    tokens, features = len(gate) // groups, gate.shape[1]
    settings = _arguments(updates, choices, gate, dropout, activation)
    k, keep = settings["K"], updates[2] is not None
    shape = groups, k, tokens, features
    gate_grad, up_grad = (sums.view(shape) if k == 1 else gate.new_empty(shape) for sums in (gate_sum, up_sum))
    kept = gate.new_empty(shape) if keep else None
    tiles = triton.cdiv(tokens, BACKWARD["BT"]), triton.cdiv(settings["half"], BACKWARD["BI"]), groups
    weights, experts = (gate, gate) if choices is None else (choices.weights, choices.experts)
    rows = None if choices is None else weights.new_zeros((tiles[1], *weights.shape))
    if tokens:
        _middle_grad[tiles](
            gate, up, *_tensors(updates[0], gate), *_tensors(updates[1], gate), hidden_grad,
            *_tensors(updates[2], gate), weights, experts, gate_grad, up_grad, gate_sum, up_sum,
            gate if kept is None else kept, gate if rows is None else rows,
            gate if dropout is None else dropout.keys, tokens, features, scale=scale, KEEP=keep, **settings,
            **BACKWARD,
        )  # fmt: skip
    return gate_grad, up_grad, kept, None if rows is None else rows.sum(0)

"""The middle of a gated feed-forward block: sum_j w_j h_j, h_j = act(g_j) * u_j, for the k choices j of every token.

One pass over g and u each way. Forward also leaves d(h_j), what the down projection's updates read; backward computes h
again. A dense adapter has one choice of weight 1.

Shapes: n tokens, k choices, I intermediate; g, u and h_j [k, n, I], each choice's rows contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.fused.linear import Dropout, mask_settings
from mlora.ops.fused.masks import dropped_out, token_keys

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


@triton.jit(do_not_specialize=_VARYING)
def _gated(
    gate, up, weights, experts, hidden, kept, keys, tokens, features, salt, dropped, ACT: tl.constexpr,
    K: tl.constexpr, WEIGHTED: tl.constexpr, DROP: tl.constexpr, KEEP: tl.constexpr, BT: tl.constexpr,
    BI: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    live = t < tokens
    both = live[:, None] & (i < features)[None, :]
    total = tl.zeros((BT, BI), tl.float32)
    for j in tl.static_range(K):
        spot = (j * tokens.to(tl.int64) + t)[:, None] * features + i[None, :]
        g = tl.load(gate + spot, mask=both, other=0.0).to(tl.float32)
        u = tl.load(up + spot, mask=both, other=0.0).to(tl.float32)
        act, _ = _activated(g, ACT)
        h = act * u
        if WEIGHTED:
            total += tl.load(weights + t * K + j, mask=live, other=0.0)[:, None] * h
        else:
            total += h
        if KEEP:
            own = h.to(hidden.dtype.element_ty)
            if DROP:
                expert = tl.load(experts + t * K + j, mask=live, other=0) if WEIGHTED else 0
                own = dropped_out(own, token_keys(keys, t, live, expert, salt, WEIGHTED), i, dropped)
            tl.store(kept + spot, own, mask=both)
    tl.store(hidden + t[:, None] * features + i[None, :], total.to(hidden.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=_VARYING)
def _gated_grad(
    gate, up, hidden_grad, weights, experts, gate_grad, up_grad, gate_sum, up_sum, kept, weight_grad, keys, tokens,
    features, q_choice, salt, dropped, ACT: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, DROP: tl.constexpr,
    KEEP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    live = t < tokens
    both = live[:, None] & (i < features)[None, :]
    gate_total = tl.zeros((BT, BI), tl.float32)
    up_total = tl.zeros((BT, BI), tl.float32)
    for j in tl.static_range(K):
        spot = (j * tokens.to(tl.int64) + t)[:, None] * features + i[None, :]
        g = tl.load(gate + spot, mask=both, other=0.0).to(tl.float32)
        u = tl.load(up + spot, mask=both, other=0.0).to(tl.float32)
        q = tl.load(hidden_grad + (j * q_choice + t[:, None] * features) + i[None, :], mask=both, other=0.0)
        q = q.to(tl.float32)
        act, slope = _activated(g, ACT)
        h = act * u
        if WEIGHTED:
            place = (tl.program_id(1) * tokens.to(tl.int64) + t) * K + j
            tl.store(weight_grad + place, tl.sum(q * h, 1), mask=live)
            q *= tl.load(weights + t * K + j, mask=live, other=0.0)[:, None]
        dg, du = q * u * slope, q * act
        gate_total += dg
        up_total += du
        tl.store(gate_grad + spot, dg.to(gate_grad.dtype.element_ty), mask=both)
        tl.store(up_grad + spot, du.to(up_grad.dtype.element_ty), mask=both)
        if KEEP:
            own = h.to(kept.dtype.element_ty)
            if DROP:
                expert = tl.load(experts + t * K + j, mask=live, other=0) if WEIGHTED else 0
                own = dropped_out(own, token_keys(keys, t, live, expert, salt, WEIGHTED), i, dropped)
            tl.store(kept + spot, own, mask=both)
    if K > 1:
        spot = t[:, None] * features + i[None, :]
        tl.store(gate_sum + spot, gate_total.to(gate_sum.dtype.element_ty), mask=both)
        tl.store(up_sum + spot, up_total.to(up_sum.dtype.element_ty), mask=both)


def _settings(dropout: Dropout | None, activation: str, k: int, weights: Tensor | None, keep: bool) -> dict[str, Any]:
    return mask_settings(dropout) | {
        "ACT": ACTIVATIONS[activation],
        "K": k,
        "WEIGHTED": weights is not None,
        "KEEP": keep,
        "BT": 4,
        "BI": 512,
    }


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor for a kernel's argument that it will not read."""
    return other if tensor is None else tensor


def gated(
    gate: Tensor, up: Tensor, hidden: Tensor, weights: Tensor | None, experts: Tensor | None, activation: str,
    dropout: Dropout | None, keep: bool,
) -> Tensor | None:  # fmt: skip
    """Write sum_j w_j h_j and return d(h_j) [k, n, I] where `keep`.

    Args:
        gate, up: [k, n, I], contiguous.
        hidden: [n, I], to write.
        weights: [n, k] float32; None for one choice of weight 1.
        experts: [n, k], which a choice's dropout differs by; None as for weights.
        activation: one of ACTIVATIONS.
        dropout: of h_j.
        keep: whether somebody reads d(h_j).
    """
    k, tokens, features = gate.shape
    if keep and dropout is None and weights is None:  # then d(h) is h
        gated(gate, up, hidden, None, None, activation, None, False)
        return hidden[None]
    kept = torch.empty_like(gate) if keep else None
    if tokens:
        _gated[(triton.cdiv(tokens, 4), triton.cdiv(features, 512))](
            gate, up, _or(weights, gate), _or(experts, gate), hidden, _or(kept, gate),
            gate if dropout is None else dropout.keys, tokens, features,
            **_settings(dropout, activation, k, weights, keep),
        )  # fmt: skip
    return kept


def gated_grad(
    gate: Tensor, up: Tensor, hidden_grad: Tensor, gate_grad: Tensor, up_grad: Tensor, gate_sum: Tensor,
    up_sum: Tensor, weights: Tensor | None, experts: Tensor | None, activation: str, dropout: Dropout | None,
    keep: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Write the gradients of g_j and u_j and their sums; return d(h_j) again where `keep`, and the weights' gradient.

    Args:
        gate, up: [k, n, I], contiguous.
        hidden_grad: of w_j h_j [k, n, I], or of their sum [1, n, I].
        gate_grad, up_grad: [k, n, I], to write.
        gate_sum, up_sum: [n, I], to write; the former themselves for one choice.
        weights, experts, activation, dropout, keep: as `gated` takes them.
    """
    k, tokens, features = gate.shape
    kept = torch.empty_like(gate) if keep else None
    parts = triton.cdiv(features, 512)
    sums = None if weights is None else weights.new_zeros((parts, tokens, k))
    if tokens:
        _gated_grad[(triton.cdiv(tokens, 4), parts)](
            gate, up, hidden_grad, _or(weights, gate), _or(experts, gate), gate_grad, up_grad, gate_sum, up_sum,
            _or(kept, gate), _or(sums, gate), gate if dropout is None else dropout.keys, tokens, features,
            hidden_grad.stride(0) if len(hidden_grad) == k else 0,
            **_settings(dropout, activation, k, weights, keep),
        )  # fmt: skip
    return kept, None if sums is None else sums.sum(0)

"""The middle of a gated feed-forward block: from what its first layers return to its hidden units.

    h = sum_j w_j h_j, h_j = act(g_j) * u_j    for the one or two choices j of every token

One pass over g and u each way. What tells the second choice from the first comes apart: g_2 = g_1 + g', so that the
first is what the frozen layer leaves with the update of the first expert in it. Forward also leaves d(h_j), what the
down projection's updates read; backward computes it again. A dense adapter has one choice of weight 1.

Shapes: G adapters of n tokens each, N = G n; k choices, I intermediate. What every choice has of its own lies as
[G, k, n, I], so that the tokens of a product follow one another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.fused.choices import Choices
from mlora.ops.fused.masks import Dropout, dropped_out, mask_bits, mask_settings, token_keys
from mlora.ops.fused.products import half_of

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_VARYING = ["tokens", "salt", "dropped"]
FORWARD = {"BT": 4, "BI": 128, "num_warps": 4}
BACKWARD = {"BT": 8, "BI": 128, "num_warps": 8}
"""Sizes of tiles, of each half of the features, and warps."""


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
def _choice(
    weights, experts, keys, t, live, columns, salt, J: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr,
    DROP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """Return the weights [BT] of a choice and the random bits of its hidden units [BT, BI]."""
    weight = tl.full((BT,), 1.0, tl.float32)
    expert = tl.zeros((BT,), tl.int64)
    bits = tl.zeros((BT, BI), tl.uint32)
    if WEIGHTED:
        weight = tl.load(weights + t * K + J, mask=live, other=0.0)
        expert = tl.load(experts + t * K + J, mask=live, other=0)
    if DROP:
        bits = mask_bits(token_keys(keys, t, live, expert, salt, WEIGHTED), columns)
    return weight, bits


@triton.jit
def _keep(place, h, bits, both, dropped, SIDE: tl.constexpr, DROP: tl.constexpr):
    if DROP:
        h = dropped_out(h, bits, dropped, SIDE)
    tl.store(place, h.to(place.dtype.element_ty), mask=both)


@triton.jit(do_not_specialize=_VARYING)
def _gated(
    gate, gate_more, up, up_more, weights, experts, hidden, kept, keys, tokens, features, half, salt, dropped,
    ACT: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
    KEEP: tl.constexpr, DROP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * BT + tl.arange(0, BT)
    live = own < tokens
    group = tl.program_id(2).to(tl.int64)
    t = group * tokens + own
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    weight, bits = _choice(weights, experts, keys, t, live, i, salt, 0, K, WEIGHTED, DROP, BT, BI)
    if K == 2:
        other_weight, other_bits = _choice(weights, experts, keys, t, live, i, salt, 1, K, WEIGHTED, DROP, BT, BI)
    for side in tl.static_range(2):
        both = live[:, None] & (i < (features - half if side else half))[None, :]
        place = t[:, None] * features + (side * half + i)[None, :]
        kept_place = kept + ((group * K * tokens + own)[:, None] * features + (side * half + i)[None, :])
        g = tl.load(gate + place, mask=both, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=both, other=0.0).to(tl.float32)
        act, _ = _activated(g, ACT)
        h = act * u
        total = weight[:, None] * h
        if KEEP:
            _keep(kept_place, h, bits, both, dropped, side, DROP)
        if K == 2:
            if GATE:
                g += tl.load(gate_more + place, mask=both, other=0.0).to(tl.float32)
            if UP:
                u += tl.load(up_more + place, mask=both, other=0.0).to(tl.float32)
            act, _ = _activated(g, ACT)
            h = act * u
            total += other_weight[:, None] * h
            if KEEP:
                _keep(kept_place + tokens.to(tl.int64) * features, h, other_bits, both, dropped, side, DROP)
        tl.store(hidden + place, total.to(hidden.dtype.element_ty), mask=both)


@triton.jit
def _choice_grad(g, u, q, weight, ACT: tl.constexpr):
    """Return h of a choice, the gradients of its g and u, and row sums that the gradient of its weight adds up."""
    act, slope = _activated(g, ACT)
    h = act * u
    of_weight = tl.sum(q * h, 1)
    q *= weight[:, None]
    return h, q * u * slope, q * act, of_weight


@triton.jit(do_not_specialize=_VARYING)
def _gated_grad(
    gate, gate_more, up, up_more, hidden_grad, down, weights, experts, gate_grad, gate_more_grad, up_grad,
    up_more_grad, kept, weight_grad, keys, tokens, features, half, salt, dropped, ACT: tl.constexpr, K: tl.constexpr,
    WEIGHTED: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr, KEEP: tl.constexpr, DROP: tl.constexpr,
    BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * BT + tl.arange(0, BT)
    live = own < tokens
    group = tl.program_id(2).to(tl.int64)
    t = group * tokens + own
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    weight, bits = _choice(weights, experts, keys, t, live, i, salt, 0, K, WEIGHTED, DROP, BT, BI)
    of_weight = tl.zeros((BT,), tl.float32)
    if K == 2:
        other_weight, other_bits = _choice(weights, experts, keys, t, live, i, salt, 1, K, WEIGHTED, DROP, BT, BI)
        of_other = tl.zeros((BT,), tl.float32)
    for side in tl.static_range(2):
        both = live[:, None] & (i < (features - half if side else half))[None, :]
        place = t[:, None] * features + (side * half + i)[None, :]
        choice = (group * K * tokens + own)[:, None] * features + (side * half + i)[None, :]
        g = tl.load(gate + place, mask=both, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=both, other=0.0).to(tl.float32)
        frozen_q = tl.load(hidden_grad + place, mask=both, other=0.0).to(tl.float32)
        q = frozen_q
        if KEEP:
            part = tl.load(down + choice, mask=both, other=0.0).to(tl.float32)
            if DROP:
                part = dropped_out(part, bits, dropped, side)
            q += part
        h, dg, du, row = _choice_grad(g, u, q, weight, ACT)
        of_weight += row
        if KEEP:
            _keep(kept + choice, h, bits, both, dropped, side, DROP)
        if K == 2:
            choice += tokens.to(tl.int64) * features
            if GATE:
                g += tl.load(gate_more + place, mask=both, other=0.0).to(tl.float32)
            if UP:
                u += tl.load(up_more + place, mask=both, other=0.0).to(tl.float32)
            q = frozen_q
            if KEEP:
                part = tl.load(down + choice, mask=both, other=0.0).to(tl.float32)
                if DROP:
                    part = dropped_out(part, other_bits, dropped, side)
                q += part
            h, more_dg, more_du, row = _choice_grad(g, u, q, other_weight, ACT)
            of_other += row
            dg += more_dg
            du += more_du
            if GATE:
                tl.store(gate_more_grad + place, more_dg.to(gate_grad.dtype.element_ty), mask=both)
            if UP:
                tl.store(up_more_grad + place, more_du.to(up_grad.dtype.element_ty), mask=both)
            if KEEP:
                _keep(kept + choice, h, other_bits, both, dropped, side, DROP)
        tl.store(gate_grad + place, dg.to(gate_grad.dtype.element_ty), mask=both)
        tl.store(up_grad + place, du.to(up_grad.dtype.element_ty), mask=both)
    if WEIGHTED:
        place = weight_grad + (tl.program_id(1) * tl.num_programs(2).to(tl.int64) * tokens + t) * K
        tl.store(place, of_weight, mask=live)
        if K == 2:
            tl.store(place + 1, of_other, mask=live)


class Middle(NamedTuple):
    """What both ways take.

    Attributes:
        gate, up: g_1 and u_1 [N, I], contiguous.
        gate_more, up_more: g' and u' [N, I]; None where all choices have the same.
        choices: None for one of weight 1.
        groups: G.
        activation: one of ACTIVATIONS.
        dropout: of h_j, each expert's own.
        keep: whether somebody reads d(h_j).
    """

    gate: Tensor
    up: Tensor
    gate_more: Tensor | None
    up_more: Tensor | None
    choices: Choices | None
    groups: int
    activation: str
    dropout: Dropout | None
    keep: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[G, k, n, I]."""
        count = 1 if self.choices is None else self.choices.per_token
        return self.groups, count, len(self.gate) // self.groups, self.gate.shape[1]

    def chosen(self, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights and experts for arguments of a kernel, which does not read them where there are none."""
        return (other, other) if self.choices is None else self.choices[:2]


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor for a kernel's argument that it will not read."""
    return other if tensor is None else tensor


def _settings(of: Middle, keep: bool) -> dict[str, Any]:
    return mask_settings(of.dropout) | {
        "ACT": ACTIVATIONS[of.activation],
        "K": of.shape[1],
        "WEIGHTED": of.choices is not None,
        "GATE": of.gate_more is not None,
        "UP": of.up_more is not None,
        "KEEP": keep,
    }


def gated(of: Middle, hidden: Tensor) -> Tensor | None:
    """Write h to `hidden` [N, I], and return d(h_j) [G, k, n, I] where it is kept."""
    _, _, tokens, features = of.shape
    keep = of.keep and (of.dropout is not None or of.choices is not None)  # otherwise d(h) is h
    kept = of.gate.new_empty(of.shape) if keep else hidden
    tiles = triton.cdiv(tokens, FORWARD["BT"]), triton.cdiv(half_of(features), FORWARD["BI"]), of.groups
    if tokens:
        _gated[tiles](
            of.gate, _or(of.gate_more, hidden), of.up, _or(of.up_more, hidden), *of.chosen(hidden), hidden, kept,
            hidden if of.dropout is None else of.dropout.keys, tokens, features, half_of(features),
            **_settings(of, keep), **FORWARD,
        )  # fmt: skip
    return kept.view(of.shape) if of.keep else None


class Gradients(NamedTuple):
    """Those of `Middle`, besides g and u; None for what it has not.

    Attributes:
        weights: [N, k].
        kept: d(h_j) [G, k, n, I], once more.
    """

    weights: Tensor | None
    kept: Tensor | None


def gated_grad(of: Middle, hidden_grad: Tensor, down: Tensor | None, grads: Tensor) -> Gradients:
    """Write the gradients of g_1 and g', u_1 and u', and return the others.

    Args:
        of: as `gated` took it.
        hidden_grad: of h [N, I], by the frozen down projection.
        down: of d(h_j) [G, k, n, I], by its updates; None without.
        grads: to write, [2, k, N, I]; with k = 2 what there is no g' or u' for stays as it is.
    """
    _, _, tokens, features = of.shape
    kept = None if down is None else of.gate.new_empty(of.shape)
    tiles = triton.cdiv(tokens, BACKWARD["BT"]), triton.cdiv(half_of(features), BACKWARD["BI"]), of.groups
    sums = None if of.choices is None else of.choices.weights.new_zeros((tiles[1], *of.choices.weights.shape))
    if tokens:
        _gated_grad[tiles](
            of.gate, _or(of.gate_more, of.gate), of.up, _or(of.up_more, of.up), hidden_grad, _or(down, of.gate),
            *of.chosen(of.gate), grads[0, 0], grads[0, -1], grads[1, 0], grads[1, -1], _or(kept, of.gate),
            _or(sums, of.gate),
            of.gate if of.dropout is None else of.dropout.keys, tokens, features, half_of(features),
            **_settings(of, down is not None), **BACKWARD,
        )  # fmt: skip
    return Gradients(None if sums is None else sums.sum(0), kept)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        hidden = torch.empty_like(gate)
        gated(_alone(gate, up, activation), hidden)
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grads = gate.new_empty((2, 1, *gate.shape))
        gated_grad(_alone(gate, up, ctx.activation), grad.contiguous(), None, grads)
        return grads[0, 0], grads[1, 0], None


def _alone(gate: Tensor, up: Tensor, activation: str) -> Middle:
    return Middle(gate, up, None, None, None, 1, activation, None, False)


def gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(g) * u [N, I], differentiable, from g and u [N, I].

    Args:
        gate, up: contiguous.
        activation: one of ACTIVATIONS.
    """
    return _Gate.apply(gate, up, activation)

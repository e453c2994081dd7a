"""A gated feed-forward block and the updates of all adapters in it, as one differentiable operation.

The frozen products W1 x, W3 x and W2 h run once over the tokens of all adapters, and their gradients are summed in
place. Between them, for each adapter,

    g_j = G + s B1 (c1 of the expert e_j alone), u_j likewise
    h = sum_j w_j act(g_j) * u_j

in one pass over g and u (`gated.py`), where a dense adapter has one choice j, whose g and u overwrite G and U. Narrow
products run over the columns of all experts, zero for those not chosen: with E r near 128 they cost what one expert's
would, which no kernel that sorted tokens by expert could beat (benchmarks/RESULTS.md).

Shapes: n tokens, D hidden, I intermediate, E experts, k experts of a token, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlora.ops.dora import frozen_weight
from mlora.ops.fused.gated import gated, gated_grad
from mlora.ops.fused.linear import (
    Dropout,
    add_up,
    drop,
    dropout_of,
    gradient_of_a,
    gradient_of_b,
    narrow,
    unit_stride,
    wide,
)
from mlora.ops.lowrank import BlockUpdate
from mlora.ops.random import fold


class Part(NamedTuple):
    """The update of the tokens [start, stop) at one block.

    Attributes:
        start, stop: tokens.
        num_experts, rank, scaling: E, r and s.
        dropouts: of what the gate, up and down projections' updates read.
        activation: one of ACTIVATIONS.
    """

    start: int
    stop: int
    num_experts: int
    rank: int
    scaling: float
    dropouts: tuple[Dropout | None, Dropout | None, Dropout | None]
    activation: str

    @property
    def tokens(self) -> slice:
        """Of the stream."""
        return slice(self.start, self.stop)


class Own(NamedTuple):
    """The tensors of one part; None for what it has not. Weights and experts [n, k] are those of routed experts."""

    gate_a: Tensor | None
    gate_b: Tensor | None
    up_a: Tensor | None
    up_b: Tensor | None
    down_a: Tensor | None
    down_b: Tensor | None
    weights: Tensor | None
    experts: Tensor | None


class Kept(NamedTuple):
    """What the forward of one part leaves for its backward.

    Attributes:
        gate, up: g_j and u_j [k, n, I].
        gate_codes, up_codes: A1 d(x) and A3 d(x) [n, E r].
        down_codes: sum_j w_j A2 d(h_j) [n, E r].
    """

    gate: Tensor
    up: Tensor
    gate_codes: Tensor | None
    up_codes: Tensor | None
    down_codes: Tensor | None


class _FeedForward(torch.autograd.Function):
    """The block of every part; `tensors` holds the fields of `Own` for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[nn.Module], parts: Sequence[Part], *tensors: Any) -> Tensor:
        gate, up = layers[0](x), layers[1](x)
        hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        every = []
        for part, own in zip(parts, _owned(tensors), strict=True):
            s = part.tokens
            every.append(_forward(part, own, x[s], gate[s], up[s], hidden[s]))
        out = layers[2](hidden)
        for part, own, kept in zip(parts, _owned(tensors), every, strict=True):
            if own.down_b is not None and kept.down_codes is not None:
                add_up(out[part.tokens], kept.down_codes, wide(own.down_b, x.dtype), part.scaling)
        ctx.layers, ctx.parts = layers, parts
        ctx.save_for_backward(x, *(tensor for kept in every for tensor in kept), *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        size = len(Kept._fields)
        every = [Kept(*rest[size * i : size * (i + 1)]) for i in range(len(ctx.parts))]
        owned = _owned(rest[size * len(ctx.parts) :])
        grad = grad.contiguous()
        first, second, third = (frozen_weight(layer).to(grad.dtype) for layer in ctx.layers)
        hidden_grad = grad @ third
        gate_grad, up_grad = torch.empty_like(hidden_grad), torch.empty_like(hidden_grad)
        gradients: list[Tensor | None] = []
        codes = []
        for part, own, kept in zip(ctx.parts, owned, every, strict=True):
            s = part.tokens
            grads, of_codes = _backward(part, own, kept, x[s], grad[s], hidden_grad[s], gate_grad[s], up_grad[s])
            gradients += grads
            codes.append(of_codes)
        if not ctx.needs_input_grad[0]:
            return None, None, None, *gradients
        dx = (gate_grad @ first).addmm_(up_grad, second)
        for part, own, of_codes in zip(ctx.parts, owned, codes, strict=True):
            for a, code, dropout in zip((own.gate_a, own.up_a), of_codes, part.dropouts[:2], strict=True):
                if a is not None and code is not None:
                    add_up(dx[part.tokens], code, narrow(a, dx.dtype), 1.0, dropout)
        return dx, None, None, *gradients


def _forward(part: Part, own: Own, x: Tensor, gate: Tensor, up: Tensor, hidden: Tensor) -> Kept:
    """Write the hidden units of one part."""
    masks = _choices(own, part.num_experts)
    gate_codes, up_codes = (
        None if a is None else drop(x, dropout) @ narrow(a, x.dtype).T
        for a, dropout in zip((own.gate_a, own.up_a), part.dropouts[:2], strict=True)
    )
    gates = _updated(gate, gate_codes, own.gate_b, masks, part.scaling)
    ups = _updated(up, up_codes, own.up_b, masks, part.scaling)
    weights, experts = own.weights, own.experts
    has_down = own.down_a is not None
    kept = gated(gates, ups, hidden, weights, experts, part.activation, part.dropouts[2], has_down)
    down_codes = None
    if own.down_a is not None and kept is not None:
        down_codes = _chosen_sum(kept @ narrow(own.down_a, x.dtype).T, masks, weights)
    return Kept(gates, ups, gate_codes, up_codes, down_codes)


def _backward(
    part: Part, own: Own, kept: Kept, x: Tensor, grad: Tensor, hidden_grad: Tensor, gate_grad: Tensor, up_grad: Tensor
) -> tuple[list[Tensor | None], tuple[Tensor | None, Tensor | None]]:
    """Write the gradients of G and U; return those of `Own` and of the gate and up codes [n, E r]."""
    masks, k = _choices(own, part.num_experts), len(kept.gate)
    choices = hidden_grad[None]
    down_grad = down_a = down_b = None
    if own.down_a is not None and own.down_b is not None and kept.down_codes is not None:
        down_b = gradient_of_b(kept.down_codes, grad, own.down_b, part.scaling)
        down_grad = _alone(grad @ wide(own.down_b, grad.dtype).T * part.scaling, masks)
        choices = hidden_grad[None] if k == 1 else torch.empty_like(kept.gate)
        for j in range(k):
            dropout = _folded(part.dropouts[2], own.experts, j)
            add_up(hidden_grad, down_grad[j], narrow(own.down_a, x.dtype), 1.0, dropout, choices[j])
    gates = gate_grad[None] if k == 1 else torch.empty_like(kept.gate)
    ups = up_grad[None] if k == 1 else torch.empty_like(kept.up)
    hidden, weights = gated_grad(
        kept.gate, kept.up, choices, gates, ups, gate_grad, up_grad, own.weights, own.experts, part.activation,
        part.dropouts[2], down_grad is not None,
    )  # fmt: skip
    if down_grad is not None and hidden is not None and own.down_a is not None:
        weighted = down_grad if own.weights is None else down_grad * own.weights.T[..., None].to(down_grad.dtype)
        down_a = gradient_of_a(weighted.flatten(0, 1), hidden.flatten(0, 1), own.down_a)
    gate_codes, gate_a, gate_b = _of_update(gates, x, kept.gate_codes, own.gate_a, own.gate_b, masks, part, 0)
    up_codes, up_a, up_b = _of_update(ups, x, kept.up_codes, own.up_a, own.up_b, masks, part, 1)
    return [gate_a, gate_b, up_a, up_b, down_a, down_b, weights, None], (gate_codes, up_codes)


def _of_update(
    grads: Tensor, x: Tensor, codes: Tensor | None, a: Tensor | None, b: Tensor | None, masks: Tensor | None,
    part: Part, layer: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of codes [n, E r], of A and of B, from those of g_j or u_j [k, n, I]."""
    if codes is None or a is None or b is None:
        return None, None, None
    own = _chosen_sum(grads @ wide(b, grads.dtype).T, masks, None) * part.scaling
    of_b = gradient_of_b(_alone(codes, masks).flatten(0, 1), grads.flatten(0, 1), b, part.scaling)
    return own, gradient_of_a(own, x, a, part.dropouts[layer]), of_b


def _choices(own: Own, num_experts: int) -> Tensor | None:
    """Return [k, n, E], whether an expert is a token's j-th choice; None where there is one expert for all."""
    if own.experts is None:
        return None
    return own.experts.T.contiguous()[..., None] == torch.arange(num_experts, device=own.experts.device)


def _alone(codes: Tensor, masks: Tensor | None) -> Tensor:
    """Return codes [k, n, E r], zero but for each choice's expert, from [n, E r]."""
    if masks is None:
        return codes[None]
    return (codes.unflatten(1, (masks.shape[-1], -1)) * masks[..., None]).flatten(2)


def _chosen_sum(codes: Tensor, masks: Tensor | None, weights: Tensor | None) -> Tensor:
    """Return sum_j w_j of codes [k, n, E r], of each choice's expert alone: [n, E r]."""
    if masks is None:
        return codes[0]
    factors = masks.to(codes.dtype) if weights is None else masks * weights.T[..., None]
    apart = codes.unflatten(2, (masks.shape[-1], -1))
    return (apart * factors[..., None].to(codes.dtype)).sum(0).flatten(1)


def _updated(frozen: Tensor, codes: Tensor | None, b: Tensor | None, masks: Tensor | None, scaling: float) -> Tensor:
    """Return frozen + s B (codes of the choice's expert alone) [k, n, I]; one choice overwrites the frozen output."""
    if masks is None:
        if codes is not None and b is not None:
            add_up(frozen, codes, wide(b, frozen.dtype), scaling)
        return frozen[None]
    if codes is None or b is None:
        return frozen.expand(len(masks), *frozen.shape).contiguous()
    out = torch.empty((len(masks), *frozen.shape), dtype=frozen.dtype, device=frozen.device)
    matrix = wide(b, frozen.dtype)
    for own, codes_of in zip(out, _alone(codes, masks), strict=True):
        add_up(frozen, codes_of, matrix, scaling, out=own)
    return out


def _folded(dropout: Dropout | None, experts: Tensor | None, choice: int) -> Dropout | None:
    """Return the dropout of one choice's hidden units: a stream of its own for each expert."""
    if dropout is None or experts is None:
        return dropout
    return dropout._replace(keys=fold(dropout.keys, experts[:, choice]))


def _owned(tensors: Sequence[Any]) -> list[Own]:
    size = len(Own._fields)
    return [Own(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Return the name in ACTIVATIONS of a base model's function; None where the kernels do not know it."""
    known = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh"}
    return known.get(type(activation).__name__)


def block_part(
    update: BlockUpdate, start: int, stop: int, activation: str, keys: Tensor | None, streams: Sequence[str]
) -> tuple[Part, Own]:
    """Return an adapter's update as `feed_forward` takes it.

    Args:
        update: of the block.
        start, stop: its tokens.
        activation: one of ACTIVATIONS.
        keys: [n] of the tokens' dropout; None for none.
        streams: names of the dropout streams of the gate, up and down projections.
    """
    pairs = (update.gate, update.up, update.down)
    rank = next((pair[0].shape[-2] for pair in pairs if pair is not None), 1)
    gate, up, down = (
        None if pair is None else dropout_of(keys, update.dropout, stream)
        for pair, stream in zip(pairs, streams, strict=True)
    )
    part = Part(start, stop, update.num_experts, rank, update.scaling, (gate, up, down), activation)
    matrices = (pair or (None, None) for pair in pairs)
    (a1, b1), (a3, b3), (a2, b2) = matrices
    return part, Own(a1, b1, a3, b3, a2, b2, update.weights, update.experts)


def feed_forward(x: Tensor, layers: Sequence[nn.Module], parts: Sequence[Part], owned: Sequence[Own]) -> Tensor:
    """Return the block's output [n, D].

    Args:
        x: [n, D].
        layers: the frozen gate, up and down projections; the last without bias.
        parts: of every adapter, in order, without gaps.
        owned: the tensors of each part: A and B plain or [E, ...], weights [n, k] float32, experts [n, k].
    """
    return _FeedForward.apply(unit_stride(x), layers, parts, *(tensor for own in owned for tensor in own))

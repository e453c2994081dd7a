"""A gated feed-forward block and the updates of all adapters in it, as one differentiable operation.

The frozen products W1 x, W3 x and W2 h run once over the tokens of all adapters, and their gradients are summed in
place. What lies between them runs in one pass over W1 x and W3 x each way (`middle.py`), for adapters of one form at
once (`groups.py`).

Shapes: n tokens, D hidden, I intermediate, E experts, k experts of a token, r rank; N = G n tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlora.ops.dora import frozen_weight
from mlora.ops.fused.groups import dropout_form, form_of, grouped, joined, joined_dropout
from mlora.ops.fused.masks import Dropout, dropout_of
from mlora.ops.fused.middle import Choices, Narrow, middle, middle_grad
from mlora.ops.fused.products import (
    add_up,
    drop,
    gradients_of_a,
    gradients_of_b,
    narrow,
    product,
    unit_stride,
    wide,
)
from mlora.ops.lowrank import BlockUpdate


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


class _Group(NamedTuple):
    """Parts of one form.

    Attributes:
        members: their numbers.
        tokens: of the stream.
        form: any of them.
        dropouts: as a part's, with the keys of all.
    """

    members: slice
    tokens: slice
    form: Part
    dropouts: tuple[Dropout | None, ...]


class _Stacks(NamedTuple):
    """The tensors of a group: A and B of each part, and the choices of all its tokens; None for what it has not."""

    gate: tuple[list[Tensor], list[Tensor]] | None
    up: tuple[list[Tensor], list[Tensor]] | None
    down: tuple[list[Tensor], list[Tensor]] | None
    choices: Choices | None


class _Kept(NamedTuple):
    """What the forward of a group leaves for its backward.

    Attributes:
        gate_codes, up_codes: A1 d(x) and A3 d(x) [N, E r].
        down_codes: sum_j w_j A2 d(h_j) [N, E r].
    """

    gate_codes: Tensor | None
    up_codes: Tensor | None
    down_codes: Tensor | None


class _FeedForward(torch.autograd.Function):
    """The block of every part; `tensors` holds the fields of `Own` for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[nn.Module], parts: Sequence[Part], *tensors: Any) -> Tensor:
        owned = _owned(tensors)
        gate, up = layers[0](x), layers[1](x)
        hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        groups = list(_groups(parts, owned))
        every = []
        for group in groups:
            t = group.tokens
            every.append(_forward(group, _stacked(group, owned), x[t], gate[t], up[t], hidden[t]))
        out = layers[2](hidden)
        for group, kept in zip(groups, every, strict=True):
            down = _stacked(group, owned).down
            if down is not None and kept.down_codes is not None:
                add_up(out[group.tokens], kept.down_codes, wide(down[1], x.dtype), group.form.scaling)
        ctx.layers, ctx.groups = layers, groups
        ctx.save_for_backward(x, gate, up, *(tensor for kept in every for tensor in kept), *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, *rest = ctx.saved_tensors
        size = len(_Kept._fields)
        every = [_Kept(*rest[size * i : size * (i + 1)]) for i in range(len(ctx.groups))]
        owned = _owned(rest[size * len(ctx.groups) :])
        grad = grad.contiguous()
        first, second, third = (frozen_weight(layer).to(grad.dtype) for layer in ctx.layers)
        hidden_grad = grad @ third
        gate_grad, up_grad = torch.empty_like(hidden_grad), torch.empty_like(hidden_grad)
        gradients: list[Tensor | None] = []
        codes = []
        for group, kept in zip(ctx.groups, every, strict=True):
            t, stacks = group.tokens, _stacked(group, owned)
            grads, of_codes = _backward(
                group, stacks, kept, x[t], gate[t], up[t], grad[t], hidden_grad[t], gate_grad[t], up_grad[t]
            )
            gradients += grads
            codes.append(of_codes)
        if not ctx.needs_input_grad[0]:
            return None, None, None, *gradients
        dx = (gate_grad @ first).addmm_(up_grad, second)
        for group, of_codes in zip(ctx.groups, codes, strict=True):
            stacks = _stacked(group, owned)
            for stack, code, dropout in zip((stacks.gate, stacks.up), of_codes, group.dropouts[:2], strict=True):
                if stack is not None and code is not None:
                    add_up(dx[group.tokens], code, narrow(stack[0], dx.dtype), 1.0, dropout)
        return dx, None, None, *gradients


def _forward(group: _Group, stacks: _Stacks, x: Tensor, gate: Tensor, up: Tensor, hidden: Tensor) -> _Kept:
    """Write the hidden units of one group."""
    form, count = group.form, _count(group)
    gate_codes, up_codes = (
        None if stack is None else product(drop(x, dropout), narrow(stack[0], x.dtype).mT)
        for stack, dropout in zip((stacks.gate, stacks.up), group.dropouts[:2], strict=True)
    )
    updates = _narrow(gate_codes, stacks.gate, 1), _narrow(up_codes, stacks.up, 1)
    kept = middle(
        gate, up, hidden, updates, stacks.choices, count, form.scaling, form.activation, group.dropouts[2],
        stacks.down is not None,
    )  # fmt: skip
    down_codes = None
    if stacks.down is not None and kept is not None:
        of_choices = product(kept.view(-1, kept.shape[-1]), narrow(stacks.down[0], x.dtype).mT)
        weights = None if stacks.choices is None else stacks.choices.weights
        down_codes = _chosen_sum(of_choices, _masks(group, stacks), weights)
    return _Kept(gate_codes, up_codes, down_codes)


def _backward(
    group: _Group, stacks: _Stacks, kept: _Kept, x: Tensor, gate: Tensor, up: Tensor, grad: Tensor,
    hidden_grad: Tensor, gate_grad: Tensor, up_grad: Tensor,
) -> tuple[list[Tensor | None], tuple[Tensor | None, Tensor | None]]:  # fmt: skip
    """Write the gradients of G and U; return those of every part's `Own` and of the gate and up codes [N, E r]."""
    form, masks, count = group.form, _masks(group, stacks), _count(group)
    down, down_grad = stacks.down, None
    of_down_a: Sequence[Tensor | None] = _none(count)
    of_down_b: Sequence[Tensor | None] = _none(count)
    if down is not None and kept.down_codes is not None:
        of_down_b = gradients_of_b(kept.down_codes, grad, down[1], form.scaling)
        down_grad = product(grad, wide(down[1], grad.dtype).mT) * form.scaling
    updates = (
        _narrow(kept.gate_codes, stacks.gate, 1),
        _narrow(kept.up_codes, stacks.up, 1),
        _narrow(down_grad, down, 0),
    )
    gates, ups, hidden, of_weights = middle_grad(
        gate, up, hidden_grad, gate_grad, up_grad, updates, stacks.choices, count, form.scaling, form.activation,
        group.dropouts[2],
    )  # fmt: skip
    if down is not None and down_grad is not None and hidden is not None:
        weights = None if stacks.choices is None else stacks.choices.weights
        alone = _alone(down_grad, masks, weights)
        of_down_a = gradients_of_a(alone, hidden.view(-1, hidden.shape[-1]), down[0])
    gate_codes, *of_gate = _of_update(gates, x, kept.gate_codes, stacks.gate, masks, group, 0)
    up_codes, *of_up = _of_update(ups, x, kept.up_codes, stacks.up, masks, group, 1)
    split = _none(count) if of_weights is None else of_weights.chunk(count)
    every = zip(*of_gate, *of_up, of_down_a, of_down_b, split, _none(count), strict=True)
    return [tensor for part in every for tensor in part], (gate_codes, up_codes)


def _of_update(
    grads: Tensor, x: Tensor, codes: Tensor | None, stack: tuple[list[Tensor], list[Tensor]] | None,
    masks: Tensor | None, group: _Group, layer: int,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:  # fmt: skip
    """Return the gradients of codes [N, E r], of each A and of each B, from those of g_j or u_j [G, k, n, I]."""
    if codes is None or stack is None:
        return None, _none(_count(group)), _none(_count(group))
    flat, scaling = grads.view(-1, grads.shape[-1]), group.form.scaling
    own = _chosen_sum(product(flat, wide(stack[1], grads.dtype).mT), masks, None) * scaling
    of_b = gradients_of_b(_alone(codes, masks, None), flat, stack[1], scaling)
    return own, gradients_of_a(own, x, stack[0], group.dropouts[layer]), of_b


def _none(count: int) -> Sequence[None]:
    return [None] * count


def _narrow(codes: Tensor | None, stack: tuple[list[Tensor], list[Tensor]] | None, which: int) -> Narrow | None:
    """Return what the middle reads of a layer: codes and B, or (0) their gradients and A."""
    if codes is None or stack is None:
        return None
    return Narrow(codes, (narrow, wide)[which](stack[which], codes.dtype))


def _masks(group: _Group, stacks: _Stacks) -> Tensor | None:
    """Return [G, k, n, E], whether an expert is a token's j-th choice; None where there is one expert for all."""
    if stacks.choices is None:
        return None
    experts = stacks.choices.experts.unflatten(0, (_count(group), -1)).transpose(1, 2)
    return experts[..., None] == torch.arange(group.form.num_experts, device=experts.device)


def _alone(codes: Tensor, masks: Tensor | None, weights: Tensor | None) -> Tensor:
    """Return codes [G k n, E r], zero but for each choice's expert, times its weight, from [N, E r]."""
    if masks is None:
        return codes
    groups, _, _, experts = masks.shape
    apart = codes.unflatten(1, (experts, -1)).unflatten(0, (groups, 1, -1))
    return (apart * _factors(masks, weights, codes.dtype)).flatten(3).flatten(0, 2)


def _chosen_sum(codes: Tensor, masks: Tensor | None, weights: Tensor | None) -> Tensor:
    """Return sum_j w_j of codes [G k n, E r], of each choice's expert alone: [N, E r]."""
    if masks is None:
        return codes
    groups, k, _, experts = masks.shape
    apart = codes.unflatten(1, (experts, -1)).unflatten(0, (groups, k, -1))
    return (apart * _factors(masks, weights, codes.dtype)).sum(1).flatten(2).flatten(0, 1)


def _factors(masks: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return masks [G, k, n, E, 1], times the choices' weights [N, k]."""
    if weights is not None:
        masks = masks * weights.unflatten(0, (len(masks), -1)).transpose(1, 2)[..., None]
    return masks[..., None].to(dtype)


def _owned(tensors: Sequence[Any]) -> list[Own]:
    size = len(Own._fields)
    return [Own(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


def _groups(parts: Sequence[Part], owned: Sequence[Own]) -> Iterator[_Group]:
    def form(number: int) -> tuple[Any, ...]:
        part = parts[number]
        plain = part.num_experts, part.rank, part.scaling, part.activation
        return (
            *plain,
            *map(dropout_form, part.dropouts),
            *map(form_of, owned[number][:6]),
            owned[number].weights is None,
        )

    for members in grouped(parts, form):
        own = parts[members]
        dropouts = tuple(joined_dropout(each) for each in zip(*(part.dropouts for part in own), strict=True))
        yield _Group(members, slice(own[0].start, own[-1].stop), own[0], dropouts)


def _stacked(group: _Group, owned: Sequence[Own]) -> _Stacks:
    own = owned[group.members]
    columns: list[Any] = [None if tensors[0] is None else list(tensors) for tensors in zip(*own, strict=True)]
    gate, up, down = (
        None if a is None or b is None else (a, b) for a, b in zip(columns[:6:2], columns[1:6:2], strict=True)
    )
    weights, experts = columns[6:]
    choices = None if weights is None else Choices(joined(weights), joined(experts), group.form.rank)
    return _Stacks(gate, up, down, choices)


def _count(group: _Group) -> int:
    return group.members.stop - group.members.start


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

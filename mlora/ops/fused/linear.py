"""A frozen linear layer and the low-rank updates of all adapters at it, as one differentiable operation.

    y[s] = f_s (W x[s] + scaling_s B_s (w_s * (A_s d(x[s])))) + b    for the tokens s of each adapter

with weights w for the experts where the update has any, and a factor f for each output where it rescales (DoRA).

Shapes: n tokens, D inputs, O outputs, R = E * r columns of E stacked matrices of rank r; N = G n tokens of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mlora.ops.dora import frozen_weight
from mlora.ops.fused.groups import dropout_form, form_of, grouped, joined, joined_dropout
from mlora.ops.fused.masks import Dropout
from mlora.ops.fused.products import (
    Addend,
    add_dropped,
    add_up,
    drop,
    frozen_product,
    gradients_of_a,
    gradients_of_b,
    narrow,
    product,
    rescale,
    rescale_grad,
    unit_stride,
    wide,
)


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


class Tensors(NamedTuple):
    """Of one part: A and B plain or [E, ...], the experts' weights [n, E], the factor f [O]; None for what it lacks."""

    a: Tensor
    b: Tensor
    weights: Tensor | None
    factor: Tensor | None


class _Group(NamedTuple):
    """Parts of one form.

    Attributes:
        members: their numbers.
        tokens: of the stream.
        scaling, dropout: of each, with the keys of all.
    """

    members: slice
    tokens: slice
    scaling: float
    dropout: Dropout | None


class _AdaptedLinear(torch.autograd.Function):
    """`tensors` holds the fields of `Tensors` for each part; W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, parts: Sequence[Part], *tensors: Any) -> Tensor:
        owned = _owned(tensors)
        groups = list(_groups(parts, owned))
        kept, addends = [], []
        for group in groups:
            own = owned[group.members]
            a, b = narrow([t.a for t in own], x.dtype), wide([t.b for t in own], x.dtype)
            codes = product(drop(x[group.tokens], group.dropout), a.mT, group.scaling)
            kept += [codes, a, b]
            addends.append(Addend(group.tokens, _weighted(codes, own), b))
        out = frozen_product(layer, x, addends)
        out, unscaled = _rescaled(out, groups, owned, cast("Tensor | None", layer.bias))
        ctx.layer, ctx.groups = layer, groups
        ctx.save_for_backward(x, *kept, *unscaled, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = len(ctx.groups)
        kept, scaled, owned = saved[: 3 * count], saved[3 * count : 4 * count], _owned(saved[4 * count :])
        grad, factors = _gradients_of_factors(grad.contiguous(), scaled, ctx.groups, owned)
        dx = grad @ frozen_weight(ctx.layer).to(grad.dtype) if ctx.needs_input_grad[0] else None
        gradients: list[Tensor | None] = []
        for group, codes, a, b in zip(ctx.groups, kept[::3], kept[1::3], kept[2::3], strict=True):
            own, here = owned[group.members], grad[group.tokens]
            # codes hold the scaling, so what reaches their weights does not
            weighted = product(here, b.mT, group.scaling if own[0].weights is None else 1.0)
            of_weights = _gradients_of_weights(weighted, codes, own)
            of_codes = _weighted(weighted, own, group.scaling)
            of_b = gradients_of_b([(here, _weighted(codes, own))], [t.b for t in own])
            of_a = gradients_of_a(of_codes, x[group.tokens], [t.a for t in own], group.dropout)
            if dx is not None:
                here = dx[group.tokens]
                if group.dropout is None:
                    add_up(here, of_codes, a)
                else:
                    add_dropped(here, [product(of_codes, a)], [group.dropout])
            for part in zip(of_a, of_b, of_weights, factors[group.members], strict=True):
                gradients += part
        return dx, None, None, *gradients


def _owned(tensors: Sequence[Any]) -> list[Tensors]:
    size = len(Tensors._fields)
    return [Tensors(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


def _groups(parts: Sequence[Part], owned: Sequence[Tensors]) -> Iterator[_Group]:
    def form(number: int) -> tuple[Any, ...]:
        part = parts[number]
        return part.scaling, dropout_form(part.dropout), *map(form_of, owned[number])

    for members in grouped(parts, form):
        own = parts[members]
        dropout = joined_dropout([part.dropout for part in own])
        yield _Group(members, slice(own[0].start, own[-1].stop), own[0].scaling, dropout)


def _weighted(codes: Tensor, own: Sequence[Tensors], scale: float = 1.0) -> Tensor:
    """Return codes [N, E r] times the experts' weights and a factor; as they are where there are no weights."""
    if own[0].weights is None:
        return codes
    weights = _weights(own) * scale
    return (codes.unflatten(1, (weights.shape[1], -1)) * weights[..., None].to(codes.dtype)).flatten(1)


def _gradients_of_weights(weighted: Tensor, codes: Tensor, own: Sequence[Tensors]) -> Sequence[Tensor | None]:
    """Return those of each part [n, E], from the gradients of weighted codes [N, E r]."""
    if own[0].weights is None:
        return [None] * len(own)
    experts = own[0].weights.shape[1]
    return (weighted * codes).unflatten(1, (experts, -1)).sum(-1, dtype=torch.float32).chunk(len(own))


def _weights(own: Sequence[Tensors]) -> Tensor:
    return joined([t.weights for t in own if t.weights is not None])


def _factors(own: Sequence[Tensors]) -> Tensor | None:
    """Return the factors [G, O] of a group; None where it has none."""
    known = [t.factor for t in own if t.factor is not None]
    return torch.stack(known) if known else None


def _rescaled(
    out: Tensor, groups: Sequence[_Group], owned: Sequence[Tensors], bias: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the output [n, O] times the factors, the bias left out of it, and what each group's factors scaled."""
    if all(own.factor is None for own in owned):
        return out, [None] * len(groups)
    whole = len(groups) == 1 and groups[0].tokens == slice(0, len(out))
    rescaled = torch.empty_like(out) if whole else out.clone()
    unscaled: list[Tensor | None] = []
    for group in groups:
        factors = _factors(owned[group.members])
        if factors is None:
            unscaled.append(None)
            continue
        here = out[group.tokens] if bias is None else out[group.tokens].sub_(bias.to(out.dtype))
        there = rescaled[group.tokens]
        rescale(here, factors, there)
        if bias is not None:
            there += bias.to(out.dtype)
        unscaled.append(here)
    return rescaled, unscaled


def _gradients_of_factors(
    grad: Tensor, unscaled: Sequence[Tensor | None], groups: Sequence[_Group], owned: Sequence[Tensors]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradient [n, O] of what the factors scaled, and that of each part's factor."""
    found: list[Tensor | None] = []
    copied = False
    for group, here in zip(groups, unscaled, strict=True):
        own = owned[group.members]
        factors = _factors(own)
        if factors is None or here is None:
            found += [None] * len(own)
            continue
        scaled, of_factors = rescale_grad(grad[group.tokens], here, factors)
        found += of_factors.unbind(0)
        if len(scaled) == len(grad):
            grad = scaled
        else:
            grad, copied = grad if copied else grad.clone(), True
            grad[group.tokens] = scaled
    return grad, found


def adapted_linear(x: Tensor, layer: nn.Module, parts: Sequence[Part], tensors: Sequence[Tensors]) -> Tensor:
    """Return a frozen layer's output with updates [n, O].

    Args:
        x: [n, D].
        layer: frozen, torch's own or quantised.
        parts: tokens that have an update, in order.
        tensors: of each part.
    """
    return _AdaptedLinear.apply(unit_stride(x), layer, parts, *(tensor for own in tensors for tensor in own))

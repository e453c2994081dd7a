"""Frozen linear layers that read one input, and the low-rank updates of all adapters at them, as one operation.

    y[s] = f_s (W x[s] + scaling_s B_s (w_s * (A_s d(x[s])))) + b    for the tokens s of each adapter

with weights w for the experts where the update has any, and a factor f for each output where it rescales (DoRA).

Shapes: n tokens, D inputs, O outputs, R = E * r columns of E stacked matrices of rank r; N = G n tokens of a group.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mlora.ops.copies import Lasting, leaves, place
from mlora.ops.dora import frozen_weight
from mlora.ops.fused.dropped import MOST_LAYERS, add_expanded, gradients_of_a, reduced
from mlora.ops.fused.groups import dropout_form, form_of, grouped, joined, joined_dropout
from mlora.ops.fused.masks import Dropout
from mlora.ops.fused.products import (
    Addend,
    apart,
    frozen_product,
    narrow,
    of_each_a,
    of_each_b,
    product,
    rescale,
    rescale_grad,
    summed_products,
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


class Layer(NamedTuple):
    """A frozen layer and the updates of its input's tokens.

    Attributes:
        frozen: torch's own or quantised.
        parts: tokens that have an update, in order.
        tensors: of each part.
    """

    frozen: nn.Module
    parts: Sequence[Part]
    tensors: Sequence[Tensors]


class _Plan(NamedTuple):
    """What a layer's forward leaves for its backward, besides tensors."""

    frozen: nn.Module
    groups: list[_Group]
    owned: slice


class _Bundle(NamedTuple):
    """Groups of the same tokens at up to three layers, whose narrow products are one launch.

    Attributes:
        members: their numbers among the groups of all layers.
        tokens: of the stream.
        scaling: of each.
        dropouts: of each.
    """

    members: list[int]
    tokens: slice
    scaling: float
    dropouts: list[Dropout | None]


class _AdaptedLinears(torch.autograd.Function):
    """Layers that read one input; `tensors` holds the fields of `Tensors` for each part of each. W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lasting: Lasting | None, layers: Sequence[tuple[nn.Module, Sequence[Part]]], *tensors: Any
    ) -> tuple[Tensor, ...]:
        casts = None if lasting is None else lasting.casts
        ctx.lasting, ctx.leaves = lasting, leaves(tensors)  # recomputed layers are given copies of parameters
        owned, stop = _owned(tensors), 0
        ctx.plans = []
        for frozen, parts in layers:
            here = slice(stop, stop := stop + len(parts))
            ctx.plans.append(_Plan(frozen, list(_groups(parts, owned[here])), here))
        every = _members(ctx.plans, owned)
        ctx.bundles = list(_bundles(every))
        codes, stacks = dict[int, Tensor](), []
        for bundle in ctx.bundles:
            stack = narrow([t.a for i in bundle.members for t in every[i][1]], x.dtype, casts)
            stacks.append(stack.unflatten(0, (len(bundle.members), -1)))
            found = reduced(x[bundle.tokens], stacks[-1], bundle.dropouts, bundle.scaling)
            codes |= zip(bundle.members, found, strict=True)
        outs, kept, unscaled = list[Tensor](), list[Tensor](), list[Tensor | None]()
        for plan in ctx.plans:
            addends = []
            for group in plan.groups:
                own, own_codes = owned[plan.owned][group.members], codes[len(kept) // 2]
                b = wide([t.b for t in own], x.dtype, casts)
                kept += [own_codes, b]
                addends.append(Addend(group.tokens, apart(_weighted(own_codes, own), len(own)), b))
            out = frozen_product(plan.frozen, x, addends)
            bias = cast("Tensor | None", plan.frozen.bias)
            out, before = _rescaled(out, plan.groups, owned[plan.owned], bias)
            outs.append(out)
            unscaled += before
        ctx.save_for_backward(x, *stacks, *kept, *unscaled, *tensors)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = sum(len(plan.groups) for plan in ctx.plans)
        each = iter(saved)
        stacks, kept, unscaled = (list(islice(each, n)) for n in (len(ctx.bundles), 2 * count, count))
        owned = _owned(list(each))
        every = _members(ctx.plans, owned)
        parameters: list[Sequence[Any]] = [own for _, own in _members(ctx.plans, _owned(ctx.leaves))]
        of_codes, slots = [], dict[int, Tensor]()
        for bundle, stack in zip(ctx.bundles, stacks, strict=True):
            tokens = bundle.tokens.stop - bundle.tokens.start
            of_codes.append(stack.new_empty((len(stack), tokens, stack.shape[2])))
            slots |= zip(bundle.members, of_codes[-1], strict=True)
        dx: Tensor | None = None
        found: list[list[Sequence[Tensor | None]]] = []  # of each group, gradients of B, weights and factors
        for plan, grad in zip(ctx.plans, grads, strict=True):
            first = len(found)
            here = slice(first, first + len(plan.groups))
            grad, factors = _gradients_of_factors(grad.contiguous(), unscaled[here], plan.groups, owned[plan.owned])
            if ctx.needs_input_grad[0]:
                weight = frozen_weight(plan.frozen).to(grad.dtype)
                dx = grad @ weight if dx is None else dx.addmm_(grad, weight)
            for i, (group, own) in enumerate(every[here], first):
                codes, b = kept[2 * i : 2 * i + 2]
                of_out, slot = apart(grad[group.tokens], len(own)), apart(slots[i], len(own))
                # codes hold the scaling, so what reaches their weights does not
                product(of_out, b.mT, group.scaling if own[0].weights is None else 1.0, slot)
                of_weights = _gradients_of_weights(slots[i], codes, own)
                if own[0].weights is not None:
                    slots[i].copy_(_weighted(slots[i], own, group.scaling))
                out = place(ctx.lasting, [t.b for t in parameters[i]]) if own[0].b.ndim == 2 else None
                summed = summed_products(of_out, apart(_weighted(codes, own), len(own)), out=out)
                found.append([of_each_b(summed, [t.b for t in own]), of_weights, factors[group.members]])
        of_a = dict[int, list[Tensor]]()
        for bundle, codes, stack in zip(ctx.bundles, of_codes, stacks, strict=True):
            out = place(ctx.lasting, [t.a for i in bundle.members for t in parameters[i]])
            summed = gradients_of_a(codes, x[bundle.tokens], bundle.dropouts, stack.shape[1], out)
            for i, own in zip(bundle.members, summed, strict=True):
                of_a[i] = of_each_a(own, [t.a for t in every[i][1]])
            if dx is not None:
                add_expanded(dx[bundle.tokens], codes, stack, bundle.dropouts)
        gradients: list[Tensor | None] = []
        for i, others in enumerate(found):
            for part in zip(of_a[i], *others, strict=True):
                gradients += part
        return dx, None, None, *gradients


def _members(plans: Sequence[_Plan], owned: Sequence[Tensors]) -> list[tuple[_Group, Sequence[Tensors]]]:
    """Return the groups of all layers, each with the tensors of its parts."""
    return [(group, owned[plan.owned][group.members]) for plan in plans for group in plan.groups]


def _bundles(every: Sequence[tuple[_Group, Sequence[Tensors]]]) -> Iterator[_Bundle]:
    """Yield groups of the same tokens and forms, as many as a kernel takes."""
    found: dict[Hashable, list[int]] = {}
    for i, (group, own) in enumerate(every):
        share = None if group.dropout is None else group.dropout.dropped
        tokens = group.tokens.start, group.tokens.stop
        found.setdefault((*tokens, share, group.scaling, len(own), own[0].a.shape), []).append(i)
    for alike in found.values():
        for first in range(0, len(alike), MOST_LAYERS):
            members = alike[first : first + MOST_LAYERS]
            group = every[members[0]][0]
            yield _Bundle(members, group.tokens, group.scaling, [every[i][0].dropout for i in members])


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


def adapted_linears(x: Tensor, layers: Sequence[Layer], lasting: Lasting | None = None) -> tuple[Tensor, ...]:
    """Return the outputs [n, O] of frozen layers with updates, which all read x [n, D].

    Args:
        x: [n, D].
        layers: that read it.
        lasting: casts and places of gradients; None for its own.
    """
    tensors = (tensor for layer in layers for own in layer.tensors for tensor in own)
    return _AdaptedLinears.apply(unit_stride(x), lasting, [(layer.frozen, layer.parts) for layer in layers], *tensors)

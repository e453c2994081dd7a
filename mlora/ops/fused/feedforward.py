"""A gated feed-forward block and the updates of all adapters in it, as one differentiable operation.

The frozen products W1 x, W3 x and W2 h run once over the tokens of all adapters, and their gradients are summed in
place. What lies between them runs in one pass each way (`gated.py`), for adapters of one form at once (`groups.py`).
Narrow products run over the columns of all experts, zero for those not chosen: with E r near 128 they cost what one
expert's would, which no kernel that sorted tokens by expert could beat (benchmarks/RESULTS.md).

Shapes: n tokens, D hidden, I intermediate, E experts, k experts of a token, r rank; N = G n tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlora.ops.copies import Casts
from mlora.ops.dora import frozen_weight
from mlora.ops.fused.choices import Choices
from mlora.ops.fused.gated import Middle, gated, gated_grad
from mlora.ops.fused.groups import dropout_form, form_of, grouped, joined, joined_dropout
from mlora.ops.fused.masks import Dropout, dropout_of
from mlora.ops.fused.products import (
    Addend,
    add_updates,
    drop,
    frozen_product,
    gradients_of_a,
    gradients_of_b,
    narrow,
    product,
    unit_stride,
    wide,
)
from mlora.ops.fused.router import ADDED, router_gradients, routes_of
from mlora.ops.lowrank import BlockUpdate


class Part(NamedTuple):
    """The update of the tokens [start, stop) at one block.

    Attributes:
        start, stop: tokens.
        num_experts, rank, scaling: E, r and s.
        choices: k, of routed experts.
        dropouts: of what the gate, up and down projections' updates read.
        activation: one of ACTIVATIONS.
    """

    start: int
    stop: int
    num_experts: int
    rank: int
    scaling: float
    choices: int
    dropouts: tuple[Dropout | None, Dropout | None, Dropout | None]
    activation: str


class Own(NamedTuple):
    """The tensors of one part, the last a router [E, D]; None for what it has not."""

    gate_a: Tensor | None
    gate_b: Tensor | None
    up_a: Tensor | None
    up_b: Tensor | None
    down_a: Tensor | None
    down_b: Tensor | None
    router: Tensor | None


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


class _Pair(NamedTuple):
    """The updates of a group at one layer.

    Attributes:
        a, b: of every part.
        narrow, wide: the same as [G, E r, F], of the dtype that products run in.
    """

    a: list[Tensor]
    b: list[Tensor]
    narrow: Tensor
    wide: Tensor


class _Stacks(NamedTuple):
    """The tensors of a group: of its layers, and whom its tokens chose; None for what it has not."""

    gate: _Pair | None
    up: _Pair | None
    down: _Pair | None
    choices: Choices | None

    @property
    def matrices(self) -> list[Tensor | None]:
        """Narrow and wide of every layer: six."""
        return [m for pair in self[:3] for m in ((None, None) if pair is None else (pair.narrow, pair.wide))]


class _First(NamedTuple):
    """A group's update of the gate or the up projection.

    Attributes:
        codes: s A d(x) [N, E r].
        addends: to the layer's output, for the first choice.
        more: what the second choice has more [N, I]; None where there is no second.
    """

    codes: Tensor | None
    addends: list[Addend]
    more: Tensor | None


class _Kept(NamedTuple):
    """What the forward of a group leaves for its backward.

    Attributes:
        gate_codes, up_codes: s A1 d(x) and s A3 d(x) [N, E r].
        gate_more, up_more: what the second choice has more [N, I].
        down_codes: s sum_j w_j A2 d(h_j) [N, E r].
        gate_narrow, ..., down_wide: the matrices of its stacks.
        routers: [G, E, D] float32.
        weights, experts: [N, k] of its tokens' choices.
    """

    gate_codes: Tensor | None
    up_codes: Tensor | None
    gate_more: Tensor | None
    up_more: Tensor | None
    down_codes: Tensor | None
    gate_narrow: Tensor | None
    gate_wide: Tensor | None
    up_narrow: Tensor | None
    up_wide: Tensor | None
    down_narrow: Tensor | None
    down_wide: Tensor | None
    routers: Tensor | None
    weights: Tensor | None
    experts: Tensor | None

    @property
    def matrices(self) -> Sequence[Tensor | None]:
        """Narrow and wide of every layer."""
        return self[5:11]

    @property
    def chosen(self) -> tuple[Tensor, Tensor] | None:
        """Weights and experts."""
        return None if self.weights is None or self.experts is None else (self.weights, self.experts)


class _FeedForward(torch.autograd.Function):
    """The block of every part, and logits of those that have a router; `tensors` holds the fields of `Own` for each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, casts: Casts | None, layers: Sequence[nn.Module], parts: Sequence[Part], *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        owned = _owned(tensors)
        groups = list(_groups(parts, owned))
        routers = [_routers(owned[group.members]) for group in groups]
        routes = [
            None if own is None else routes_of(x[group.tokens], own, group.form.choices)
            for group, own in zip(groups, routers, strict=True)
        ]
        stacks = [
            _stacked(group, owned, x.dtype, None if own is None else own[1:], casts=casts)
            for group, own in zip(groups, routes, strict=True)
        ]
        pairs = list(zip(groups, stacks, strict=True))
        gates, ups = [], []
        for group, own in pairs:
            less = drop(x[group.tokens], group.dropouts[:2])
            gates.append(_first(group, own, own.gate, less[0]))
            ups.append(_first(group, own, own.up, less[1]))
        gate, up = (
            frozen_product(layer, x, [addend for first in firsts for addend in first.addends])
            for layer, firsts in zip(layers, (gates, ups), strict=False)
        )
        hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        every, addends = [], []
        for i, ((group, own), first, second) in enumerate(zip(pairs, gates, ups, strict=True)):
            kept = gated(_middle(group, own, gate, up, first.more, second.more), hidden[group.tokens])
            codes = None
            if own.down is not None and kept is not None:
                of_choices = product(kept.view(-1, kept.shape[-1]), own.down.narrow.mT, group.form.scaling)
                codes = of_choices if own.choices is None else own.choices.sum(of_choices)
                addends.append(Addend(group.tokens, codes, own.down.wide))
            of_first = first.codes, second.codes, first.more, second.more
            chosen = (None, None) if own.choices is None else own.choices[:2]
            every.append(_Kept._make((*of_first, codes, *own.matrices, routers[i], *chosen)))
        ctx.layers, ctx.groups = layers, groups
        ctx.save_for_backward(x, gate, up, *(tensor for kept in every for tensor in kept), *tensors)
        out = frozen_product(layers[2], hidden, addends)
        each = zip(groups, routes, strict=True)
        return out, *(part for group, own in each if own is not None for part in own.logits.chunk(_count(group)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *logits_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gate, up, *rest = ctx.saved_tensors
        if grad is None:  # only routers have a loss
            grad = x.new_zeros(len(x), len(frozen_weight(ctx.layers[2])))
        size = len(_Kept._fields)
        every = [_Kept(*rest[size * i : size * (i + 1)]) for i in range(len(ctx.groups))]
        owned = _owned(rest[size * len(ctx.groups) :])
        grad = grad.contiguous()
        first, second, third = (frozen_weight(layer).to(grad.dtype) for layer in ctx.layers)
        hidden_grad = grad @ third
        gate_grad, up_grad = torch.empty_like(hidden_grad), torch.empty_like(hidden_grad)
        of_experts, of_weights, codes = [], [], []
        for group, kept in zip(ctx.groups, every, strict=True):
            own, t = _stacked(group, owned, grad.dtype, kept.chosen, kept.matrices), group.tokens
            middle = _middle(group, own, gate, up, kept.gate_more, kept.up_more)
            down_grad, of_down_b = _of_down(group, own, kept.down_codes, grad[t])
            by_updates = weighted = None
            if own.down is not None and down_grad is not None:
                alone, weighted = (down_grad, down_grad) if own.choices is None else own.choices.alone(down_grad)
                by_updates = product(alone, own.down.narrow).view(middle.shape)
            found = gated_grad(middle, hidden_grad[t], by_updates, gate_grad[t], up_grad[t])
            of_down_a = _none(group)
            if own.down is not None and weighted is not None and found.kept is not None:
                of_down_a = gradients_of_a(weighted, found.kept.view(-1, found.kept.shape[-1]), own.down.a)
            of_gate = _of_first(group, own, own.gate, x[t], kept.gate_codes, gate_grad[t], found.gate_more, 0)
            of_up = _of_first(group, own, own.up, x[t], kept.up_codes, up_grad[t], found.up_more, 1)
            of_experts.append((of_gate.a, of_gate.b, of_up.a, of_up.b, of_down_a, of_down_b))
            of_weights.append(found.weights)
            codes.append([(own.gate, of_gate.codes), (own.up, of_up.codes)])
        dx = (gate_grad @ first).addmm_(up_grad, second) if ctx.needs_input_grad[0] else None
        gradients, of_logits = list[Tensor | None](), iter(logits_grads)
        for i, (group, kept) in enumerate(zip(ctx.groups, every, strict=True)):
            here = None if dx is None else dx[group.tokens]
            of_routers: Sequence[Tensor | None] = _none(group)
            if kept.routers is not None and kept.chosen is not None:
                own = x[group.tokens]
                said = _joined(list(islice(of_logits, _count(group))), kept.routers, len(own))
                of_routers = router_gradients(
                    own, kept.routers, here, ADDED, said, of_weights[i], *kept.chosen
                ).unbind(0)  # fmt: skip
            each = *of_experts[i], of_routers
            gradients += [tensor for part in zip(*each, strict=True) for tensor in part]
            if here is None:
                continue
            updates = [
                (code, pair.narrow, dropout)
                for (pair, code), dropout in zip(codes[i], group.dropouts, strict=False)
                if pair is not None and code is not None
            ]
            add_updates(here, updates)
        return dx, None, None, None, *gradients


def _first(group: _Group, own: _Stacks, pair: _Pair | None, x: Tensor) -> _First:
    """Return the update of a first layer, from what it reads of the group's tokens."""
    if pair is None:
        return _First(None, [], None)
    codes = product(x, pair.narrow.mT, group.form.scaling)
    first, other = (codes, None) if own.choices is None else own.choices.apart(codes)
    more = None
    if other is not None:
        more = product(other, pair.wide)
    return _First(codes, [Addend(group.tokens, first, pair.wide)], more)


class _OfFirst(NamedTuple):
    """Gradients of a group's update of a first layer: of its codes [N, E r], of each A and of each B."""

    codes: Tensor | None
    a: Sequence[Tensor | None]
    b: Sequence[Tensor | None]


def _of_first(
    group: _Group, own: _Stacks, pair: _Pair | None, x: Tensor, codes: Tensor | None, grad: Tensor,
    more_grad: Tensor | None, layer: int,
) -> _OfFirst:  # fmt: skip
    """Return the gradients of an update, from those of g_1 and g_2 - g_1 [N, I]."""
    if pair is None or codes is None:
        return _OfFirst(None, _none(group), _none(group))
    scaling, matrices = group.form.scaling, pair.wide.mT
    first, more = (codes, None) if own.choices is None else own.choices.apart(codes)
    pairs = [(grad, first)]
    if more is not None and more_grad is not None:
        pairs.append((more_grad, more))
    of_b = gradients_of_b(pairs, pair.b)
    of_codes = product(grad, matrices, scaling)
    if own.choices is not None:
        of_codes = own.choices.join(of_codes, None if more_grad is None else product(more_grad, matrices, scaling))
    return _OfFirst(of_codes, gradients_of_a(of_codes, x, pair.a, group.dropouts[layer]), of_b)


def _of_down(
    group: _Group, own: _Stacks, codes: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """Return the gradients of codes d(h_j) A2, all experts' [N, E r], and of each B2."""
    if own.down is None or codes is None:
        return None, _none(group)
    down_grad = product(grad, own.down.wide.mT, group.form.scaling)
    return down_grad, gradients_of_b([(grad, codes)], own.down.b)


def _middle(
    group: _Group, own: _Stacks, gate: Tensor, up: Tensor, gate_more: Tensor | None, up_more: Tensor | None
) -> Middle:
    t = group.tokens
    return Middle(
        gate[t], up[t], gate_more, up_more, own.choices, _count(group), group.form.activation,
        group.dropouts[2], own.down is not None,
    )  # fmt: skip


def _none(group: _Group) -> Sequence[Tensor | None]:
    return [None] * _count(group)


def _owned(tensors: Sequence[Any]) -> list[Own]:
    size = len(Own._fields)
    return [Own(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


def _groups(parts: Sequence[Part], owned: Sequence[Own]) -> Iterator[_Group]:
    def form(number: int) -> tuple[Any, ...]:
        part = parts[number]
        plain = part.num_experts, part.rank, part.scaling, part.choices, part.activation
        return (
            *plain,
            *map(dropout_form, part.dropouts),
            *map(form_of, owned[number]),
        )

    for members in grouped(parts, form):
        own = parts[members]
        dropouts = tuple(joined_dropout(each) for each in zip(*(part.dropouts for part in own), strict=True))
        yield _Group(members, slice(own[0].start, own[-1].stop), own[0], dropouts)


def _stacked(
    group: _Group, owned: Sequence[Own], dtype: torch.dtype, chosen: tuple[Tensor, Tensor] | None,
    matrices: Sequence[Any] | None = None, casts: Casts | None = None,
) -> _Stacks:  # fmt: skip
    """Return the tensors of a group; the matrices are made where they were not kept."""
    columns: list[Any] = [
        None if tensors[0] is None else list(tensors) for tensors in zip(*owned[group.members], strict=True)
    ]
    if matrices is None:
        make = (narrow, wide) * 3
        matrices = [None if own is None else to(own, dtype, casts) for own, to in zip(columns[:6], make, strict=True)]
    each = zip(columns[:6:2], columns[1:6:2], matrices[::2], matrices[1::2], strict=True)
    gate, up, down = (None if a is None else _Pair(a, b, less, more) for a, b, less, more in each)
    choices = None if chosen is None else Choices(*chosen, group.form.rank, _count(group))
    return _Stacks(gate, up, down, choices)


def _routers(owned: Sequence[Own]) -> Tensor | None:
    """Return the routers of a group [G, E, D] float32; None where it has none."""
    known = [own.router for own in owned if own.router is not None]
    return torch.stack(known).float() if known else None


def _joined(grads: Sequence[Tensor | None], routers: Tensor, tokens: int) -> Tensor | None:
    """Return the gradients of a group's logits [N, E], 0 where one lacks; None where all do."""
    if all(grad is None for grad in grads):
        return None
    shape = tokens // len(grads), routers.shape[1]
    return joined([routers.new_zeros(shape) if grad is None else grad for grad in grads]).contiguous()


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
    part = Part(start, stop, update.num_experts, rank, update.scaling, update.choices, (gate, up, down), activation)
    matrices = (pair or (None, None) for pair in pairs)
    (a1, b1), (a3, b3), (a2, b2) = matrices
    return part, Own(a1, b1, a3, b3, a2, b2, update.router)


def feed_forward(
    x: Tensor, layers: Sequence[nn.Module], parts: Sequence[Part], owned: Sequence[Own], casts: Casts | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the block's output [n, D], and of each part its router's logits [n, E] float32; None without a router.

    Args:
        x: [n, D].
        layers: the frozen gate, up and down projections; the last without bias.
        parts: of every adapter, in order, without gaps.
        owned: the tensors of each part: A and B plain or [E, ...], a router [E, D].
        casts: of the step; None for casting here.
    """
    tensors = (tensor for own in owned for tensor in own)
    out, *found = _FeedForward.apply(unit_stride(x), casts, layers, parts, *tensors)
    return out, [None if own.router is None else found.pop(0) for own in owned]

"""A gated feed-forward block and the updates of all adapters in it, as one differentiable operation.

The frozen products W1 x, W3 x and W2 h run once over the tokens of all adapters, and their gradients are summed in
place. What lies between them runs in one pass each way (`gated.py`), for adapters of one form at once (`groups.py`).
Narrow products run over the columns of all experts, zero for those not chosen: with E r near 128 they cost what one
expert's would, which no kernel that sorted tokens by expert could beat (benchmarks/RESULTS.md).

Shapes: n tokens, D hidden, I intermediate, E experts, k experts of a token, r rank; N = G n tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


class _FeedForward(torch.autograd.Function):
    """The block of every part; `tensors` holds the fields of `Own` for each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, casts: Casts | None, layers: Sequence[nn.Module], parts: Sequence[Part], *tensors: Any
    ) -> Tensor:
        owned = _owned(tensors)
        groups = list(_groups(parts, owned))
        stacks = [_stacked(group, owned, x.dtype, casts=casts) for group in groups]
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
        for (group, own), first, second in zip(pairs, gates, ups, strict=True):
            kept = gated(_middle(group, own, gate, up, first.more, second.more), hidden[group.tokens])
            codes = None
            if own.down is not None and kept is not None:
                of_choices = product(kept.view(-1, kept.shape[-1]), own.down.narrow.mT, group.form.scaling)
                codes = of_choices if own.choices is None else own.choices.sum(of_choices)
                addends.append(Addend(group.tokens, codes, own.down.wide))
            every.append(_Kept(first.codes, second.codes, first.more, second.more, codes, *own.matrices))
        ctx.layers, ctx.groups = layers, groups
        ctx.save_for_backward(x, gate, up, *(tensor for kept in every for tensor in kept), *tensors)
        return frozen_product(layers[2], hidden, addends)

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
            own, t = _stacked(group, owned, grad.dtype, kept[5:]), group.tokens
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
            of_weights = _none(group) if found.weights is None else found.weights.chunk(_count(group))
            each = of_gate.a, of_gate.b, of_up.a, of_up.b, of_down_a, of_down_b, of_weights, _none(group)
            gradients += [tensor for part in zip(*each, strict=True) for tensor in part]
            codes.append([(own.gate, of_gate.codes), (own.up, of_up.codes)])
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, *gradients
        dx = (gate_grad @ first).addmm_(up_grad, second)
        for group, of_codes in zip(ctx.groups, codes, strict=True):
            updates = [
                (code, pair.narrow, dropout)
                for (pair, code), dropout in zip(of_codes, group.dropouts, strict=False)
                if pair is not None and code is not None
            ]
            add_updates(dx[group.tokens], updates)
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


def _stacked(
    group: _Group, owned: Sequence[Own], dtype: torch.dtype, matrices: Sequence[Any] | None = None,
    casts: Casts | None = None,
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
    weights, experts = columns[6:]
    choices = None
    if weights is not None:
        weights, experts = joined(weights).contiguous(), joined(experts).contiguous()
        choices = Choices(weights, experts, group.form.rank, _count(group))
    return _Stacks(gate, up, down, choices)


def _count(group: _Group) -> int:
    return group.members.stop - group.members.start


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """Return the name in ACTIVATIONS of a base model's function; None where the kernels do not know it."""
    known = {"SiLU": "silu", "SiLUActivation": "silu", "GELUActivation": "gelu", "GELUTanh": "gelu_tanh"}
    return known.get(type(activation).__name__)


def block_part(
    update: BlockUpdate, start: int, stop: int, activation: str, keys: Tensor | None, streams: Sequence[str],
    routes: tuple[Tensor, Tensor] | None = None,
) -> tuple[Part, Own]:  # fmt: skip
    """Return an adapter's update as `feed_forward` takes it.

    Args:
        update: of the block.
        start, stop: its tokens.
        activation: one of ACTIVATIONS.
        keys: [n] of the tokens' dropout; None for none.
        streams: names of the dropout streams of the gate, up and down projections.
        routes: weights and experts [n, k] of each token, none twice; None where there is one expert.
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
    return part, Own(a1, b1, a3, b3, a2, b2, *(routes or (None, None)))


def feed_forward(
    x: Tensor, layers: Sequence[nn.Module], parts: Sequence[Part], owned: Sequence[Own], casts: Casts | None = None
) -> Tensor:
    """Return the block's output [n, D].

    Args:
        x: [n, D].
        layers: the frozen gate, up and down projections; the last without bias.
        parts: of every adapter, in order, without gaps.
        owned: the tensors of each part: A and B plain or [E, ...], weights [n, k] float32, experts [n, k].
        casts: of the step; None for casting here.
    """
    return _FeedForward.apply(unit_stride(x), casts, layers, parts, *(tensor for own in owned for tensor in own))

"""A gated feed-forward block and the updates of all adapters in it, as one differentiable operation.

The frozen products W1 x, W3 x and W2 h run once over the tokens of all adapters, and their gradients are summed in
place. What lies between them runs in one pass each way (`gated.py`), for adapters of one form at once (`groups.py`).
Narrow products run over the columns of all experts, zero for those not chosen: with E r near 128 they cost what one
expert's would, which no kernel that sorted tokens by expert could beat (benchmarks/RESULTS.md).

Shapes: n tokens, D hidden, I intermediate, E experts, k experts of a token, r rank; N = G n tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mlora.ops.copies import Lasting, leaves, place
from mlora.ops.dora import frozen_weight
from mlora.ops.fused.choices import Choices
from mlora.ops.fused.dropped import add_expanded, gradients_of_a, reduced
from mlora.ops.fused.gated import Middle, gated, gated_grad
from mlora.ops.fused.groups import dropout_form, form_of, grouped, joined, joined_dropout
from mlora.ops.fused.masks import Dropout, dropout_of
from mlora.ops.fused.products import (
    Addend,
    apart,
    frozen_product,
    narrow,
    of_each_a,
    of_each_b,
    product,
    summed_products,
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


class _Layers(NamedTuple):
    """The updates of a group at layers that read the same: at gate and up or one of them, or at down.

    Attributes:
        a, b: of every part, layer by layer.
        narrow, wide: the same as [L, G, E r, F], of the dtype that products run in.
        of_a, of_b: where their gradients are written; None for anywhere.
    """

    a: list[Tensor]
    b: list[Tensor]
    narrow: Tensor
    wide: Tensor
    of_a: Tensor | None
    of_b: Tensor | None

    def parts(self, of: list[Tensor]) -> list[list[Tensor]]:
        """Return what belongs to each layer."""
        each = len(of) // len(self.narrow)
        return [of[i : i + each] for i in range(0, len(of), each)]


class _Stacks(NamedTuple):
    """The tensors of a group; None for what it has not.

    Attributes:
        where: which of gate and up have updates.
        first: at those.
        down: at the last.
        choices: whom its tokens chose.
    """

    where: slice
    first: _Layers | None
    down: _Layers | None
    choices: Choices | None

    @property
    def matrices(self) -> list[Tensor | None]:
        """Narrow and wide of both: four."""
        return [m for own in (self.first, self.down) for m in ((None, None) if own is None else own[2:4])]


class _Kept(NamedTuple):
    """What the forward of a group leaves for its backward.

    Attributes:
        codes: s A d(x) of the first layers [L, N, E r].
        gate_more, up_more: what the second choice has more [N, I].
        down_codes: s sum_j w_j A2 d(h_j) [N, E r].
        first_narrow, ..., down_wide: the matrices of its stacks.
        routers: [G, E, D] float32.
        weights, experts: [N, k] of its tokens' choices.
    """

    codes: Tensor | None
    gate_more: Tensor | None
    up_more: Tensor | None
    down_codes: Tensor | None
    first_narrow: Tensor | None
    first_wide: Tensor | None
    down_narrow: Tensor | None
    down_wide: Tensor | None
    routers: Tensor | None
    weights: Tensor | None
    experts: Tensor | None

    @property
    def matrices(self) -> Sequence[Tensor | None]:
        """Narrow and wide of the first layers and the last."""
        return self[4:8]

    @property
    def chosen(self) -> tuple[Tensor, Tensor] | None:
        """Weights and experts."""
        return None if self.weights is None or self.experts is None else (self.weights, self.experts)


class _FeedForward(torch.autograd.Function):
    """The block of every part, and logits of those that have a router; `tensors` holds the fields of `Own` for each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lasting: Lasting | None, layers: Sequence[nn.Module], parts: Sequence[Part], *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.lasting, ctx.leaves = lasting, leaves(tensors)  # recomputed layers are given copies of parameters
        owned = _owned(tensors)
        groups = list(_groups(parts, owned))
        routers = [_routers(owned[group.members]) for group in groups]
        routes = [
            None if own is None else routes_of(x[group.tokens], own, group.form.choices)
            for group, own in zip(groups, routers, strict=True)
        ]
        stacks = [
            _stacked(group, owned, x.dtype, None if own is None else own[1:], lasting)
            for group, own in zip(groups, routes, strict=True)
        ]
        of_first: tuple[list[Addend], list[Addend]] = ([], [])
        codes: list[Tensor | None] = []
        mores: list[list[Tensor | None]] = [[None, None] for _ in groups]
        for group, own, more in zip(groups, stacks, mores, strict=True):
            if own.first is None:
                codes.append(None)
                continue
            found = reduced(x[group.tokens], own.first.narrow, group.dropouts[own.where], group.form.scaling)
            codes.append(found)
            each = zip(range(2)[own.where], _apart(found, own.choices), own.first.wide, strict=True)
            for layer, (alone, *second), matrices in each:
                of_first[layer].append(Addend(group.tokens, apart(alone, _count(group)), matrices))
                if second:
                    more[layer] = product(apart(second[0], _count(group)), matrices).flatten(0, 1)
        gate, up = (frozen_product(layer, x, own) for layer, own in zip(layers, of_first, strict=False))
        hidden = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        every, addends = [], []
        for i, (group, own) in enumerate(zip(groups, stacks, strict=True)):
            kept = gated(_middle(group, own, gate, up, *mores[i]), hidden[group.tokens])
            down_codes = None
            if own.down is not None and kept is not None:
                of_choices = product(kept.flatten(1, 2), own.down.narrow[0].mT, group.form.scaling).flatten(0, 1)
                down_codes = of_choices if own.choices is None else own.choices.sum(of_choices)
                addends.append(Addend(group.tokens, apart(down_codes, _count(group)), own.down.wide[0]))
            chosen = (None, None) if own.choices is None else own.choices[:2]
            every.append(_Kept._make((codes[i], *mores[i], down_codes, *own.matrices, routers[i], *chosen)))
        ctx.layers, ctx.groups = layers, groups
        ctx.save_for_backward(x, gate, up, *(tensor for kept in every for tensor in kept), *tensors)
        out = frozen_product(layers[2], hidden, addends)
        logits = (own.logits.chunk(_count(group)) for group, own in zip(groups, routes, strict=True) if own is not None)
        return out, *chain(*logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *logits_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, gate, up, *rest = ctx.saved_tensors
        if grad is None:  # only routers have a loss
            grad = x.new_zeros(len(x), len(frozen_weight(ctx.layers[2])))
        size = len(_Kept._fields)
        every = [_Kept(*rest[size * i : size * (i + 1)]) for i in range(len(ctx.groups))]
        owned, parameters = _owned(rest[size * len(ctx.groups) :]), _owned(ctx.leaves)
        grad = grad.contiguous()
        first, second, third = (frozen_weight(layer).to(grad.dtype) for layer in ctx.layers)
        hidden_grad = grad @ third
        kinds = 1 + any(kept.gate_more is not None or kept.up_more is not None for kept in every)
        grads = hidden_grad.new_empty((2, kinds, *hidden_grad.shape))
        of_experts, of_weights, codes = [], [], []
        for group, kept in zip(ctx.groups, every, strict=True):
            t, of = group.tokens, (kept.matrices, parameters)
            own = _stacked(group, owned, grad.dtype, kept.chosen, ctx.lasting, of)
            middle = _middle(group, own, gate, up, kept.gate_more, kept.up_more)
            down_grad, of_down_b = _of_down(group, own, kept.down_codes, grad[t])
            by_updates = weighted = None
            if own.down is not None and down_grad is not None:
                alone, weighted = (down_grad, down_grad) if own.choices is None else own.choices.alone(down_grad)
                by_updates = product(apart(alone, _count(group)), own.down.narrow[0]).view(middle.shape)
            found = gated_grad(middle, hidden_grad[t], by_updates, grads[:, :, t])
            of_down_a = _none(group)
            if own.down is not None and weighted is not None and found.kept is not None:
                read = found.kept.flatten(1, 2)
                out = None if own.down.of_a is None else own.down.of_a.flatten(1, -2)
                summed = summed_products(apart(weighted, _count(group)), read, out=out)
                of_down_a = of_each_a(summed, own.down.a)
            of_first, of_codes = _of_first(group, own, x[t], kept.codes, grads[:, :, t])
            of_experts.append((*of_first, of_down_a, of_down_b))
            of_weights.append(found.weights)
            codes.append((own, of_codes))
        dx = (grads[0, 0] @ first).addmm_(grads[1, 0], second) if ctx.needs_input_grad[0] else None
        gradients, of_logits = list[Tensor | None](), iter(logits_grads)
        for i, (group, kept) in enumerate(zip(ctx.groups, every, strict=True)):
            here = None if dx is None else dx[group.tokens]
            of_routers: Sequence[Tensor | None] = _none(group)
            if kept.routers is not None and kept.chosen is not None:
                read = x[group.tokens]
                said = _joined(list(islice(of_logits, _count(group))), kept.routers, len(read))
                of_routers = router_gradients(
                    read, kept.routers, here, ADDED, said, of_weights[i], *kept.chosen
                ).unbind(0)  # fmt: skip
            each = *of_experts[i], of_routers
            gradients += [tensor for part in zip(*each, strict=True) for tensor in part]
            own, of_codes = codes[i]
            if here is not None and own.first is not None and of_codes is not None:
                add_expanded(here, of_codes, own.first.narrow, group.dropouts[own.where])
        return dx, None, None, None, *gradients


def _apart(codes: Tensor, choices: Choices | None) -> Tensor:
    """Return codes of layers [L, N, E r] as what the first choice has of them and the second more [L, k, N, E r]."""
    return codes[:, None] if choices is None else choices.apart(codes)


def _of_first(
    group: _Group, own: _Stacks, x: Tensor, codes: Tensor | None, grads: Tensor
) -> tuple[list[Sequence[Tensor | None]], Tensor | None]:
    """Return the gradients of A and B at the gate and at the up projection, four, and those of codes [L, N, E r].

    Args:
        group: of adapters.
        own: its tensors.
        x: what the layers read of its tokens [N, D].
        codes: [L, N, E r].
        grads: of g_1 and g_2 - g_1, and of u_1 and u_2 - u_1, [2, k, N, I].
    """
    found: list[Sequence[Tensor | None]] = [_none(group)] * 4
    if own.first is None or codes is None:
        return found, None
    parts = _apart(codes, own.choices)
    given = grads[own.where, : parts.shape[1]]
    of_parts, of_wide = _of_layers(given, parts, own.first.wide, group.form.scaling, own.first.of_b)
    of_codes = of_parts[:, 0] if own.choices is None else own.choices.join(of_parts)
    of_narrow = gradients_of_a(of_codes, x, group.dropouts[own.where], _count(group), own.first.of_a)
    each = zip(own.first.parts(own.first.a), own.first.parts(own.first.b), of_narrow, of_wide, strict=True)
    found[2 * own.where.start : 2 * own.where.stop] = [
        gradients for a, b, of_a, of_b in each for gradients in (of_each_a(of_a, a), of_each_b(of_b, b))
    ]
    return found, of_codes


def _of_layers(
    grads: Tensor, parts: Tensor, wide: Tensor, scale: float, out: Tensor | None
) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the gradients of parts of codes [L, k, N, E r], and of each layer's B [G, I, E r] float32.

    Args:
        grads: of what was added [L, k, N, I].
        parts: [L, k, N, E r].
        wide: B [L, G, E r, I].
        scale: of what reaches the codes.
        out: [L G, I, E r], where the latter are written; None for anywhere, as it must be of two choices.
    """
    (layers, kinds, tokens, _), groups = grads.shape, wide.shape[1]
    of_parts = parts.new_empty(parts.shape)
    if grads.is_contiguous() and 1 in (groups, kinds):  # one launch for all
        given, own = (each.reshape(layers * groups, kinds * tokens // groups, each.shape[3]) for each in (grads, parts))
        product(given, wide.flatten(0, 1).mT, scale, of_parts.view(own.shape))
        every = summed_products(given, own, out=out)
        return of_parts, every.unflatten(0, (layers, groups)).unbind()
    of_wide = []
    for layer in range(layers):
        summed = None
        for kind in range(kinds):
            given = apart(grads[layer, kind], groups)
            product(given, wide[layer].mT, scale, apart(of_parts[layer, kind], groups))
            here = None if out is None else out[layer * groups : (layer + 1) * groups]
            summed = summed_products(given, apart(parts[layer, kind], groups), summed, here)
        of_wide.append(cast("Tensor", summed))
    return of_parts, of_wide


def _of_down(
    group: _Group, own: _Stacks, codes: Tensor | None, grad: Tensor
) -> tuple[Tensor | None, Sequence[Tensor | None]]:
    """Return the gradients of codes d(h_j) A2, all experts' [N, E r], and of each B2."""
    if own.down is None or codes is None:
        return None, _none(group)
    given = apart(grad, _count(group))
    down_grad = product(given, own.down.wide[0].mT, group.form.scaling).flatten(0, 1)
    return down_grad, of_each_b(summed_products(given, apart(codes, _count(group)), out=own.down.of_b), own.down.b)


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
    lasting: Lasting | None, backward: tuple[Sequence[Tensor | None], Sequence[Any]] | None = None,
) -> _Stacks:  # fmt: skip
    """Return the tensors of a group.

    Args:
        group: of adapters.
        owned: what all parts own.
        dtype: that products run in.
        chosen: weights and experts of its tokens.
        lasting: casts and places of gradients.
        backward: the matrices that were made, and which of `owned` are parameters; None in a forward.
    """
    columns: list[tuple[Any, ...]] = list(zip(*owned[group.members], strict=True))

    def layers(kinds: Sequence[int], made: Sequence[Any] | None) -> _Layers | None:
        """Return those of A's and the B's that follow them."""
        present = [i for i in kinds if columns[i][0] is not None]
        if not present:
            return None
        a, b = ([t for i in present for t in columns[i + own]] for own in (0, 1))
        if made is None or backward is None:
            casts = None if lasting is None else lasting.casts
            less, more = narrow(a, dtype, casts), wide(b, dtype, casts)
            form = len(present), _count(group)
            return _Layers(a, b, less.unflatten(0, form), more.unflatten(0, form), None, None)
        parameters = list(zip(*backward[1][group.members], strict=True))
        of_a, of_b = ([p for i in present for p in parameters[i + own]] for own in (0, 1))
        less, more = made
        return _Layers(a, b, less, more, place(lasting, of_a), place(lasting, of_b) if b[0].ndim == 2 else None)

    where = slice(int(columns[0][0] is None), 1 + int(columns[2][0] is not None))
    made = None if backward is None else backward[0]
    choices = None if chosen is None else Choices(*chosen, group.form.rank, _count(group))
    return _Stacks(where, layers((0, 2), made and made[:2]), layers((4,), made and made[2:]), choices)


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
    x: Tensor, layers: Sequence[nn.Module], parts: Sequence[Part], owned: Sequence[Own], lasting: Lasting | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the block's output [n, D], and of each part its router's logits [n, E] float32; None without a router.

    Args:
        x: [n, D].
        layers: the frozen gate, up and down projections; the last without bias.
        parts: of every adapter, in order, without gaps.
        owned: the tensors of each part: A and B plain or [E, ...], a router [E, D].
        lasting: casts and places of gradients; None for its own.
    """
    tensors = (tensor for own in owned for tensor in own)
    out, *found = _FeedForward.apply(unit_stride(x), lasting, layers, parts, *tensors)
    return out, [None if own.router is None else found.pop(0) for own in owned]

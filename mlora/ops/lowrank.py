"""Low-rank updates s B A x.

Shapes: n tokens, D inputs, O outputs, r rank, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRankUpdate(NamedTuple):
    """What an adapter adds to a frozen linear layer's output, s sum_e w_e B_e A_e d(x), as data.

    With a factor it also multiplies the sum of both, but for the layer's bias.

    Attributes:
        a: [r, D], or [E, r, D].
        b: [O, r], or [E, O, r].
        scaling: s.
        dropout: probability of dropping an entry of x.
        weights: [n, E] of the experts; None for a single update.
        factor: [O] float32 (DoRA); None for 1.
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float
    weights: Tensor | None = None
    factor: Tensor | None = None


class BlockUpdate(NamedTuple):
    """What an adapter changes in a gated feed-forward block, as data; see `ops.fused.feedforward` for the mathematics.

    Attributes:
        gate, up, down: (A, B) of these layers' updates, stacked over experts; None for a layer without.
        num_experts: E.
        scaling: s.
        dropout: probability of dropping an entry of an update's input; each expert drops its own hidden units.
        router: [E, D], which sends each token to its most probable experts; None where there is one for all tokens.
        choices: how many experts compute a token, one or two.
    """

    gate: tuple[Tensor, Tensor] | None
    up: tuple[Tensor, Tensor] | None
    down: tuple[Tensor, Tensor] | None
    num_experts: int
    scaling: float
    dropout: float
    router: Tensor | None = None
    choices: int = 1


def apply_update(update: LowRankUpdate, x: Tensor, out: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return out [n, O] with an update of it, from its input x [n, D], dropped out already.

    Args:
        update: from an adapter.
        x: [n, D].
        out: frozen output, bias included.
        bias: of the frozen layer; None for none.
    """
    codes = reduce(x, update.a)
    if update.weights is not None:
        codes = codes * update.weights[..., None].to(codes.dtype)
    added = expand(codes, update.b, update.scaling).to(out.dtype)
    return out + added if update.factor is None else rescale(out, added, update.factor, bias)


def embedding_update(
    a: Tensor, b: Tensor, ids: Tensor, out: Tensor, scaling: float | Tensor, padding_idx: int | None = None
) -> Tensor:
    """Return embeddings out [n, D] with an update of them, s A^T[ids] B^T; by data, so that nothing waits.

    Args:
        a: [r, V].
        b: [D, r].
        ids: [n] tokens.
        out: frozen embeddings of them.
        scaling: s.
        padding_idx: the token whose column of A gets no gradient; None for none.
    """
    codes = F.embedding(ids, a.mT, padding_idx) * scaling
    return out + expand(codes.to(out.dtype), b, 1.0)


class Stack(NamedTuple):
    """Updates of S adapters for as many tokens of each, made once for many inputs.

    Attributes:
        a: [S, D, r], of the largest rank; zero columns fill up a smaller one.
        b: [S, r, O], times the scaling.
        factor: [S, 1, O]; None where none has one.
    """

    a: Tensor
    b: Tensor
    factor: Tensor | None


def stacked(updates: Sequence[LowRankUpdate | None], inputs: int, outputs: int, like: Tensor) -> Stack:
    """Return updates as one, None for an adapter without.

    Args:
        updates: with neither weights nor dropout.
        inputs, outputs: D and O.
        like: has the dtype and the device to compute with.
    """
    rank = max((update.a.shape[0] for update in updates if update is not None), default=1)
    a, b = like.new_zeros(len(updates), inputs, rank), like.new_zeros(len(updates), rank, outputs)
    factors = like.new_ones(len(updates), 1, outputs)
    for i, update in enumerate(updates):
        if update is not None:
            a[i, :, : update.a.shape[0]] = update.a.mT
            b[i, : update.a.shape[0]] = update.b.mT * update.scaling
            if update.factor is not None:
                factors[i] = update.factor
    scaled = any(update is not None and update.factor is not None for update in updates)
    return Stack(a, b, factors if scaled else None)


def apply_stack(stack: Stack, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    """Return out [S m, O] with updates of it, from its input x [S m, D], m tokens of each adapter."""
    apart = (len(stack.a), -1)
    codes, out = x.unflatten(0, apart) @ stack.a, out.unflatten(0, apart)
    if stack.factor is None:
        return torch.baddbmm(out, codes, stack.b).flatten(0, 1)
    return rescale(out, codes @ stack.b, stack.factor, bias).flatten(0, 1)


def rescale(out: Tensor, update: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """Return factor * (out - bias + update) + bias: the bias stays outside DoRA's scaling.

    Args:
        out: frozen output, bias included.
        update: s B A x, of the same shape.
        factor: m / n, of a shape that broadcasts.
        bias: of the frozen layer; None for none.
    """
    factor = factor.to(out.dtype)
    if bias is None:
        return (out + update) * factor
    bias = bias.to(out.dtype)
    return (out - bias + update) * factor + bias


def reduce(x: Tensor, a: Tensor) -> Tensor:
    """Return A x: codes [n, r], or [n, E, r] for stacked a [E, r, D], in the dtype of x."""
    codes = F.linear(x, a.flatten(0, -2).to(x.dtype))
    return codes.unflatten(-1, a.shape[:-1])


def expand(codes: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return s B c: [n, O] from codes [n, r] with b [O, r], or summed over experts from [n, E, r] with b [E, O, r]."""
    if b.ndim == 3:
        codes, b = codes.flatten(1), b.transpose(0, 1).flatten(1)
    return F.linear(codes * scaling, b.to(codes.dtype))


def select_expert(codes: Tensor, experts: Tensor) -> Tensor:
    """Zero the codes [n, E, r] of all experts but one per token, experts [n].

    A dense product over E * r columns wastes arithmetic but needs neither a sort nor a count that waits for the
    device; with E * r near 128 it fills exactly one tile of a matrix unit.
    """
    chosen = experts[:, None] == torch.arange(codes.shape[1], device=codes.device)
    return torch.where(chosen[..., None], codes, 0)


def of_expert(values: Tensor, experts: Tensor) -> Tensor:
    """Return values[experts], [n, O] from values [E, O] and experts [n].

    As a product: the gradient of an index adds up the rows of thousands of tokens one by one.
    """
    chosen = experts[:, None] == torch.arange(len(values), device=values.device)
    return chosen.to(values.dtype) @ values

"""Low-rank updates s B A x.

Shapes: n tokens, D inputs, O outputs, r rank, E experts, k experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRankUpdate(NamedTuple):
    """What an adapter adds to a frozen linear layer's output, s sum_e w_e B_e A_e d(x), as data.

    Attributes:
        a: [r, D], or [E, r, D].
        b: [O, r], or [E, O, r].
        scaling: s.
        dropout: probability of dropping an entry of x.
        weights: [n, E] of the experts; None for a single update.
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float
    weights: Tensor | None = None


class BlockUpdate(NamedTuple):
    """What an adapter changes in a gated feed-forward block, as data; see `ops.fused.feedforward` for the mathematics.

    Attributes:
        gate, up, down: (A, B) of these layers' updates, stacked over experts; None for a layer without.
        num_experts: E.
        scaling: s.
        dropout: probability of dropping an entry of an update's input; each expert drops its own hidden units.
        weights, experts: [n, k] of each token's chosen experts, none twice; None where there is one for all tokens.
    """

    gate: tuple[Tensor, Tensor] | None
    up: tuple[Tensor, Tensor] | None
    down: tuple[Tensor, Tensor] | None
    num_experts: int
    scaling: float
    dropout: float
    weights: Tensor | None = None
    experts: Tensor | None = None


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which adapter products run: the activations' own on an accelerator, float32 on the CPU."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def apply_update(update: LowRankUpdate, x: Tensor, out: Tensor) -> Tensor:
    """Return out [n, O] with an update of it, from its input x [n, D], dropped out already."""
    codes = reduce(x, update.a)
    if update.weights is not None:
        codes = codes * update.weights[..., None].to(codes.dtype)
    return out + expand(codes, update.b, update.scaling).to(out.dtype)


def low_rank(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return s B A x.

    Args:
        x: [n, D].
        a: [r, D] float32.
        b: [O, r] float32.
        scaling: s.

    Returns:
        [n, O] in the dtype of x.
    """
    return expand(reduce(x, a), b, scaling).to(x.dtype)


def reduce(x: Tensor, a: Tensor) -> Tensor:
    """Return A x: codes [n, r], or [n, E, r] for stacked a [E, r, D]."""
    dtype = compute_dtype(x)
    codes = F.linear(x.to(dtype), a.flatten(0, -2).to(dtype))
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

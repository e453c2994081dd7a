"""Definitions, one token group at a time, that the fast paths are tested against. Never used in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def mixture_feed_forward(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    ups: Sequence[Callable[[Tensor], Tensor]],
    down: Callable[[Tensor], Tensor],
    activate: Callable[[Sequence[Tensor]], Tensor],
    updates: Mapping[str, tuple[Tensor, Tensor, float]],
) -> Tensor:
    """Run every expert's whole feed-forward block on the tokens that chose it, and add what it returns.

    Args:
        x: [n, D].
        weights, experts: [n, k] of each token.
        ups, down: the frozen layers.
        activate: hidden units from the outputs of `ups`.
        updates: (A [E, r, .], B [E, ., r], s) of "0", "1", ... for the ups and of "down".

    Returns:
        [n, D].
    """

    def adapted(layer: Callable[[Tensor], Tensor], name: str, rows: Tensor, expert: int) -> Tensor:
        out = layer(rows)
        if name in updates:
            a, b, scaling = updates[name]
            out = out + scaling * (rows @ a[expert].T) @ b[expert].T
        return out

    y = torch.zeros_like(x)
    num_experts = int(experts.max()) + 1
    for expert in range(num_experts):
        token, slot = torch.where(experts == expert)
        rows = x[token]
        hidden = activate([adapted(layer, str(i), rows, expert) for i, layer in enumerate(ups)])
        out = adapted(down, "down", hidden, expert)
        y = y.index_add(0, token, out * weights[token, slot, None])
    return y

"""Routers: who computes which token, and the losses that keep experts in use.

Shapes: n tokens, D hidden, E experts, k experts per token. All arithmetic in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlora import ops


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """Return R x in float32: x [n, D], router [E, D] -> [n, E]."""
    if ops.fused_available(x):
        from mlora.ops.fused.router import fused_router_logits

        return fused_router_logits(x, router)
    return F.linear(x.float(), router.float())


def top_k_routing(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return (weights, experts), each [n, k]: the k most probable experts, their probabilities made to sum to one.

    That is the softmax of their logits alone.
    """
    ranked = ops.device_type(logits) != "cuda"  # where to rank a few would take longer than to find them
    chosen, experts = logits.topk(top_k, dim=-1, sorted=ranked)
    return _Apart.apply(chosen.softmax(-1)), experts


class _Apart(torch.autograd.Function):
    """Weights that sum to one, whose gradients count only as far as they differ: softmax ignores what they share.

    Experts that are alike, as all are before their first step, then leave a router no gradient at all. Rounding would
    leave it a little, of which AdamW makes whole steps, in directions that no two machines have in common.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad[:, :1]


def top_p_routing(logits: Tensor, top_p: float, temperature: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return (weights, experts), each [n, E], the most probable first.

    Experts are kept up to and including the first at which the running sum of probabilities exceeds top_p, all where
    it never does; the others weigh 0. Weights are the probabilities, not made to sum to one.

    Args:
        logits: [n, E].
        top_p: in (0, 1].
        temperature: where positive, divides the probabilities (not the logits: so the public predecessor reads it,
            and adapters trained with it depend on that).
    """
    probabilities = logits.softmax(-1)
    if temperature > 0:
        probabilities = probabilities / temperature
    ranked, experts = probabilities.sort(dim=-1, descending=True)
    before = F.pad(ranked.cumsum(-1)[:, :-1], (1, 0))
    return torch.where(before <= top_p, ranked, 0), experts


def switch_routing(logits: Tensor, capacity: int, sequence_lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weights [n], experts [n], overflow [n]): the most probable expert and its probability.

    Within one sequence, tokens beyond `capacity` for their expert, in order, overflow.
    """
    weights, experts = logits.softmax(-1).max(-1)
    chosen = F.one_hot(experts, logits.shape[-1])
    total = chosen.cumsum(0)
    lengths = torch.tensor(sequence_lengths, device=logits.device)
    starts = lengths.cumsum(0) - lengths
    before = torch.cat([torch.zeros_like(total[:1]), total])[starts].repeat_interleave(
        lengths, 0, output_size=len(logits)
    )
    place = ((total - before) * chosen).sum(-1)
    return weights, experts, place > capacity


def multi_hot(weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Return [n, E]: 1 where an expert computes a token, from its weights (0: it does not) and experts [n, k]."""
    return weights.new_zeros(len(experts), num_experts).scatter(1, experts, (weights > 0).to(weights.dtype))


def balance_loss(probabilities: Tensor, chosen: Tensor, real: Tensor | None = None) -> Tensor:
    """Return E * sum_i f_i P_i; k when all experts are used alike, each token by k of them.

    f_i is the share of tokens that chose expert i, at whichever rank, P_i the mean probability of expert i. This is
    the load balancing loss of Switch Transformers (https://arxiv.org/abs/2101.03961, eq. 4) for any number of
    choices, as Mixtral in transformers computes it.

    Args:
        probabilities: [n, E], of real tokens, all routers together.
        chosen: [n, E], 1 where chosen; no gradient flows through it.
        real: [n], 1 at tokens that count; None where all do.
    """
    if len(probabilities) == 0:
        return probabilities.sum()
    shares, means = token_mean(chosen.to(probabilities.dtype), real), token_mean(probabilities, real)
    return probabilities.shape[-1] * (shares * means).sum()


def z_loss(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Return the mean squared log-sum-exp of router logits [n, E] (https://arxiv.org/abs/2202.08906, eq. 5)."""
    return token_mean(logits.logsumexp(-1).pow(2), real) if len(logits) else logits.sum()


def token_mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Return the mean of values [n, ...] over the tokens that count, real [n] 0 or 1; over all for None."""
    if real is None:
        return values.mean(0)
    return real.to(values.dtype) @ values / real.sum()

"""Routers: who computes which token, and the losses that keep experts in use.

Shapes: n tokens, D hidden, E experts, k experts per token. All arithmetic in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def router_logits(x: Tensor, router: Tensor) -> Tensor:
    """Return R x in float32: x [n, D], router [E, D] -> [n, E]."""
    return F.linear(x.float(), router.float())


def top_k_routing(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return (weights, experts), each [n, k]: the k most probable experts, their probabilities made to sum to one."""
    probabilities, experts = logits.softmax(-1).topk(top_k, dim=-1)
    return probabilities / probabilities.sum(-1, keepdim=True), experts


def balance_loss(logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Return E * sum_{j,i} f_{j,i} P_i over all routers and tokens together; uniform routing gives k.

    f_{j,i} is the share of tokens whose j-th choice is expert i, P_i the mean probability of expert i. This is the
    load balancing loss of Switch Transformers (https://arxiv.org/abs/2101.03961, eq. 4) for k choices, as Mixtral
    in transformers computes it.

    Args:
        logits: [n, E] float32 of each router, real tokens only.
        top_k: k.
    """
    probabilities = torch.cat(list(logits)).softmax(-1)
    tokens, num_experts = probabilities.shape
    if tokens == 0:
        return probabilities.sum()
    chosen = F.one_hot(probabilities.topk(top_k, dim=-1).indices, num_experts).sum((0, 1)) / tokens
    return num_experts * (chosen * probabilities.mean(0)).sum()

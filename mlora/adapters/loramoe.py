"""LoRAMoE: every linear layer of the feed-forward block has LoRA experts, all of which compute every token.

    y = W x + sum_e softmax(R x)_e s B_e A_e d(x),  R [E, D]

Targeted attention layers get plain LoRA. The optional balance loss counts a token for its most probable expert.
Paper: https://arxiv.org/abs/2312.09979
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mlora import ops
from mlora.adapters.base import Init, LinearSite, Segment, Tensors, register
from mlora.adapters.lora import LowRank

if TYPE_CHECKING:
    from torch import Tensor


class RoutedLowRank(LowRank):
    """Single linear layers with LoRA experts and a router of their own."""

    lora_init: Literal["original", "gaussian"] = "original"
    """Distribution of A at the start: "original" is kaiming uniform with a = sqrt(5), "gaussian" normal(0, 1/r)."""
    num_experts: int = Field(8, ge=1)
    """Experts of each layer that has a router."""
    router_init_range: float = Field(5.0, ge=0)
    """The router starts kaiming uniform with a = sqrt(router_init_range)."""
    router_loss: bool = False
    """Whether the load balancing loss is trained."""
    router_aux_loss_coef: float = Field(0.001, ge=0)
    """Coefficient of the load balancing loss."""

    def routed(self, site: LinearSite) -> bool:
        """Return whether a layer has experts, rather than one plain update."""
        raise NotImplementedError

    def weights(self, logits: Tensor) -> Tensor:
        """Return the weight of every expert [n, E], from router logits [n, E]."""
        raise NotImplementedError

    def linear_parameters(self, site: LinearSite) -> dict[str, Init]:
        if not self.routed(site):
            return self.low_rank_parameters(site)
        router = Init((self.num_experts, site.in_features), "kaiming", math.sqrt(self.router_init_range))
        return self.low_rank_parameters(site, self.num_experts) | {"router": router}

    def linear(self, p: Tensors, x: Tensor, out: Tensor, site: LinearSite, segment: Segment) -> Tensor:
        if "router" not in p:
            return super().linear(p, x, out, site, segment)
        logits = ops.router_logits(x, p["router"])
        segment.record(site.path, logits)
        codes = ops.reduce(segment.dropout(x, self.lora_dropout, site.path), p["lora_A"])
        codes = codes * self.weights(logits)[..., None].to(codes.dtype)
        return out + ops.expand(codes, p["lora_B"], self.scaling).to(out.dtype)

    def aux_loss(self, router_logits: Sequence[Tensor]) -> Tensor | None:
        if not self.router_loss or not router_logits:
            return None
        import torch

        logits = torch.cat(list(router_logits))
        return self.router_aux_loss_coef * ops.balance_loss(logits.softmax(-1), self.chosen(logits))

    def chosen(self, logits: Tensor) -> Tensor:
        """Return [n, E], 1 where the balance loss counts an expert as chosen."""
        return ops.multi_hot(*ops.top_k_routing(logits, 1), self.num_experts)


@register("loramoe")
class LoraMoeConfig(RoutedLowRank):
    """Softly routed LoRA experts at each targeted layer of the feed-forward block, plain LoRA elsewhere."""

    peft_type: ClassVar[str] = "LORAMOE"
    file_prefix: ClassVar[str] = "loramoe"

    def routed(self, site: LinearSite) -> bool:
        return site.in_block

    def weights(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

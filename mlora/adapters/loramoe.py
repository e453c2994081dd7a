"""LoRAMoE: every linear layer of the feed-forward block has LoRA experts, all of which compute every token.

    y = W x + sum_e softmax(R x)_e s B_e A_e d(x),  R [E, D]

Targeted attention layers get plain LoRA. The optional balance loss counts a token for its most probable expert.
Paper: https://arxiv.org/abs/2312.09979
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mlora import ops
from mlora.adapters.base import Init, LinearSite, Segment, Tensors, register
from mlora.adapters.lora import LowRank
from mlora.adapters.routed import Routed

if TYPE_CHECKING:
    from torch import Tensor

    from mlora.ops.lowrank import LowRankUpdate


class RoutedLowRank(Routed, LowRank):
    """Single linear layers with LoRA experts and a router of their own."""

    lora_init: Literal["original", "gaussian"] = "original"
    """Distribution of A at the start: "original" is kaiming uniform with a = sqrt(5), "gaussian" normal(0, 1/r)."""
    router_init_range: float = Field(5.0, ge=0)
    """The router starts kaiming uniform with a = sqrt(router_init_range)."""
    router_loss: bool = False
    """Whether the load balancing loss is trained."""

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

    def update(self, p: Tensors, x: Tensor, site: LinearSite, segment: Segment) -> LowRankUpdate | None:
        plain = super().update(p, x, site, segment)
        if plain is None or "router" not in p:
            return plain
        logits = ops.router_logits(x, p["router"])
        segment.record(site.path, logits)
        return plain._replace(weights=self.weights(logits))


@register("loramoe")
class LoraMoeConfig(RoutedLowRank):
    """Softly routed LoRA experts at each targeted layer of the feed-forward block, plain LoRA elsewhere."""

    peft_type: ClassVar[str] = "LORAMOE"
    file_prefix: ClassVar[str] = "loramoe"

    def routed(self, site: LinearSite) -> bool:
        return site.in_block

    def weights(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

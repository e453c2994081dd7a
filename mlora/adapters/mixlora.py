"""MixLoRA: LoRA on the attention, top-k routed LoRA experts around the shared frozen feed-forward block.

    l = R x,  p = softmax(l),  e_1 .. e_k = the k largest,  w_j = p_{e_j} / sum_i p_{e_i}

with the experts of `mixture.py` and Mixtral's load balancing loss. With k = 1 the weight is 1, so that loss alone
trains the router. Paper: https://arxiv.org/abs/2404.15159
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlora import ops
from mlora.adapters.base import Segment, register
from mlora.adapters.mixture import Mixture, Routes
from mlora.adapters.routed import TopK

if TYPE_CHECKING:
    from torch import Tensor


@register("mixlora")
class MixLoraConfig(TopK, Mixture):
    """Top-k routed LoRA experts in every feed-forward block, plain LoRA on targeted attention layers."""

    @property
    def choices(self) -> int | None:
        return self.top_k

    def route(self, logits: Tensor, segment: Segment) -> Routes:
        return Routes(*ops.top_k_routing(logits, self.top_k))

"""MoLA: every targeted linear layer, attention included, has top-k routed LoRA experts.

    p = softmax(R x),  w = p of the k largest, made to sum to one,  y = W x + sum_e w_e s B_e A_e d(x)

Paper: https://arxiv.org/abs/2402.08562
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mlora import ops
from mlora.adapters.base import LinearSite, register
from mlora.adapters.loramoe import RoutedLowRank
from mlora.adapters.routed import TopK

if TYPE_CHECKING:
    from torch import Tensor


@register("mola")
class MolaConfig(TopK, RoutedLowRank):
    """Top-k routed LoRA experts at each targeted linear layer."""

    peft_type: ClassVar[str] = "MOLA"
    file_prefix: ClassVar[str] = "mola"

    def routed(self, site: LinearSite) -> bool:
        return True

    def weights(self, logits: Tensor) -> Tensor:
        weights, experts = ops.top_k_routing(logits, self.top_k)
        return weights.new_zeros(logits.shape).scatter(1, experts, weights)

"""LoRA, rsLoRA and LoRA+.

y = W x + b + s B A d(x), with A [r, D] random, B [O, r] zero, s = lora_alpha / r (rsLoRA: lora_alpha / sqrt(r)) and
d dropout. LoRA: https://arxiv.org/abs/2106.09685  rsLoRA: https://arxiv.org/abs/2312.03732
LoRA+ (a higher learning rate for B): https://arxiv.org/abs/2402.12354
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mlora import ops
from mlora.adapters.base import Distribution, Init, LinearSite, Method, Segment, Tensors, register, scaling

if TYPE_CHECKING:
    from torch import Tensor


@register("lora")
class LoraConfig(Method):
    """A low-rank update of each targeted linear layer."""

    r: int = Field(8, ge=1)
    """Rank of the update."""
    lora_alpha: float = Field(16, gt=0)
    """Numerator of the scaling: lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an entry of the update's input in training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    lora_init: Literal["original", "gaussian"] = "original"
    """Distribution of A at the start: "original" is kaiming uniform with a = sqrt(5), "gaussian" normal(0, 1/r)."""

    def linear_parameters(self, site: LinearSite) -> dict[str, Init]:
        return low_rank_parameters(self, site)

    def linear(self, p: Tensors, x: Tensor, out: Tensor, site: LinearSite, segment: Segment) -> Tensor:
        x = segment.dropout(x, self.lora_dropout, site.path)
        return out + ops.low_rank(x, p["lora_A"], p["lora_B"], self.scaling)

    @property
    def scaling(self) -> float:
        """s, the factor on B A x."""
        return scaling(self.r, self.lora_alpha, self.use_rslora)


def low_rank_parameters(config: LoraConfig, site: LinearSite, num_experts: int | None = None) -> dict[str, Init]:
    """Declare A and B of a linear layer, stacked [E, ...] for E experts."""
    lead = () if num_experts is None else (num_experts,)
    kind: Distribution
    kind, scale = ("kaiming", math.sqrt(5)) if config.lora_init == "original" else ("normal", 1 / config.r)
    return {
        "lora_A": Init((*lead, config.r, site.in_features), kind, scale, stacked=bool(lead)),
        "lora_B": Init((*lead, site.out_features, config.r), stacked=bool(lead)),
    }

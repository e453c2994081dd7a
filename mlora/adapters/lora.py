"""LoRA, rsLoRA, LoRA+ and DoRA.

LoRA   y = W x + b + s B A d(x), with A [r, D] random, B [O, r] zero, s = lora_alpha / r and d dropout.
rsLoRA s = lora_alpha / sqrt(r).
DoRA   y = m * (W x + s B A d(x)) / n + b, m [O] trained and |W|'s row norms at the start, n the row norms of W + s B A.
LoRA+  a higher learning rate for B.

https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2312.03732, https://arxiv.org/abs/2402.09353,
https://arxiv.org/abs/2402.12354
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mlora import ops
from mlora.adapters.base import Distribution, Init, LinearSite, Method, Segment, Tensors, register, scaling

if TYPE_CHECKING:
    from torch import Tensor


class LowRank(Method):
    """What every method made of low-rank updates can set."""

    r: int = Field(8, ge=1)
    """Rank of an update."""
    lora_alpha: float = Field(16, gt=0)
    """Numerator of the scaling: lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an entry of an update's input in training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    lora_init: Literal["original", "gaussian"] = "original"
    """Distribution of A at the start: "original" is kaiming uniform with a = sqrt(5), "gaussian" normal(0, 1/r)."""

    @property
    def scaling(self) -> float:
        """s, the factor on B A x."""
        return scaling(self.r, self.lora_alpha, self.use_rslora)

    def linear_parameters(self, site: LinearSite) -> dict[str, Init]:
        return self.low_rank_parameters(site)

    def linear(self, p: Tensors, x: Tensor, out: Tensor, site: LinearSite, segment: Segment) -> Tensor:
        x = segment.dropout(x, self.lora_dropout, site.path)
        return out + ops.low_rank(x, p["lora_A"], p["lora_B"], self.scaling)

    def low_rank_parameters(self, site: LinearSite, num_experts: int | None = None) -> dict[str, Init]:
        """Declare A and B of a linear layer, stacked [E, ...] for E experts."""
        lead = () if num_experts is None else (num_experts,)
        kind: Distribution
        kind, scale = ("kaiming", math.sqrt(5)) if self.lora_init == "original" else ("normal", 1 / self.r)
        return {
            "lora_A": Init((*lead, self.r, site.in_features), kind, scale, stacked=bool(lead)),
            "lora_B": Init((*lead, site.out_features, self.r), stacked=bool(lead)),
        }


@register("lora")
class LoraConfig(LowRank):
    """A low-rank update of each targeted linear layer."""

    use_dora: bool = False
    """Train the norms of the updated weight's rows apart from their directions (DoRA)."""

    def low_rank_parameters(self, site: LinearSite, num_experts: int | None = None) -> dict[str, Init]:
        declared = super().low_rank_parameters(site, num_experts)
        if self.use_dora:
            shape = (*declared["lora_B"].shape[:-2], site.out_features)
            declared["lora_magnitude_vector"] = Init(shape, "row_norms", stacked=num_experts is not None)
        return declared

    def linear(self, p: Tensors, x: Tensor, out: Tensor, site: LinearSite, segment: Segment) -> Tensor:
        if not self.use_dora:
            return super().linear(p, x, out, site, segment)
        update = ops.low_rank(segment.dropout(x, self.lora_dropout, site.path), p["lora_A"], p["lora_B"], self.scaling)
        norm = ops.dora_norm(site.module, p["lora_A"], p["lora_B"], self.scaling)
        return ops.rescale(out, update, p["lora_magnitude_vector"] / norm, site.bias)

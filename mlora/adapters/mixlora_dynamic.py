"""MixLoRA-dynamic: as many experts for a token as it takes for their probabilities to exceed top_p.

The experts of `mixture.py`, weighted by their probabilities as they are. The probabilities (not the logits) are
divided by the temperature where that is positive: so the public predecessor reads it. Since the weights do not sum to
one, a new adapter changes the model a little. Routing: https://arxiv.org/abs/2403.07652
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from mlora import ops
from mlora.adapters.base import Segment, register
from mlora.adapters.mixture import Mixture, Routes

if TYPE_CHECKING:
    from torch import Tensor


@register("mixlora-dynamic")
class MixLoraDynamicConfig(Mixture):
    """Top-p routed LoRA experts in every feed-forward block, plain LoRA on targeted attention layers."""

    top_p: float = Field(0.8, gt=0, le=1)
    """Experts are added until their probabilities sum to more than this."""
    temperature: float = Field(0.0, ge=0)
    """Where positive, divides the probabilities before they are added up."""

    def route(self, logits: Tensor, segment: Segment) -> Routes:
        return Routes(*ops.top_p_routing(logits, self.top_p, self.temperature))

    def chosen(self, logits: Tensor) -> Tensor:
        return ops.multi_hot(*ops.top_p_routing(logits, self.top_p, self.temperature), self.num_experts)

"""MixLoRA-switch: one expert for each token, and a limit to how many tokens of a sequence an expert takes.

    e = argmax p,  w = p_e

with the experts of `mixture.py`. Within one sequence, tokens beyond `expert_capacity` for their expert, in order,
skip the block: their output is their own input, weighted like the rest. Only the router sees the jitter. Training and
evaluation differ in dropout and jitter only. Since w < 1, a new adapter changes the model.
Switch Transformers: https://arxiv.org/abs/2101.03961; router z-loss: https://arxiv.org/abs/2202.08906
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, ValidationInfo, field_validator

from mlora import ops
from mlora.adapters.base import BlockSite, BlockSteps, Segment, Tensors, register
from mlora.adapters.mixture import Mixture, Routes

if TYPE_CHECKING:
    from torch import Tensor


@register("mixlora-switch")
class MixLoraSwitchConfig(Mixture):
    """Top-1 routed LoRA experts with a capacity, plain LoRA on targeted attention layers."""

    counts_tokens: ClassVar[bool] = True

    router_init_range: float = Field(1.0, ge=0)
    """Standard deviation of the router's initial weights."""
    jitter_noise: float = Field(0.01, ge=0, lt=1)
    """In training, the router's input is multiplied by uniform(1 - jitter_noise, 1 + jitter_noise)."""
    router_z_loss_coef: float = Field(0.001, ge=0)
    """Coefficient of the router z-loss."""
    expert_capacity: int = Field(32, ge=1)
    """Tokens of one sequence that an expert takes."""
    capacity_factor: float | None = Field(None, gt=0)
    """Instead of expert_capacity: cutoff_len / num_experts times this, rounded up; common are 1.0, 1.25 and 2.0."""
    ffn_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the block's output."""

    @field_validator("capacity_factor")
    @classmethod
    def _one_capacity(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and "expert_capacity" in info.data and info.data["expert_capacity"] != 32:
            raise ValueError("expected only one of expert_capacity and capacity_factor")
        return value

    def for_length(self, tokens: int) -> MixLoraSwitchConfig:
        if self.capacity_factor is None:
            return self
        capacity = math.ceil(tokens / self.num_experts * self.capacity_factor)
        return self.model_copy(update={"expert_capacity": capacity, "capacity_factor": None})

    def route(self, logits: Tensor, segment: Segment) -> Routes:
        weights, experts, overflow = ops.switch_routing(logits, self.expert_capacity, segment.sequence_lengths)
        return Routes(weights[:, None], experts[:, None], overflow)

    def block(
        self, p: Tensors, experts: Mapping[str, Tensors], x: Tensor, site: BlockSite, segment: Segment
    ) -> BlockSteps:
        routed = segment.jitter(x, self.jitter_noise, site.path)
        y = yield from self.mix(x, routed, p, experts, site, segment)
        return segment.dropout(y, self.ffn_dropout, f"{site.path}.ffn_dropout")

    def aux_loss(self, router_logits: Sequence[Tensor], real: Tensor | None = None) -> Tensor | None:
        import torch

        balance = super().aux_loss(router_logits, real)
        if balance is None:
            return None
        if real is not None:
            real = real.repeat(len(router_logits))
        return balance + self.router_z_loss_coef * ops.z_loss(torch.cat(list(router_logits)), real)
